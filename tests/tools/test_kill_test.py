"""A few of the kills of tools/analysis_tools/kill_test.py; docs/checkpoints.md has the result of 200."""


def test_killed_trainings_end_as_if_they_were_not(run_tool):
    printed = run_tool('analysis_tools/kill_test.py', '--kills', 2)
    assert ': 0 lost runs, 0 silent differences' in printed
    assert printed.count(': resumed') == 2
