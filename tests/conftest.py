"""What several test files share: a small network with every kind of layer, and a way to train it without training."""
import functools
import gc
import os
import random

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # read when torch is imported: the workers would wait for each other
else:  # the workers have to agree on the names of tests, some of which list a set
    os.environ.setdefault('PYTHONHASHSEED', str(random.randrange(2**32)))

import pytest
import torch
from filelock import FileLock
from torch import nn

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # kernels run in Triton's interpreter; it is read when Triton is imported

from liera_mm import compat

compat.install()  # before mmpretrain is imported

from mmengine.config import utils as config_utils  # noqa: E402
from mmengine.visualization import Visualizer  # noqa: E402
from mmpretrain.models.utils.norm import GRN  # noqa: E402

# MMEngine reads every metafile of MMDetection, which takes a second, for each config whose base is one of its
config_utils.load = functools.cache(config_utils.load)


def pytest_collection_finish():
    """Leave what was imported out of further garbage collections, of which MMEngine makes one for every data set."""
    gc.collect()
    gc.freeze()


class Block(nn.Module):
    """A ConvNeXt-V2 block of four channels."""

    def __init__(self):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(1, 4)
        self.pointwise_conv1 = nn.Conv2d(4, 8, 1)
        self.grn = GRN(8)
        self.pointwise_conv2 = nn.Conv2d(8, 4, 1, bias=False)
        self.gamma = nn.Parameter(torch.full((4, 1, 1), .5))

    def forward(self, x):
        y = self.pointwise_conv1(self.norm(self.depthwise_conv(x)))
        return x + self.gamma * self.pointwise_conv2(self.grn(y.relu(), data_format='channel_first'))


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))
        self.stages = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.stages:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_visualizer():
    """MMEngine shares visualizers by name, and that of an earlier test writes into a folder that may be gone."""
    yield
    for cls in (Visualizer, *Visualizer.__subclasses__()):
        cls._instance_dict.clear()


@pytest.fixture(scope='session')
def make_once(tmp_path_factory):
    """A function that gives the folder of a name, which ``make(folder)`` has filled: once, for all workers together."""
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        root = root.parent

    def get(name, make):
        folder, done = root / name, root / f'{name}.done'
        with FileLock(root / f'{name}.lock'):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope='module')
def one_thread():
    """For tests on tiny tensors, whose threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def net(seed):
    """A network whose norms and biases are not at their neutral values."""
    model = Net().eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), model.stem[1].running_mean]:
            tensor.add_(.1 * torch.randn_like(tensor))
    return model


@pytest.fixture
def image(seed):
    return torch.randn(2, 3, 9, 9)


@pytest.fixture
def perturb():
    """A function that moves every trained tensor of a model by random numbers, as training would."""

    @torch.no_grad()
    def move(model):
        for module in model.modules():
            unit = getattr(module, 'rms', None)  # what a relative Δ is divided by
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.add_((.2 if unit is None else .2 * unit) * torch.randn_like(parameter))
        return model

    return move
