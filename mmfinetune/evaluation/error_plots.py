"""Pictures of errors as PNG bytes: TIDE's kinds of error, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmfinetune.evaluation import plots
from mmfinetune.evaluation.coco_eval import TIDE_ERRORS, Tide
from mmfinetune.evaluation.confusion import NOTHING
from mmfinetune.evaluation.stats import KINDS

_MOST_NAMES = 120
_CELLS_WITH_NUMBERS = 30  # classes; with more the numbers would be too small to read


def tide_picture(tides: Mapping[str, Tide]) -> bytes:
    """Bars of how much AP50 would rise without the errors of each kind, with their counts; masks, boxes or both."""
    figure, (axes,) = plots.new_figure(8.5, 1.6 + 0.42 * len(TIDE_ERRORS) * (0.5 + len(tides) / 2))
    thick = 0.8 / len(tides)
    handles = []
    widest = max([0.05, *(v for t in tides.values() for v in t.d_ap.values())])
    for number, tide in enumerate(tides.values()):
        places = np.arange(len(TIDE_ERRORS)) + (number - (len(tides) - 1) / 2) * thick
        handles.append(axes.barh(places, list(tide.d_ap.values()), 0.9 * thick, color=plots.COLOURS[number]))
        for place, error in zip(places, TIDE_ERRORS, strict=True):
            text = f'{tide.d_ap[error]:.3f}   ({tide.counts[error]:,})'
            axes.text(max(0, tide.d_ap[error]) + 0.012 * widest, place, text, **plots.NOTE)
    labels = [f'{error}: {meaning}' for error, meaning in TIDE_ERRORS.items()]
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set(xlim=(0, 1.3 * widest), ylim=(len(labels) - 0.4, -0.6), xlabel='rise of AP50 if fixed (number of errors)')
    plots.bar_style(axes)
    figure.suptitle('TIDE errors: ' + ', '.join(f'{KINDS[kind]} AP50 {tide.ap50:.3f}' for kind, tide in tides.items()))
    if len(tides) > 1:
        plots.legend(figure, handles, [KINDS[kind] for kind in tides], loc='outside lower center', ncols=2)
    return plots.png(figure)


def confusion_picture(matrix: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """The confusion matrix; colours are shares of a row, numbers are counts.

    Args:
        matrix: (K + 1, K + 1) counts, see `confusion.Matches.confusion`.
        names: K class names.
    """
    from matplotlib.colors import PowerNorm

    count = len(matrix)
    names = [*plots.legible(names), NOTHING]
    numbers = count <= _CELLS_WITH_NUMBERS + 1
    # Names of 6 pt need 0.11 inches a row; of very many classes only some are named.
    step = -(-count // _MOST_NAMES)
    cell, size = (0.36, 8) if numbers else (max(0.115 / step, 8 / count), 6)
    side = max(3.2, 2.2 + cell * count + 0.05 * max(map(len, names)))
    figure, (axes,) = plots.new_figure(side + 0.7, side, dpi=plots.DPI if numbers else 150)
    sums = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, sums, out=np.zeros(matrix.shape), where=sums > 0)
    # By the root, since even rare confusions are to be seen.
    image = axes.imshow(shares, cmap='Blues', norm=PowerNorm(0.5, 0, 1))
    axes.set_xticks(range(0, count, step), names[::step], rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(0, count, step), names[::step], fontsize=size, parse_math=False)
    axes.set(xlabel='predicted', ylabel='true')
    axes.set_title(title, fontsize=10)
    # Between the cells, and stronger before those of the background.
    if step == 1:
        axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
        axes.grid(which='minor', color='#dddddd', linewidth=0.5)
    axes.axhline(count - 1.5, color='#888888', linewidth=1)
    axes.axvline(count - 1.5, color='#888888', linewidth=1)
    axes.tick_params(which='both', length=0)
    if numbers:
        for y, x in np.argwhere(matrix):
            text = f'{matrix[y, x]}' if matrix[y, x] < 10000 else f'{matrix[y, x]:.0e}'
            colour = 'white' if shares[y, x] > 0.3 else 'black'
            axes.text(x, y, text, ha='center', va='center', fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.6, label='share of the row')
    return plots.png(figure)
