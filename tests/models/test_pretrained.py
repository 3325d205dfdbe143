"""Pretrained weights: where they come from, the forms they have, and that none is missing without a word."""
import copy
import functools
import http.server
import logging
import re
import threading

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS, DefaultScope
from safetensors.torch import save_file
from torch import nn

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.core.factors import root_mean_square

pytestmark = pytest.mark.usefixtures('one_thread')

SHIPPED = 'mask-rcnn_convnextv2-mini_glyphs'
CONVNEXT = dict(
    type='mmpretrain.ConvNeXt',
    arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32]),
    layer_scale_init_value=0.,
    use_grn=True,
    out_indices=[0, 1, 2, 3],
    gap_before_final_norm=False)
RESNET = dict(type='mmdet.ResNet', depth=18, base_channels=4)
SWIN = dict(type='mmdet.SwinTransformer', embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4)
LIERA = dict(rank=2, alpha=4)


def build(backbone, checkpoint=None, prefix=None, **liera):
    init_cfg = ConfigDict(type='Pretrained', checkpoint=str(checkpoint), prefix=prefix) if checkpoint else None
    backbone = dict(backbone, init_cfg=init_cfg)
    liera = dict(LIERA, **liera)
    if 'ConvNeXt' in backbone['type']:
        cfg = dict(backbone, type='LieRAConvNeXt', liera=liera)
    else:
        cfg = dict(type='LieRABackbone', backbone=backbone, liera=liera)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(copy.deepcopy(cfg))


def random_state(backbone):
    """Weights of a backbone without adapters, none of them at its initial value."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        state = MODELS.build(backbone).state_dict()
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in state.items()}


def published(state):
    """A classifier's checkpoint as mmpretrain publishes it: one norm at the end, a head, a prefix."""
    state = {f'backbone.{name}': t for name, t in state.items() if not re.match('norm[012]', name)}
    return dict(meta=dict(epoch=0), state_dict={**state, 'head.fc.weight': torch.rand(10, 32)})


def split(model):
    """State of the base, state of the adapters."""
    states = ({}, {})
    for name, tensor in model.state_dict().items():
        states['.adapter.' in name][name] = tensor.clone()
    return states


def assert_factors(model, before, after):
    """The factors are as they were, the units those of the weights that are there now."""
    assert before.keys() == after.keys() and any(name.endswith('.rms') for name in after)
    for name, tensor in after.items():
        unit = name.endswith('.rms') and root_mean_square(model.state_dict()[name.replace('adapter.rms', 'weight')])
        assert torch.equal(tensor, unit if name.endswith('.rms') else before[name])


def assert_loaded(model, state, but=()):
    ours = split(model)[0]
    assert set(ours) - set(state) <= set(but)
    for name, tensor in ours.items():
        if name in state:
            assert torch.equal(tensor.flatten(), state[name].flatten()), name


@pytest.fixture
def messages(capsys):
    """A function that gives all that was printed or logged so far."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lambda: '\n'.join(records) + ''.join(capsys.readouterr())
    logger.removeHandler(handler)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """URL of a server of the files in tmp_path."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))

    class Handler(http.server.SimpleHTTPRequestHandler):

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


@pytest.mark.parametrize('theirs', [True, False], ids=['2d', '4d'])
@pytest.mark.parametrize('ours', [True, False], ids=['linear', '1x1'])
def test_published_convnext(tmp_path, messages, ours, theirs):
    state = random_state(dict(CONVNEXT, linear_pw_conv=theirs))
    torch.save(published(state), tmp_path / 'base.pth')
    model = build(dict(CONVNEXT, linear_pw_conv=ours), tmp_path / 'base.pth', 'backbone.')
    norms, factors = ({f'norm{i}.{kind}' for i in range(3) for kind in ('weight', 'bias')}, split(model)[1])
    before = model.state_dict()['norm0.weight'].clone()
    model.init_weights()
    assert_loaded(model, {name: t for name, t in state.items() if name not in norms}, but=norms)
    assert torch.equal(model.norm0.weight, before)  # the checkpoint has none
    after = split(model)[1]
    assert_factors(model, factors, after)
    logged = messages()
    assert 'norm0.weight' in logged and 'adapter' not in logged


