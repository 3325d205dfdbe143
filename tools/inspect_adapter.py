#!/usr/bin/env python
"""Show what training did to each adapted layer: tools/inspect_adapter.py CHECKPOINT [CONFIG] [--out PNG].

Prints a table and draws it: rank and size of the weight's change, |Δ|, the error of the Taylor form, sign changes, and
where the factors outnumber the weights. CHECKPOINT is one of tools/train.py, whose config lies beside it, or an adapter
file, whose card it prints too.
"""
import argparse
import math
import re
import statistics
from pathlib import Path
from typing import List, Optional, Sequence

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
import liera_mm
from liera_mm.core.checkpoint import adapter_card
from liera_mm.core.errors import SetupError
from liera_mm.core.report import QUANTILES, LayerReport
from liera_mm.core.text import sizes, table_lines
from liera_mm.engine.checkpoint import load_adapter_file, load_trained
from liera_mm.engine.cli import check_checkpoint, check_weights, exit_clearly, load_config

# isort: split
import matplotlib
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn

matplotlib.use('Agg')
from matplotlib import pyplot as plt

# A colour and a marker for every kind of layer
KINDS = dict(conv=('#222222', 's'), depthwise=('#d55e00', 'o'), pointwise=('#0072b2', '^'), linear=('#009e73', 'D'))


def config_beside(checkpoint: Path) -> str:
    """The config that the training wrote into the folder of its checkpoint."""
    configs = sorted(checkpoint.parent.glob('*.py'))
    if len(configs) != 1:
        raise SetupError(f'{len(configs)} configs lie beside {checkpoint}', 'Say which one it was trained with')
    return str(configs[0])


def load_backbone(cfg: Config, checkpoint: Path) -> nn.Module:
    """The adapted backbone of a config, with the weights and perturbations of a checkpoint."""
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    model = MODELS.build(cfg.model)
    backbone = getattr(model, 'backbone', None)
    if not hasattr(backbone, 'liera'):
        raise SetupError(f'{cfg.filename} has no adapted backbone', 'Give the config that the checkpoint was trained with')
    if checkpoint.suffix != '.safetensors':
        load_trained(model, checkpoint, cfg.filename)
        return backbone
    check_weights(cfg)
    MMLogger.get_current_instance().setLevel('WARNING')  # MMEngine logs every tensor that it initialises
    backbone.init_weights()
    if cfg.get('load_from'):
        load_checkpoint(model, cfg.load_from, map_location='cpu')
    load_adapter_file(model, checkpoint, cfg.filename)
    return backbone


def by_depth(reports: List[LayerReport]) -> List[LayerReport]:
    """The reports in the order in which an image reaches the layers.

    It is the model's order, but for ConvNeXt, which lists its downsampling layers before the stages that they lead to.
    """

    def stage(row: LayerReport):
        found = re.match(r'(downsample_layers|stages)\.(\d+)\.', row.layer)
        return (int(found[2]), found[1]) if found else (-1, '')

    return sorted(reports, key=stage)


def table(reports: List[LayerReport]) -> str:
    """The reports as text, a row a layer, and what stands out in them."""
    quantiles = [f'{share:.0%}' for share in QUANTILES]
    rows = [['layer', 'kind', 'method', 'update', 'scale', 'n x m', 'rank', 'rank of Δ <=', 'change of W',
             *(f'|Δ| {share}' for share in quantiles), 'Taylor error', 'of ‖Δ‖', 'Δ <= -1', 'parameters', 'weights']]
    for row in reports:
        rows.append([
            row.layer, row.kind, row.method + (f' ({sizes(row.core)})' if row.core else ''), row.update, row.scale,
            sizes(row.matrix),
            '-' if row.rank is None else str(row.rank), str(row.delta_rank),
            number(row.relative_change, '.2%'), *(f'{value:.2e}' for value in row.delta_quantiles),
            number(row.taylor_error, '.2e'), number(row.relative_taylor_error, '.3%'), number(row.sign_change_share, '.4%'),
            f'{row.parameters:,}', f'{row.weights:,}'])
    return '\n'.join([*table_lines(rows), '', *findings(reports)])


def number(value: Optional[float], form: str) -> str:
    return '-' if value is None else format(value, form)


