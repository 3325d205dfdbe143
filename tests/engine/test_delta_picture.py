"""What TensorBoard and the like get of a training: the hook's scalars, and a picture of every Δ."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from liera_mm import adapt
from liera_mm.core.adapted import adapted_layers
from liera_mm.core.report import delta_histograms
from liera_mm.engine.delta_picture import EDGES, draw_deltas

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')


def test_tensorboard_reads_it_back(make_runner):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    runner = make_runner(**{'vis_backends': None, 'visualizer.vis_backends': [
        dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]})
    runner.train()
    runner.visualizer.close()
    events = accumulator.EventAccumulator(str(next(Path(runner.work_dir).rglob('events.out.*')).parent))
    events.Reload()
    tags = events.Tags()
    names = {'liera/max_delta', 'liera/sign_change_share', 'liera/zero_weights', 'loss', 'coco/bbox_mAP'}
    assert names <= set(tags['scalars'])
    [event] = events.Scalars('liera/max_delta')
    assert event.step == 1 and event.value > 0
    assert tags['images'] == ['liera_delta']
    picture = cv2.imdecode(np.frombuffer(events.Images('liera_delta')[0].encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    expected = draw_deltas(delta_histograms(runner.model, EDGES.tolist()))
    assert (picture[..., ::-1] == expected).all()


def test_local_files_do_without(make_runner):
    runner = make_runner()
    runner.train()
    assert not [*Path(runner.work_dir).rglob('*liera_delta*')]


def test_histograms(net, perturb):
    """Shares of NumPy's; what lies beyond is in the outermost bins."""
    perturb(adapt(net, rank=2))
    edges = [-2., -1.5, -1., -.5]
    found = dict(delta_histograms(net, edges))
    assert [*found] == [name for name, _ in adapted_layers(net)]
    for name, layer in adapted_layers(net):
        sizes = layer.adapter().detach().abs().double().numpy()
        with np.errstate(divide='ignore'):
            counts, _ = np.histogram(np.log10(sizes).clip(-2, -.5), edges)
        np.testing.assert_allclose(found[name], counts / sizes.size, rtol=1e-6)


@pytest.mark.parametrize(('value', 'place'), [(0., 0), (1e-9, 0), (.5, 2), (torch.inf, 2), (torch.nan, 2)])
def test_entries_beyond_the_edges(net, value, place):
    adapt(net, method='dense')
    with torch.no_grad():
        for _, layer in adapted_layers(net):
            next(layer.adapter.parameters()).fill_(value)
    for _, shares in delta_histograms(net, [-4., -3., -2., -1.]):
        assert np.argmax(shares) == place and sum(shares) == pytest.approx(1)