@pytest.mark.parametrize('wrap', [
    'bare', 'state_dict', 'safetensors', 'http', 'prefix-without-dot', 'compiled', 'compiled-safetensors',
    'compiled-prefix', 'compiled-part'])
def test_sources(tmp_path, request, wrap):
    state = random_state(CONVNEXT)
    prefix, source = None, tmp_path / 'base.pth'
    if wrap == 'safetensors':
        source = tmp_path / 'base.safetensors'
        save_file(state, source)
    elif wrap == 'compiled-safetensors':
        source = tmp_path / 'base.safetensors'
        save_file({f'_orig_mod.{name}': t for name, t in state.items()}, source)
    elif wrap == 'compiled':
        torch.save({f'module._orig_mod.{name}': t for name, t in state.items()}, source)
    elif wrap == 'prefix-without-dot':
        torch.save(published(state), source)
        prefix = 'backbone'
    elif wrap in ('compiled-prefix', 'compiled-part'):
        start = '_orig_mod.backbone.' if wrap == 'compiled-prefix' else 'backbone._orig_mod.'
        theirs = published(state)['state_dict']
        torch.save(dict(state_dict={name.replace('backbone.', start): t for name, t in theirs.items()}), source)
        prefix = 'backbone.'
    else:
        torch.save(dict(state_dict=state) if wrap == 'state_dict' else state, source)
    if wrap == 'http':
        source = f'{request.getfixturevalue("server")}/base.pth'
    model = build(CONVNEXT, source, prefix)
    model.init_weights()
    norms = {name for name in state if re.match('norm[012]', name)}
    missing = norms if prefix else ()
    assert_loaded(model, {name: t for name, t in state.items() if name not in missing}, but=missing)


def test_download_is_kept(tmp_path, server):
    torch.save(random_state(CONVNEXT), tmp_path / 'base.pth')
    build(CONVNEXT, f'{server}/base.pth').init_weights()
    (tmp_path / 'base.pth').unlink()
    build(CONVNEXT, f'{server}/base.pth').init_weights()


def test_weights_that_ship():
    arch = dict(CONVNEXT, arch=dict(depths=[2, 2, 4, 2], channels=[24, 48, 96, 192]))
    model = build(arch, f'liera://{SHIPPED}', 'backbone.')
    before = split(model)[0]
    model.init_weights()
    after = split(model)[0]
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same and set(before) == model.loaded_names


def test_unknown_name_lists_what_ships():
    with pytest.raises(FileNotFoundError, match=f'liera://typo does not ship.*{SHIPPED}'):
        build(CONVNEXT, 'liera://typo').init_weights()


