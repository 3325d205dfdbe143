"""The tools can be called as the README calls them: tools/train.py CONFIG."""
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

# Python files that run nothing are modules, which commands share
TOOLS = [tool for tool in sorted((Path(__file__).parents[2] / 'tools').rglob('*.*'))
         if tool.suffix == '.sh' or "if __name__ == '__main__':" in tool.read_text()]


@pytest.mark.parametrize('tool', TOOLS, ids=lambda tool: tool.name)
def test_is_a_command(tool):
    with open(tool) as file:
        assert next(file) == {'.py': '#!/usr/bin/env python\n', '.sh': '#!/usr/bin/env bash\n'}[tool.suffix]
    assert os.access(tool, os.X_OK)


def test_a_command_ends_in_two_lines_and_status_1():
    path = 'configs/mask-rcnn_convnextv2-b_lier\u0430_r61.py'
    tool, = (tool for tool in TOOLS if tool.name == 'train.py')
    env = dict(os.environ, PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    result = subprocess.run([tool, path], capture_output=True, text=True, env=env)
    assert result.returncode == 1
    *warnings, problem, remedy = result.stderr.splitlines()
    assert all('DeprecationWarning' in line or line.startswith(' ') for line in warnings)  # of torch 2.5
    assert problem == f'Config not found: {path}' and remedy.startswith('The closest ones are ')


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_help(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [tool, '--help'])
    with pytest.raises(SystemExit):
        runpy.run_path(next(str(path) for path in TOOLS if path.name == tool), run_name='__main__')
    printed = capsys.readouterr().out
    assert f'usage: {tool}' in printed and '--cfg-options' in printed
