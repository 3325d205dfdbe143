"""Triton's interpreter, which runs the kernels where there is no GPU, accepts what its compiler may refuse."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton', reason='Triton is not installed')

from liera_mm.core.kernels import HAS_TRITON


def test_every_kernel_compiles_where_they_are_used():
    environment = {key: value for key, value in os.environ.items() if key != 'TRITON_INTERPRET'}
    script = Path(__file__).with_name('compile_kernels.py')
    run = subprocess.run([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True)
    assert (run.returncode == 0) == HAS_TRITON, run.stderr