@pytest.mark.parametrize('method', ['lora', 'dense', 'pissa', 'dora'])
@pytest.mark.parametrize('update', ['additive', 'taylor', 'exp'])
def test_starts_as_the_pretrained_network(tmp_path, method, update):
    """PiSSA's factors and DoRA's magnitudes are those of the weights that were loaded after adapting."""
    state = random_state(CONVNEXT)
    torch.save(published(state), tmp_path / 'base.pth')
    model = build(CONVNEXT, tmp_path / 'base.pth', 'backbone.', method=method, update=update)
    model.init_weights()
    with DefaultScope.overwrite_default_scope('mmdet'):
        plain = MODELS.build(CONVNEXT)
    plain.load_state_dict(split(model)[0])
    plain.eval()
    model.fast = False  # equal only to rounding: test_convnext.py
    picture = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(model.eval()(picture), plain(picture)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    layer = model.stages[0][0].depthwise_conv
    assert torch.equal(layer.frozen_weight, state['stages.0.0.depthwise_conv.weight'])
    if method == 'pissa':  # rank 2 is enough for all singular triplets of this kernel
        torch.testing.assert_close((layer.adapter.B @ layer.adapter.A).view_as(layer.frozen_weight), layer.frozen_weight)


DAMAGES = {
    'another arch': (dict(CONVNEXT, arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 40])), 'backbone.', None,
                     r'frozen tensors would stay random, among them downsample_layers\.3\.1\.weight'),
    'shallower': (dict(CONVNEXT, arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])), 'backbone.', None,
                  r'frozen tensors would stay random, among them stages\.2\.1\.'),
    'a weight is missing': (CONVNEXT, 'backbone.', 'stages.1.0.pointwise_conv2.weight',
                            r': 1 frozen tensors would stay random, among them stages\.1\.0\.pointwise_conv2\.weight'),
    'a norm is missing': (CONVNEXT, 'backbone.', 'stages.1.0.norm.bias', r': 1 .* among them stages\.1\.0\.norm\.bias'),
    'wrong prefix': (CONVNEXT, 'encoder.', None, r'encoder. is not in the pretrained model .*begin with backbone\., head\.'),
    'prefix without that of DDP': (
        CONVNEXT, 'backbone.', 'DDP', r'backbone. is not in the .*begin with module\.\nSet .*prefix .*=module.backbone.,'),
    'no prefix': (CONVNEXT, None, None, r'frozen tensors would stay random, among them downsample_layers\.0\.0\.weight'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_convnext_that_does_not_fit(tmp_path, damage):
    cfg, prefix, missing, message = DAMAGES[damage]
    checkpoint = published(random_state(CONVNEXT))
    checkpoint['state_dict'].pop(f'backbone.{missing}', None)
    if missing == 'DDP':
        checkpoint['state_dict'] = {f'module.{name}': t for name, t in checkpoint['state_dict'].items()}
    torch.save(checkpoint, tmp_path / 'base.pth')
    with pytest.raises((RuntimeError, AssertionError), match=message) as error:
        build(cfg, tmp_path / 'base.pth', prefix).init_weights()
    if damage != 'wrong prefix':  # there, MMEngine knows better
        assert str(tmp_path / 'base.pth') in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        build(CONVNEXT, tmp_path / 'nowhere.pth').init_weights()


def test_a_file_of_which_swin_takes_no_name(tmp_path):
    """It wants backbone. before each, and ends in an IndexError where no name has that."""
    torch.save(random_state(SWIN), tmp_path / 'base.pth')
    with pytest.raises(SetupError, match='base.pth does not fit LieRASwinTransformer: .* frozen tensors would stay random'):
        around(dict(SWIN, init_cfg=ConfigDict(checkpoint=str(tmp_path / 'base.pth')))).init_weights()


@pytest.mark.parametrize('source, problem, remedy', [
    ('torchvision://resnet51', 'There are no weights torchvision://resnet51', 'resnet50'),
    ('open-mmlab://detectron2/resnet50_cafe', 'no weights open-mmlab://.*cafe', 'detectron2/resnet50_caffe'),
    ('mmcls://mobilenet_v9', 'no weights mmcls://mobilenet_v9', 'mobilenet_v2'),
    ('{server}/nowhere.pth', 'nowhere.pth cannot be downloaded: HTTP Error 404', 'fetch the file elsewhere'),
])
def test_weights_that_nobody_publishes(server, source, problem, remedy):
    with pytest.raises(SetupError, match=f'{problem}.*\n.*{remedy}'):
        around(RESNET, pretrained=source.format(server=server)).init_weights()


def torchvision_form(state):
    """A ResNet as torchvision publishes it: with a classifier, and without counts of batches."""
    state = {name: t for name, t in state.items() if not name.endswith('num_batches_tracked')}
    return {**state, 'fc.weight': torch.rand(10, 32), 'fc.bias': torch.rand(10)}


def swin_form(state):
    return dict(state_dict={f'backbone.{name}': tensor for name, tensor in state.items()})


@pytest.mark.parametrize('cfg, form', [(RESNET, torchvision_form), (SWIN, swin_form)], ids=['resnet', 'swin'])
def test_other_backbones(tmp_path, messages, cfg, form):
    state = random_state(cfg)
    torch.save(form(state), tmp_path / 'base.pth')
    model = build(cfg, tmp_path / 'base.pth')
    factors = split(model)[1]
    model.init_weights()
    assert_loaded(model, {name: t for name, t in state.items() if not name.endswith('num_batches_tracked')},
                  but={name for name in state if name.endswith('num_batches_tracked')})
    after = split(model)[1]
    assert_factors(model, factors, after)
    logged = messages()
    assert 'base.pth' in logged and 'adapter' not in logged


@pytest.mark.parametrize('cfg, form, missing', [
    (RESNET, torchvision_form, 'layer2.0.conv1.weight'),
    (RESNET, torchvision_form, 'layer2.0.bn1.weight'),
    (RESNET, torchvision_form, 'layer2.0.bn1.running_var'),
    (SWIN, swin_form, 'stages.1.blocks.0.attn.w_msa.qkv.weight'),
    (SWIN, swin_form, 'stages.1.blocks.0.attn.w_msa.relative_position_bias_table'),
])
def test_other_backbones_that_lack_a_tensor(tmp_path, cfg, form, missing):
    state = random_state(cfg)
    del state[missing]
    torch.save(form(state), tmp_path / 'base.pth')
    with pytest.raises(RuntimeError, match=f'1 frozen tensors would stay random, among them {re.escape(missing)}'):
        build(cfg, tmp_path / 'base.pth').init_weights()


@pytest.mark.parametrize('cfg', [CONVNEXT, RESNET, SWIN], ids=['convnext', 'resnet', 'swin'])
def test_random_weights_are_initialised_as_always(cfg):
    """Without init_cfg nothing is loaded, and check_base() says so: LieRAHook asks it before training."""
    model = build(cfg)
    model.init_weights()
    assert not model.loaded_names
    with pytest.raises(RuntimeError, match='backbone is random: .*frozen tensors would stay random'):
        model.check_base('backbone is random')
    model.load_state_dict(random_state(cfg), strict=False)
    model.check_base('backbone is random')


def test_a_shared_pretrained_file_may_be_loaded_twice(tmp_path):
    torch.save(published(random_state(CONVNEXT)), tmp_path / 'base.pth')
    model = build(CONVNEXT, tmp_path / 'base.pth', 'backbone.')
    model.init_weights()
    before = split(model)
    model.init_weights()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(before, split(model)) for name in a)
    assert liera_mm.summary(model)


