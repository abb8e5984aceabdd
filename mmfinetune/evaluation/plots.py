"""Figures of runs as PNG bytes: curves over epochs, AP of each class; and the style they share."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.evaluation.stats import KINDS, PREFIX, STATS
from mmfinetune.utils import fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mmfinetune.evaluation.history import History


# Okabe and Ito's colours, distinct with any kind of colour vision; yellow is too faint on white.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
# Another number than of the colours, so that lines that share a colour differ in the marker.
MARKERS = ('o', 's', '^', 'D', 'v', 'X', 'P', '*')
DPI = 110
# Style of the numbers next to bars.
NOTE: dict[str, Any] = {'va': 'center', 'fontsize': 8, 'color': '#444444'}
_LONGEST = 40  # characters of a name that fit next to a bar
_UNKNOWN = '\u25a1'  # a square, for a letter that no font here has
_BARS_PER_COLUMN = 60
# Agg draws no more than 2^16 px along a side.
_TALLEST = 2**16 / DPI - 8


def title_of(metric: str) -> str:
    """``mask AP50`` for ``coco/segm_mAP_50``; other metrics keep their name."""
    titles = {f'{PREFIX}{k}_{s}': f'{word} {STATS[s][0]}' for k, word in KINDS.items() for s in STATS}
    return titles.get(metric, metric)


def legible(names: Sequence[str]) -> list[str]:
    """The names as the fonts of this machine can write them.

    A letter without a glyph becomes a square, and the name then begins with its number, counted
    from 0, so that names stay apart. Long names are cut.
    """
    texts = []
    for number, name in enumerate(names):
        name = ' '.join(name.split())
        if len(name) > _LONGEST:
            name = f'{name[: _LONGEST - 1]}…'
        text = _writable(name)
        texts.append(text if text and text == name else f'#{number} {text}'.rstrip())
    return texts


def _writable(text: str) -> str:
    """The text with a square for each letter that no font here has, without invisible ones."""
    return ''.join(
        char if _has_glyph(char) else _UNKNOWN
        for char in text
        if _has_glyph(char) or unicodedata.category(char) not in ('Cc', 'Cf', 'Cs', 'Mn', 'Me')
    )


@functools.cache
def _has_glyph(char: str) -> bool:
    from matplotlib.font_manager import findfont, get_font

    return any(get_font(findfont(family)).get_char_index(ord(char)) for family in _families())


@functools.cache
def _families() -> list[str]:
    """Matplotlib's own font, then those on this machine with Chinese, Japanese and Korean letters."""
    from matplotlib import rcParams
    from matplotlib.font_manager import findSystemFonts, fontManager, get_font

    # Matplotlib's list of fonts is kept from its first use on this machine.
    known = {font.fname for font in fontManager.ttflist}
    for path in set(findSystemFonts()) - known:
        with contextlib.suppress(OSError, RuntimeError):  # not a readable font
            fontManager.addfont(path)
    own = fontManager.findfont(rcParams['font.sans-serif'][0])
    names = {Path(font.fname).name: font.name for font in fontManager.ttflist}
    # By its content: through links its path, and even its name, is not that of the list.
    return [get_font(own).family_name, *(names[file] for file in fonts.WIDE_FONTS if file in names)]


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, dpi: int = DPI
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches, and its panels row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand: pyplot would choose a backend and keep global state.
    figure = Figure(figsize=(width, height), dpi=dpi, layout='constrained')
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def png(figure: Figure) -> bytes:
    """Draw a figure of `new_figure`."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    # Existing ones, and ticks that drawing makes.
    for text in figure.findobj(Text):
        text.set_fontfamily(_families())
    out = io.BytesIO()
    with rc_context({'font.family': _families()}):
        figure.savefig(out, format='png')
    return out.getvalue()


def lines(axes: Axes, curves: Sequence[Mapping[int, float]], title: str, xlabel: str) -> list:
    """Draw curves into a panel.

    Args:
        curves: Values by place on the x axis; values that are not finite leave a gap.
        xlabel: Label of the x axis, whose ticks are integers.

    Returns:
        The lines, for a legend.
    """
    from matplotlib.ticker import MaxNLocator

    handles = []
    for number, curve in enumerate(curves):
        style: dict[str, Any] = {'color': COLOURS[number % len(COLOURS)], 'marker': MARKERS[number % len(MARKERS)]}
        # Markers of a long history would hide its line.
        # A curve shows on both sides of those that are equal and drawn over it.
        over = sum(_are_equal(curve, other) for other in curves[number + 1 :])
        style |= {'linewidth': 1.8 + 2.4 * over, 'markersize': 5.5 + 4 * over}
        style['markevery'] = math.ceil(len(curve) / 20) or 1
        handles += axes.plot(list(curve), list(curve.values()), **style)
    axes.set_title(_writable(title), parse_math=False)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    return handles


def _are_equal(curve: Mapping[int, float], other: Mapping[int, float]) -> bool:
    """Whether two curves look the same where both have values."""
    both = [(value, other[x]) for x, value in curve.items() if math.isfinite(value + other.get(x, math.nan))]
    return bool(both) and all(math.isclose(a, b, rel_tol=0.01) for a, b in both)


def bar_style(axes: Axes) -> None:
    """Give a panel of horizontal bars a vertical grid behind them, and no frame."""
    axes.grid(axis='x', alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis='y', length=0)
    axes.spines[['top', 'right']].set_visible(False)


def legend(place: Figure | Axes, handles: Sequence, names: Sequence[str], **kwargs) -> None:
    """A legend without frame; names may hold any text."""
    # An invisible mark in front, since matplotlib leaves out names that begin with `_`.
    labels = [f'\u200b{name}' if name.startswith('_') else name for name in names]
    for text in place.legend(handles, labels, frameon=False, **kwargs).get_texts():
        text.set_parse_math(False)  # a `$` in a name is no formula


def curves(history: History) -> bytes:
    """Loss, AP and learning rates of a run over its epochs (or iterations) as PNG.

    A panel without values is left out; a run without any row gives an empty pair of axes.
    """
    panels = [(title, {name: c for name, c in panel.items() if c}, log) for title, panel, log in _panels(history)]
    panels = [panel for panel in panels if panel[1]] or [('loss', {}, False)]
    figure, places = new_figure(5 * len(panels), 4.4, columns=len(panels))
    for axes, (title, found, log) in zip(places, panels, strict=True):
        handles = lines(axes, list(found.values()), title, history.unit)
        if log and all(value > 0 for curve in found.values() for value in curve.values()):
            axes.set_yscale('log')
        if handles:
            legend(axes, handles, legible(list(found)), loc='upper center', ncols=2, bbox_to_anchor=(0.5, -0.14))
    return png(figure)


def _panels(history: History) -> list[tuple[str, dict[str, dict[int, float]], bool]]:
    """Title, curves by name and whether the y axis is logarithmic."""
    groups = [name for name in history.columns() if name.startswith('lr/')] or ['lr']
    rates = {name.removeprefix('lr/'): history.curve(name) for name in groups}
    aps = ('coco/bbox_mAP', 'coco/segm_mAP', 'coco/segm_mAP_50')
    return [
        ('loss', {'training': history.curve('train/loss'), 'validation': history.curve('val/loss')}, False),
        # -1 stands for no ground truth.
        ('AP', {title_of(name): {x: v for x, v in history.curve(name).items() if v >= 0} for name in aps}, False),
        ('learning rate', rates, True),
    ]


def class_bars(per_class: Mapping[str, Mapping[str, float]], title: str = '') -> bytes:
    """AP and AP50 of each class as horizontal bars, the best class on top, as PNG.

    Args:
        per_class: ``segm_AP``, ``segm_AP50`` and the same for ``bbox`` by class, in the order of
            the labels; boxes are shown where there are no masks. A class without these had no
            ground truth.
    """
    boxes, masks = (any(f'{kind}_AP' in values for values in per_class.values()) for kind in ('bbox', 'segm'))
    kind = 'bbox' if boxes and not masks else 'segm'
    rows = [
        (values.get(f'{kind}_AP', math.nan), values.get(f'{kind}_AP50', math.nan), name)
        for name, values in zip(legible(list(per_class)), per_class.values(), strict=True)
    ]
    rows.sort(key=lambda row: -math.inf if math.isnan(row[0]) else row[0], reverse=True)
    columns = min(4, math.ceil(len(rows) / _BARS_PER_COLUMN) or 1)
    count = math.ceil(len(rows) / columns) or 1
    step = min(0.24, _TALLEST / count)
    figure, places = new_figure(max(6.5, 5.5 * columns), 1.6 + step * count, columns=columns)
    for number, axes in enumerate(places):
        handles = _bars(axes, rows[number * count : (number + 1) * count], count)
    known = ['AP', 'AP50'] if any(math.isfinite(row[1]) for row in rows) else ['AP']
    heading = f'{KINDS[kind]} {" / ".join(known)} by class'
    figure.suptitle(_writable(f'{heading}, {title}' if title else heading), parse_math=False)
    if len(known) == 2:
        legend(figure, handles, known, loc='outside lower center', ncols=2)
    return png(figure)


def _bars(axes: Axes, rows: Sequence[tuple[float, float, str]], count: int) -> list:
    """Draw one column of bars with `count` places, so that the bars of all columns are equally thick."""
    places = range(len(rows))
    lengths = [[v if math.isfinite(v) else 0.0 for v in row[:2]] for row in rows]
    wide = axes.barh(places, [ap50 for _, ap50 in lengths], 0.8, color=COLOURS[5])
    slim = axes.barh(places, [ap for ap, _ in lengths], 0.42, color=COLOURS[0])
    for place, row in enumerate(rows):
        text = ' / '.join(f'{v:.3f}' for v in row[:2] if math.isfinite(v))
        # Within the axes as it is; measuring hundreds of them would take seconds.
        axes.text(max(lengths[place]) + 0.01, place, text or 'no ground truth', in_layout=False, **NOTE)
    axes.set_yticks(places, [row[2] for row in rows], fontsize=9, parse_math=False)
    axes.set(xlim=(0, 1.25), ylim=(count - 0.4, -0.6), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    bar_style(axes)
    return [slim, wide]