def findings(reports: List[LayerReport]) -> List[str]:
    """Sentences on the whole of the layers."""
    count = len(reports)
    full = sum(row.rank == min(row.matrix) for row in reports)
    above = sum(row.rank is not None and row.rank > row.delta_rank for row in reports)
    outnumbered = [row for row in reports if row.parameters > row.weights]
    lines = [f'Rank of the change: min(n, m) in {full} of {count} layers, above the rank that Δ can have in {above}']
    if outnumbered:
        kinds = ', '.join(sorted({row.kind for row in outnumbered}))
        lines.append(f'Parameters outnumber the weights in {len(outnumbered)} layers ({kinds}): '
                     f'{sum(row.parameters for row in outnumbered):,} for {sum(row.weights for row in outnumbered):,}')
    taylor = [row for row in reports if row.sign_change_share is not None]
    if taylor:
        changed = sum(round(row.sign_change_share * row.weights) for row in taylor)
        lines.append(f'Sign changes (Δ <= -1): {changed:,} of {sum(row.weights for row in taylor):,} weights')
    changes = {kind: [row.relative_change for row in reports if row.kind == kind and row.relative_change is not None]
               for kind in KINDS}
    medians = ', '.join(f'{kind} {statistics.median(shares):.2%}' for kind, shares in changes.items() if shares)
    if medians:
        lines.append(f"Change of W, ‖W' - W‖ / ‖W‖, in the median layer: {medians}")
    return lines


