"""Tables and pictures of the results of tools/analysis_tools/study.py."""
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from study_run import METHODS, Run, config_of, kept_checkpoint, work_dir

# isort: split
import matplotlib
from mmdet.evaluation import DumpDetResults
from mmengine.runner import Runner

from liera_mm.engine.sheet import draw_sheet

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

BBOX, SEGM = 'coco/bbox_mAP', 'coco/segm_mAP'
NOTE = 'Mean of the seeds (lowest to highest).'


class Setting(NamedTuple):
    """Everything but world and seed that tells one run from another; the options as text."""
    method: str
    lr: float
    rank: Optional[int]
    alpha: Optional[float]
    options: str


class Cell(NamedTuple):
    """A setting in one world: its results, one a seed."""
    setting: Setting
    results: List[Dict[str, Any]]

    def values(self, metric: str = BBOX, of: str = 'metrics') -> List[float]:
        return [result[of][metric] for result in self.results if result.get(of)]

    @property
    def mean(self) -> float:
        return mean(self.values())

    def middle(self, key: str) -> Optional[float]:
        """Median of what was measured, None if it was not."""
        known = [result[key] for result in self.results if result[key] is not None]
        return median(known) if known else None

    @property
    def loss(self) -> float:
        """What the training ended with: mean of the last tenth of its steps."""
        return mean(loss for result in self.results for _, loss in result['curve'][-max(1, len(result['curve']) // 10):])

    @property
    def trained(self) -> int:
        return self.results[0]['trained']

    @property
    def share(self) -> float:
        """Trained parameters as a part of those that the backbone had before it was adapted."""
        return self.trained / self.results[0]['backbone']


def group(results: Sequence[Dict[str, Any]]) -> Dict[str, List[Cell]]:
    """The results of every world by setting, methods in the order of their table."""
    cells: Dict[str, Dict[Setting, list]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        options = ' '.join(f'{key}={value}' for key, value in sorted(result['options'].items()))
        cells[result['world']][Setting(*(result[key] for key in Setting._fields[:4]), options)].append(result)
    order = list(METHODS)
    return {world: [Cell(setting, found) for setting, found in sorted(
        settings.items(), key=lambda item: (order.index(item[0].method), item[0].options, item[0].rank or 0,
                                            item[0].alpha or 0, item[0].lr))] for world, settings in cells.items()}


def best_cells(cells: Sequence[Cell]) -> Dict[str, Cell]:
    """The best setting of each method: the highest mean of those with the most seeds."""
    best: Dict[str, Cell] = {}
    for cell in cells:
        other = best.get(cell.setting.method)
        if other is None or (len(cell.results), cell.mean) > (len(other.results), other.mean):
            best[cell.setting.method] = cell
    return best


def spread(values: Sequence[float]) -> str:
    return f'{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})' if values else '-'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return '\n'.join(f'| {" | ".join(row)} |' for row in [header, ['---'] * len(header), *rows])


def show(value: Optional[float], digits: int = 0) -> str:
    return '-' if value is None else f'{value:,.{digits}f}'


def columns_of(setting: Setting) -> List[str]:
    alpha = '-' if setting.alpha is None else f'{setting.alpha:g}'
    return [setting.method, f'{setting.lr:g}', str(setting.rank or '-'), alpha, setting.options or '-']


def best_table(cells: Sequence[Cell]) -> str:
    """A world's methods, each in its best setting."""
    best = best_cells(cells)
    segm = SEGM in cells[0].results[0]['metrics']
    test = any(cell.values(of='test_metrics') for cell in cells)
    full = best.get('full')
    header = ['method', 'lr', 'rank', 'alpha', 'options', 'trained in the backbone', 'share', 'bbox mAP',
              *(['segm mAP'] if segm else []), *(['test bbox mAP'] if test else []), 'of full', 'seeds', 'train loss',
              'ms a step', 'peak GiB', 's']
    rows = [[
        *columns_of(cell.setting), f'{cell.trained:,}', f'{cell.share:.1%}', spread(cell.values()),
        *([spread(cell.values(SEGM))] if segm else []), *([spread(cell.values(of='test_metrics'))] if test else []),
        f'{cell.mean / full.mean:.3f}' if full and full.mean else '-',
        str(len(cell.results)), f'{cell.loss:.3f}', show(cell.middle('step_ms'), 1), show(cell.middle('peak_gib'), 2),
        show(cell.middle('seconds'))
    ] for cell in best.values()]
    return table(header, rows)


def common_table(worlds: Dict[str, List[Cell]]) -> str:
    """The settings that were tried in every world, by their mean share of the best full fine-tuning."""
    full = {world: best_cells(cells)['full'].mean for world, cells in worlds.items() if 'full' in best_cells(cells)}
    by_setting: Dict[Setting, Dict[str, Cell]] = defaultdict(dict)
    for world, cells in worlds.items():
        for cell in cells:
            by_setting[cell.setting][world] = cell
    rows: List[Tuple[float, List[str]]] = []
    for setting, found in by_setting.items():
        if len(found) < len(worlds) or len(full) < len(worlds) or not all(full.values()):
            continue
        shares = [found[world].mean / full[world] for world in worlds]
        rows.append((mean(shares), [*columns_of(setting), *(
            f'{spread(found[world].values())}, {share:.3f}' for world, share in zip(worlds, shares)), f'{mean(shares):.3f}',
            '/'.join(str(len(found[world].results)) for world in worlds)]))
    header = ['method', 'lr', 'rank', 'alpha', 'options', *(f'{world}: bbox mAP, of full' for world in worlds),
              'mean of full', 'seeds']
    return table(header, [row for _, row in sorted(rows, key=lambda row: -row[0])])


def settings_table(cells: Sequence[Cell]) -> str:
    rows = [[*columns_of(cell.setting), spread(cell.values()), str(len(cell.results)), f'{cell.loss:.3f}'] for cell in cells]
    return table(['method', 'lr', 'rank', 'alpha', 'options', 'bbox mAP', 'seeds', 'train loss'], rows)


# Pictures

def style(method: str) -> Dict[str, Any]:
    """Colour and marker of a method, the same in all pictures."""
    index = list(METHODS).index(method)
    return dict(color=plt.get_cmap('turbo')(index / len(METHODS)), marker='osD^v<>PX*h'[index % 11], label=method)


def panels(worlds: Dict[str, List[Cell]], draw, xlabel: str, file: Path) -> None:
    """A picture with a panel for each world."""
    figure, axes = plt.subplots(1, len(worlds), figsize=(1 + 4 * len(worlds), 4), squeeze=False, layout='constrained')
    labels: Dict[str, Any] = {}
    for axis, (world, cells) in zip(axes[0], worlds.items()):
        draw(axis, cells)
        best = best_cells(cells)
        for method, line in (('full', '-'), ('frozen', ':')):
            if method in best:
                axis.axhline(best[method].mean, color='black', linestyle=line, linewidth=1, label=f'{method}, at its best')
        axis.set(title=world, xlabel=xlabel)
        axis.grid(alpha=.3)
        labels.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels())})
    axes[0][0].set_ylabel('bbox mAP')
    if labels:
        figure.legend(labels.values(), labels.keys(), loc='outside right center', fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def curves(axis, cells: Sequence[Cell], key: str) -> None:
    """mAP against alpha or rank, all else the same: of each method where most is known; bars from lowest to highest seed."""
    lines: Dict[Setting, Dict[float, Cell]] = defaultdict(dict)
    for cell in cells:
        if (x := getattr(cell.setting, key)) is not None and not cell.setting.options:
            lines[cell.setting._replace(**{key: None})][x] = cell
    for method in METHODS:
        points = max((line for rest, line in lines.items() if rest.method == method), default={},
                     key=lambda line: (len(line), sum(len(cell.results) for cell in line.values())))
        if len(points) > 1:
            xs = sorted(points)
            ys = [points[x].mean for x in xs]
            below = [points[x].mean - min(points[x].values()) for x in xs]
            above = [max(points[x].values()) - points[x].mean for x in xs]
            axis.errorbar(xs, ys, yerr=[below, above], capsize=2, linewidth=1.2, markersize=4, **style(method))
    axis.set_xscale('log', base=2)
    axis.xaxis.set_major_formatter('{x:g}')


def against_parameters(axis, cells: Sequence[Cell]) -> None:
    for method, cell in best_cells(cells).items():
        if cell.trained:
            axis.errorbar(100 * cell.share, cell.mean, capsize=2, linestyle='none', markersize=6,
                          yerr=[[cell.mean - min(cell.values())], [max(cell.values()) - cell.mean]], **style(method))
    axis.set_xscale('log')
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter('{x:g}')
    axis.xaxis.set_minor_formatter(NullFormatter())


def write_report(results: Sequence[Dict[str, Any]], out: Path) -> str:
    """Write ``report.md``, ``alpha.png``, ``rank.png`` and ``parameters.png``; returns the text."""
    worlds = group(results)
    devices = sorted({f'{result["device"]}, {result["jobs"]} at a time, torch {result["torch"]}' for result in results})
    text = ['# Results of tools/analysis_tools/study.py', f'{len(results)} runs ({"; ".join(devices)}). {NOTE}',
            '"of full": the mean as a part of that of full fine-tuning at its best. Time and memory are medians.']
    for world, cells in worlds.items():
        text += [f'## {world}: each method at its best', 'The highest mean of the settings with the most seeds.',
                 best_table(cells)]
    text += ['## One setting in all worlds', common_table(worlds)]
    for world, cells in worlds.items():
        text += [f'## {world}: every setting', settings_table(cells)]
    panels(worlds, lambda axis, cells: curves(axis, cells, 'alpha'), 'alpha', out / 'alpha.png')
    panels(worlds, lambda axis, cells: curves(axis, cells, 'rank'), 'rank, at one alpha', out / 'rank.png')
    panels(worlds, against_parameters, 'trained parameters of the backbone, %', out / 'parameters.png')
    content = '\n\n'.join(text) + '\n'
    (out / 'report.md').write_text(content)
    return content


def write_sheet(run: Run, out: Path, data: str, images: int) -> Path:
    """Validate a run that was kept, and draw its predictions beside the ground truth."""
    cfg = config_of(run, data)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    folder = work_dir(out, run)
    cfg.work_dir, cfg.load_from = str(folder / 'test'), kept_checkpoint(out, run)
    cfg.experiment_name = cfg.visualizer.name = f'sheet_{run.world}_{run.name}'
    runner = Runner.from_cfg(cfg)
    predictions = folder / 'predictions.pkl'
    runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=str(predictions)))
    runner.test()
    root = Path(cfg.data_root)
    small = cfg.test_dataloader.dataset.pipeline[1]['scale'][0] < 320
    file = out / f'sheet_{run.world}_{run.name}.jpg'
    draw_sheet(predictions, root, file, images, columns=3 if small else 2, zoom=3 if small else 1)
    return file
