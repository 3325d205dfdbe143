"""A picture of every Δ for the backends of MMEngine's visualizer: all take pictures, few take histograms."""
from typing import List, Tuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.visualization import LocalVisBackend, Visualizer
from torch import nn

from ..core.report import delta_histograms

EDGES = np.linspace(-6, 1, 57)  # of the bins: powers of ten


def add_delta_picture(visualizer: Visualizer, model: nn.Module, step: int) -> None:
    """Give the histograms of a model's |Δ| to TensorBoard, W&B, MLflow and the like; local files alone do without."""
    if any(not isinstance(backend, LocalVisBackend) for backend in visualizer._vis_backends.values()):
        visualizer.add_image('liera_delta', draw_deltas(delta_histograms(model, EDGES.tolist())), step)


def draw_deltas(histograms: List[Tuple[str, List[float]]]) -> np.ndarray:
    """A row of colours for each layer, from first to last, as an image of (H, W, 3) in RGB.

    Args:
        histograms: What :func:`~liera_mm.core.report.delta_histograms` gives for :data:`EDGES`.
    """
    names, shares = zip(*histograms)
    figure = Figure(figsize=(9, 2 + .16 * len(names)), layout='constrained')
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    colours = axes.pcolormesh(EDGES, np.arange(len(names) + 1), 100 * np.array(shares), cmap='viridis')
    axes.set_yticks(np.arange(len(names)) + .5, names, fontsize=7)
    axes.set_xticks(range(-6, 2), [f'{10.**power:g}' for power in range(-6, 2)])
    axes.invert_yaxis()
    axes.set_xlabel('|Δ|; what is smaller or larger is in the outermost bins')
    figure.colorbar(colours, label='% of the entries')
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