def draw(reports: List[LayerReport], title: str, out: Path) -> None:
    """Draw the reports as panels above each other, a column a layer."""
    panels = [draw_rank, draw_change, draw_delta]
    if any(row.taylor_error is not None for row in reports):
        panels.append(draw_taylor_error)
    if any(row.sign_change_share is not None for row in reports):
        panels.append(draw_sign_changes)
    panels.append(draw_parameters)
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False})
    figure, axes = plt.subplots(len(panels), figsize=(13, .8 + 1.9 * len(panels)), sharex=True, layout='constrained')
    figure.suptitle(title, fontsize=12, fontweight='bold', x=.01, ha='left')
    for panel, ax in zip(panels, axes):
        panel(ax, reports)
        ax.grid(axis='y', color='#e4e4e4')
        ax.set_axisbelow(True)
        ax.tick_params(axis='x', length=0)
        for left in boundaries(reports):
            ax.axvline(left - .5, color='#d0d0d0', linewidth=.8, zorder=0)
    label_groups(axes[-1], reports)
    handles = [plt.Line2D([], [], color=colour, marker=marker, linestyle='', label=kind)
               for kind, (colour, marker) in KINDS.items() if kind in {row.kind for row in reports}]
    figure.legend(handles=handles, loc='outside upper right', ncols=len(handles), frameon=False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def scatter(ax, reports: List[LayerReport], values: Sequence[float]) -> None:
    """One marker a layer, in the colour and shape of its kind."""
    for kind, (colour, marker) in KINDS.items():
        points = [(x, value) for x, (row, value) in enumerate(zip(reports, values)) if row.kind == kind]
        ax.scatter(*zip(*points) if points else ([], []), s=16, color=colour, marker=marker, zorder=3, clip_on=False)


def heading(ax, text: str) -> None:
    ax.set_title(text, loc='left', fontsize=10)


def legend_above(ax) -> None:
    ax.legend(loc='lower right', bbox_to_anchor=(1, .97), ncols=2, frameon=False)


def log_scale(ax, values: Sequence[float]) -> None:
    """A logarithmic axis of whole decades around the values; those that are not positive are left out."""
    exponents = [math.log10(value) for value in values if value and 0 < value < math.inf] or [0.]
    ax.set_ylim(10**math.floor(min(exponents)), 10**math.ceil(max(exponents) + .01))
    ax.set_yscale('log', nonpositive='mask')
    ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def draw_rank(ax, reports: List[LayerReport]) -> None:
    full = [min(row.matrix) for row in reports]
    nan = float('nan')
    ax.scatter(range(len(reports)), [row.delta_rank / n for row, n in zip(reports, full)], s=50, color='#888888', marker='_',
               label='the largest rank Δ can have')
    scatter(ax, reports, [nan if row.rank is None else row.rank / n for row, n in zip(reports, full)])
    ax.set_ylim(0, 1.05)
    ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    legend_above(ax)
    heading(ax, "Rank of the weight's change, % of min(n, m)")


def draw_change(ax, reports: List[LayerReport]) -> None:
    changes = [float('nan') if row.relative_change is None else row.relative_change for row in reports]
    scatter(ax, reports, changes)
    log_scale(ax, changes)
    heading(ax, "Change of the weight, ‖W' - W‖ / ‖W‖")


def draw_delta(ax, reports: List[LayerReport]) -> None:
    x = range(len(reports))
    median, high, higher, largest = zip(*(row.delta_quantiles for row in reports))
    for low, top, opacity, label in ((median, high, .5, '50 to 90 %'), (high, higher, .25, '90 to 99 %')):
        ax.bar(x, [t - b for b, t in zip(low, top)], 1, low, color='#0072b2', alpha=opacity, linewidth=0, label=label)
    scatter(ax, reports, largest)
    log_scale(ax, [*median, *largest])
    legend_above(ax)
    unit = 'units of the weight' if all(row.update == 'additive' for row in reports) else 'relative to the weight'
    heading(ax, f'|Δ|, {unit}: quantiles of the entries, and the largest (markers)')


def draw_taylor_error(ax, reports: List[LayerReport]) -> None:
    errors = [float('nan') if row.relative_taylor_error is None else row.relative_taylor_error for row in reports]
    scatter(ax, reports, errors)
    log_scale(ax, errors)
    heading(ax, 'Error of the Taylor form, ‖exp(Δ) - 1 - Δ‖ / ‖Δ‖')


def draw_sign_changes(ax, reports: List[LayerReport]) -> None:
    shares = [float('nan') if row.sign_change_share is None else row.sign_change_share for row in reports]
    scatter(ax, reports, shares)
    ax.set_ylim(0, 1.1 * max([.001, *shares]))
    ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    heading(ax, 'Sign changes, % of the weights (Δ <= -1 under taylor)')


def draw_parameters(ax, reports: List[LayerReport]) -> None:
    ax.axhline(1, color='#888888')
    ratios = [row.parameters / row.weights for row in reports]
    scatter(ax, reports, ratios)
    log_scale(ax, ratios)
    heading(ax, 'Trained parameters per weight: above the line they outnumber the weights')


def group(row: LayerReport) -> str:
    return '.'.join(row.layer.split('.')[:2])


def boundaries(reports: List[LayerReport]) -> List[int]:
    """Where the part of the network that a layer is in changes: the indices of the first layers."""
    return [x for x in range(len(reports)) if x == 0 or group(reports[x]) != group(reports[x - 1])]


def label_groups(ax, reports: List[LayerReport]) -> None:
    """Name the parts of the network that are wide enough for their names."""
    edges = [*boundaries(reports), len(reports)]
    wide = [(left, right) for left, right in zip(edges, edges[1:]) if right - left > .04 * len(reports)]
    ax.set_xticks([(left + right - 1) / 2 for left, right in wide], [group(reports[left]) for left, _ in wide])
    ax.set_xlim(-.5, len(reports) - .5)
    ax.set_xlabel(f'{len(reports)} adapted layers, in the order in which an image reaches them')


def main() -> None:
    parser = argparse.ArgumentParser(description='Show what training did to each adapted layer')
    parser.add_argument('checkpoint', type=Path, help='checkpoint of tools/train.py, or adapter file (.safetensors)')
    parser.add_argument('config', nargs='?', help='config that it was trained with; default: the one beside the checkpoint')
    parser.add_argument('--out', type=Path, help='picture to write; default: beside the checkpoint, .png')
    args = parser.parse_args()
    out = args.out or args.checkpoint.with_suffix('.png')
    if out.suffix != '.png':
        parser.error(f'--out must be a .png file, not {out}')
    check_checkpoint(str(args.checkpoint))
    cfg = load_config(args.config or config_beside(args.checkpoint))
    backbone = load_backbone(cfg, args.checkpoint)
    if args.checkpoint.suffix == '.safetensors':
        print(adapter_card(args.checkpoint))
    reports = by_depth(liera_mm.layer_reports(backbone))
    print(table(reports))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(reports, f'{args.checkpoint.name} of {Path(cfg.filename).stem}', out)
    print(f'\nDrawn in {out}')


if __name__ == '__main__':
    exit_clearly(main)