# The names of others

CONVNEXT_V1 = dict(CONVNEXT, layer_scale_init_value=.1, use_grn=False)


def authors_form(state):
    """A ConvNeXt as its authors publish it: their names, under the key ``model``, with a classifier."""
    names = {'depthwise_conv': 'dwconv', 'pointwise_conv1': 'pwconv1', 'pointwise_conv2': 'pwconv2', 'norm3': 'norm'}
    theirs = {}
    for name, tensor in state.items():
        if not re.match('norm[012]', name):
            key = '.'.join(names.get(part, part) for part in name.split('.'))
            theirs[key] = tensor[None, None, None] if 'grn' in key else tensor
    return dict(model={**theirs, 'head.weight': torch.rand(10, 32), 'head.bias': torch.rand(10)})


def timm_form(state):
    theirs = {}
    for name, tensor in state.items():
        if re.match('norm[012]', name):
            continue
        parts = name.split('.')
        if parts[0] == 'downsample_layers':
            parts = ['stem' if parts[1] == '0' else f'stages.{parts[1]}.downsample', *parts[2:]]
        elif parts[0] == 'stages':
            rest = {'depthwise_conv': 'conv_dw', 'pointwise_conv1': 'mlp.fc1', 'pointwise_conv2': 'mlp.fc2',
                    'grn': 'mlp.grn'}.get(parts[3], parts[3])
            leaf = [{'gamma': 'weight', 'beta': 'bias'}.get(leaf, leaf) if rest == 'mlp.grn' else leaf for leaf in parts[4:]]
            parts = ['stages', parts[1], 'blocks', parts[2], rest, *leaf]
        theirs['.'.join(['head', 'norm', parts[1]] if parts[0] == 'norm3' else parts)] = tensor
    return {**theirs, 'head.fc.weight': torch.rand(10, 32)}


def timm_features_form(state):
    return {re.sub(r'^(stem|stages)\.', r'\1_', name): tensor for name, tensor in timm_form(state).items()}


