#!/usr/bin/env python
"""Find the adapter nearest to trained weights: tools/extract.py CONFIG CHECKPOINT OUT.

CHECKPOINT is one of a full fine-tuning, or of tools/merge.py; CONFIG says which adapter is wanted and on which base. OUT is
a checkpoint (.pth) that tools/test.py takes with CONFIG, or the adapter of the backbone alone (.safetensors). Prints how
much of the change from the base is left in every layer.
"""
import argparse
from pathlib import Path

from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict, save_checkpoint

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.core.extract import extract
from liera_mm.core.text import table_lines
from liera_mm.engine.checkpoint import leave_out_base, named_as_in
from liera_mm.engine.cli import check_checkpoint, check_weights, exit_clearly, load_config
from liera_mm.engine.files import check_out
from liera_mm.engine.safe_loading import read_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description='Find the adapter nearest to trained weights')
    parser.add_argument('config', help='config with the wanted adapter and its base')
    parser.add_argument('checkpoint', help='checkpoint of a full fine-tuning, or of tools/merge.py')
    parser.add_argument('out', type=Path, help='checkpoint (.pth) or adapter of the backbone (.safetensors) to write')
    parser.add_argument('--steps', type=int, default=200, help='steps of L-BFGS for each layer, at most')
    args = parser.parse_args()
    if args.out.suffix not in ('.pth', '.safetensors'):
        parser.error(f'out must be a .pth or .safetensors file, not {args.out}')
    check_checkpoint(args.checkpoint)
    check_out([args.out], args.checkpoint)
    cfg = load_config(args.config)
    check_weights(cfg)
    checkpoint = read_checkpoint(args.checkpoint, 'cpu')
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    MMLogger.get_current_instance().setLevel('WARNING')  # MMEngine logs every tensor that it initialises
    model = MODELS.build(cfg.model)
    model.init_weights()
    if not hasattr(model.backbone, 'liera'):
        raise SetupError(f'{args.config} has no adapted backbone', 'Give its backbone a liera=dict(...)')
    state = named_as_in(model, checkpoint.get('state_dict', checkpoint))
    weights = {key[len('backbone.'):]: tensor for key, tensor in state.items() if key.startswith('backbone.')}
    try:
        fits = extract(model.backbone, weights, args.steps)
        rest = {key: tensor for key, tensor in state.items() if not key.startswith('backbone.')}
        load_state_dict(model, {**model.backbone.state_dict(prefix='backbone.'), **rest}, strict=True)
    except (ValueError, RuntimeError) as error:
        raise SetupError(f'{args.checkpoint} does not fit {args.config}: {str(error).splitlines()[-1]:.300}',
                         'Give plain weights of the same detector: of a full fine-tuning or of tools/merge.py') from None

    rows = [('tensor', 'change', 'left', 'residual')]
    rows += [(fit.name, f'{fit.change:.3e}', f'{fit.left:.3e}', f'{fit.residual:.2%}') for fit in fits]
    change, left = (sum(values) ** .5 for values in zip(*((fit.change**2, fit.left**2) for fit in fits)))
    rows.append(('all', f'{change:.3e}', f'{left:.3e}', f'{left / change if change else 0.:.2%}'))
    print('\n'.join(table_lines(rows)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix == '.safetensors':
        note = f'It was extracted from {Path(args.checkpoint).name}.'
        liera_mm.save_adapter(model.backbone, args.out, card=dict(notes=[note]))
    else:
        meta = {key: value for key, value in checkpoint.get('meta', {}).items() if key != 'cfg'}
        out = dict(state_dict=model.state_dict(), meta=meta)
        leave_out_base(model, out)
        save_checkpoint(out, str(args.out), backend_args=dict(backend='checkpoints'))
    print(f'{args.out} is the adapter; test it with {args.config}')


if __name__ == '__main__':
    exit_clearly(main)
