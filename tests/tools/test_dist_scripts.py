"""The scripts that start several processes: which commands they call, with which words."""
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path):
    """A function that runs a script with a stand-in for Python and srun, and gives the words that it was called with."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$(basename $0)" "$@"\n')
        (tmp_path / name).chmod(0o755)

    def call(script, *args, status=0, **env):
        env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', **env)
        result = subprocess.run([ROOT / 'tools' / script, *args], capture_output=True, text=True, env=env)
        assert result.returncode == status
        return result.stderr if status else result.stdout.split('\n')[:-1]

    return call


TORCHRUN = ['python', '-m', 'torch.distributed.run']


def test_commands_of_one_node(tool):
    where = ['--nnodes=1', '--node_rank=0', '--master_addr=127.0.0.1', '--master_port=29500', '--nproc_per_node=8']
    assert tool('dist_train.sh', 'config.py', '8', '--cfg-options', 'a=b c') == [
        *TORCHRUN, *where, f'{ROOT}/tools/train.py', 'config.py', '--launcher', 'pytorch', '--cfg-options', 'a=b c']
    assert tool('dist_test.sh', 'config.py', 'epoch_12.pth', '8', '--tta') == [
        *TORCHRUN, *where, f'{ROOT}/tools/test.py', 'config.py', 'epoch_12.pth', '--launcher', 'pytorch', '--tta']


def test_commands_of_several_nodes(tool):
    env = dict(NNODES='4', NODE_RANK='3', MASTER_ADDR='10.0.0.1', PORT='29501')
    where = ['--nnodes=4', '--node_rank=3', '--master_addr=10.0.0.1', '--master_port=29501', '--nproc_per_node=8']
    for script, words in (('dist_train.sh', ['config.py', '8']), ('dist_test.sh', ['config.py', 'epoch_12.pth', '8'])):
        assert tool(script, *words, **env)[3:8] == where
    assert tool('dist_train.sh', 'config.py', '8', MAX_RESTARTS='2', **env) == [
        *TORCHRUN, '--nnodes=4', '--max_restarts=2', '--rdzv_backend=c10d', '--rdzv_endpoint=10.0.0.1:29501',
        '--nproc_per_node=8', f'{ROOT}/tools/train.py', 'config.py', '--resume', '--launcher', 'pytorch']


@pytest.mark.parametrize('script, words, runs', [
    ('slurm_train.sh', ['config.py', 'out'], ['train.py', 'config.py', '--work-dir=out']),
    ('slurm_test.sh', ['config.py', 'epoch_12.pth'], ['test.py', 'config.py', 'epoch_12.pth']),
])
def test_commands_of_slurm(tool, script, words, runs):
    env = dict(GPUS='16', SRUN_ARGS='--qos high')
    assert tool(script, 'gpu', 'job', *words, '--cfg-options', 'a=b c', **env) == [
        'srun', '-p', 'gpu', '--job-name=job', '--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8', '--cpus-per-task=5',
        '--kill-on-bad-exit=1', '--qos', 'high', 'python', '-u', f'{ROOT}/tools/{runs[0]}', *runs[1:], '--launcher=slurm',
        '--cfg-options', 'a=b c']


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh'])
def test_usage(tool, script):
    assert tool(script, 'config.py', status=2).startswith(f'tools/{script} ')
