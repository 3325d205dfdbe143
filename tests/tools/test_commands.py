"""The tools can be called as the README calls them: tools/train.py CONFIG."""
import os
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


def test_help():
    env = dict(os.environ, PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}')
    printed = subprocess.run([next(tool for tool in TOOLS if tool.name == 'train.py'), '--help'], capture_output=True,
                             text=True, check=True, env=env).stdout
    assert 'usage: train.py' in printed and '--cfg-options' in printed