def sparse_form(state):
    """The self-supervised ConvNeXt-V2 of its authors, whose layers are MinkowskiEngine's."""
    theirs = {}
    for name, tensor in authors_form(state)['model'].items():
        leaf = name.rpartition('.')[2]
        if name.startswith('downsample_layers.0') or name.startswith(('head', 'norm')):
            theirs[f'encoder.{name}'] = tensor
        elif 'dwconv.weight' in name:
            theirs[f'encoder.{name[:-6]}kernel'] = tensor[:, 0].mT.reshape(len(tensor), -1).T
        elif re.match(r'downsample_layers.\d.1.weight', name):
            theirs[f'encoder.{name[:-6]}kernel'] = tensor.mT.reshape(*tensor.shape[:2], -1).permute(2, 1, 0)
        elif 'conv' in name and leaf == 'bias' and 'pwconv' not in name or re.match(r'downsample_layers.\d.1.bias', name):
            theirs[f'encoder.{name}'] = tensor[None]
        else:
            layer = 'linear.' if 'pwconv' in name else 'ln.' if 'norm' in name or 'downsample' in name else ''
            theirs[f'encoder.{name[:-len(leaf)]}{layer}{leaf}'] = tensor
    return dict(model={**theirs, 'mask_token': torch.rand(1, 4), 'decoder.0.dwconv.weight': torch.rand(4, 1, 7, 7)})


@pytest.mark.parametrize('around', [False, True], ids=['LieRAConvNeXt', 'LieRABackbone'])
@pytest.mark.parametrize('form, cfg', [(form, cfg) for form in (authors_form, timm_form, timm_features_form)
                                       for cfg in (CONVNEXT, CONVNEXT_V1)] + [(sparse_form, CONVNEXT)])
def test_convnext_of_others(tmp_path, form, cfg, around):
    state = random_state(cfg)
    torch.save(form(state), tmp_path / 'base.pth')
    if around:
        init_cfg = ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(dict(type='LieRABackbone', backbone=copy.deepcopy(cfg), liera=LIERA, init_cfg=init_cfg))
    else:
        model = build(cfg, tmp_path / 'base.pth')
    model.init_weights()
    norms = {name for name in state if re.match('norm[012]', name)}
    assert_loaded(model, {name: t for name, t in state.items() if name not in norms}, but=norms)


# What need not be loaded, and what must

def around(backbone, **kwargs):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(type='LieRABackbone', backbone=copy.deepcopy(backbone), liera=LIERA, **kwargs))


def test_init_cfg_of_the_outer_config(tmp_path):
    """Scripts set it to None there."""
    inner = dict(RESNET, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'nowhere.pth')))
    around(inner, init_cfg=None).init_weights()
    with pytest.raises(FileNotFoundError):
        around(inner).init_weights()
    with pytest.raises(FileNotFoundError, match='elsewhere'):  # as mmsegmentation's segmentors give it
        around(RESNET, pretrained='elsewhere.pth').init_weights()
    with pytest.raises(RuntimeError, match='LieRABackbone has no depth, base_channels; .*\n.*_delete_=True'):
        around(inner, depth=18, base_channels=4)


def test_a_checkpoint_without_a_type(tmp_path):
    pvt = dict(type='mmdet.PyramidVisionTransformer', num_layers=[1, 1, 1, 1], embed_dims=8, convert_weights=False)
    torch.save(random_state(pvt), tmp_path / 'base.pth')
    model = around(dict(pvt, init_cfg=ConfigDict(checkpoint=str(tmp_path / 'base.pth'))))
    model.init_weights()
    assert model.base_in_place() and model.frozen_base.source['checkpoint'] == str(tmp_path / 'base.pth')


def test_weights_that_are_resized_while_they_load(tmp_path):
    vit = dict(type='mmpretrain.VisionTransformer', patch_size=16,
               arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32))
    small, large = dict(vit, img_size=64), dict(vit, img_size=96)
    torch.save(random_state(small), tmp_path / 'base.pth')
    model = around(large, init_cfg=ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth')))
    model.init_weights()
    model.check_base('there')
    assert model.base_in_place()
    state = random_state(small)
    del state['patch_embed.projection.weight']
    torch.save(state, tmp_path / 'base.pth')
    with pytest.raises(RuntimeError, match='1 frozen tensors would stay random, among them patch_embed.projection.weight'):
        around(large, init_cfg=ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))).init_weights()


def test_offsets_of_a_deformable_backbone(tmp_path, messages):
    """The weights of a plain one lack them: they begin at zero, and train whole, or stay there if excluded."""
    dcn = dict(RESNET, depth=50, dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
               stage_with_dcn=(False, True, True, True))
    torch.save(random_state(dict(RESNET, depth=50)), tmp_path / 'base.pth')
    init_cfg = ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    model = around(dcn, init_cfg=init_cfg)
    model.init_weights()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and 'conv_offset' in name}
    assert trained == {name for name, _ in model.named_parameters() if 'conv_offset' in name} and trained
    assert 'have nothing but zeros for a weight, and train whole' in messages()
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(dict(type='LieRABackbone', backbone=dict(dcn, init_cfg=init_cfg),
                                  liera=dict(LIERA, exclude=['*.conv_offset'])))
    model.init_weights()
    assert not any(p.requires_grad for name, p in model.named_parameters() if 'conv_offset' in name)


class Named(nn.Module):
    """A backbone with modules and attributes of names that ours could have, and with a buffer that it computes."""
    loaded = True

    def __init__(self, init_cfg=None):
        super().__init__()
        self.init_cfg = init_cfg
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.ModuleDict(dict(adapter=nn.Conv2d(4, 4, 3)))
        self.base, self.units, self.record, self.versions = nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)), [], 2
        self.register_buffer('grid', torch.rand(4))

    def init_weights(self):
        PretrainedInit(self.init_cfg['checkpoint'])(self)


@pytest.mark.parametrize('missing', [None, 'block.adapter.weight'])
def test_a_module_called_adapter(tmp_path, missing):
    MODELS.register_module(name='TestNamed', module=Named, force=True)
    state = Named().state_dict()
    del state['grid']
    state.pop(missing, None)
    torch.save(state, tmp_path / 'base.pth')
    model = around(dict(type='mmengine.TestNamed', init_cfg=dict(checkpoint=str(tmp_path / 'base.pth'))))
    if missing is None:
        model.init_weights()
        assert model.loaded is True and model.units[0] and model.record == [] and model.versions == 2
        assert model.base_in_place() and model.base_record([model.state_dict()])['fingerprint'].keys() == state.keys()
        return
    with pytest.raises(RuntimeError, match='1 frozen tensors would stay random, among them block.adapter.weight'):
        model.init_weights()


class Composed(BaseModule):
    """A backbone around another one, whose weights its constructor loads, or an init_cfg of the other's own."""

    def __init__(self, file, way, init_cfg=None):
        super().__init__(init_cfg)
        inner = dict(RESNET, init_cfg=ConfigDict(type='Pretrained', checkpoint=file)) if way == 'init_cfg' else RESNET
        self.body, self.lateral = MODELS.build(inner), nn.Conv2d(4, 4, 1)
        if way != 'init_cfg':
            self.body.load_state_dict(torch.load(file), assign=way == 'assign')
            self.body.init_weights = lambda: None


@pytest.mark.parametrize('way', ['init_cfg', 'constructor', 'assign'])
def test_weights_of_a_part(tmp_path, way):
    """They count as loaded, and as not to be had again; what is new trains, or is refused."""
    MODELS.register_module(name='TestComposed', module=Composed, force=True)
    state = random_state(RESNET)
    torch.save(state, tmp_path / 'base.pth')
    cfg = dict(type='mmengine.TestComposed', file=str(tmp_path / 'base.pth'), way=way)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(dict(type='LieRABackbone', backbone=cfg, liera=dict(rank=2, train=['lateral'])))
        forgetful = MODELS.build(dict(type='LieRABackbone', backbone=cfg, liera=dict(rank=2)))
    for each in (model, forgetful):
        each.init_weights()
    assert_loaded(model, {f'body.{name}': tensor for name, tensor in state.items()}, but=['lateral.weight', 'lateral.bias'])
    model.check_base('there')
    assert not model.base_record([model.state_dict()])['fingerprint']
    with pytest.raises(RuntimeError, match=r'2 frozen tensors would stay random, among them lateral.weight(?s:.*)train='):
        forgetful.check_base('not there')
