"""Validation metrics of several runs side by side: a table, a CSV file and a picture of the curves.

A run's curve is read from what MMEngine logs, ``<work_dir>/<timestamp>/vis_data/scalars.json``.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.errors import UserError
from mmfinetune.files import atomic_write_all

METRIC = 'coco/segm_mAP'
STEM = Path('work_dirs/comparison')
SUFFIXES = ('.md', '.csv', '.png')
ZERO_SHOT = 'zero_shot.json'
SCALARS = 'vis_data/scalars.json'
# Logged with each validation, but not measured by it.
_NO_METRICS = ('step', 'time', 'data_time')
_KINDS = {'coco/segm': 'mask', 'coco/bbox': 'box'}
# Okabe and Ito's colours, told apart with any kind of colour vision; yellow is too faint on white.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
# Another number than of the colours, so that runs that share a colour differ in the marker.
_MARKERS = ('o', 's', '^', 'D', 'v', 'X', 'P', '*')


@dataclass
class Run:
    """The validation results of one run.

    Args:
        name: What the run is called in the table and the legend.
        folder: Its work dir.
        epochs: The metrics after each validated epoch; 0 stands for the weights before training.
    """

    name: str
    folder: Path
    epochs: dict[int, dict[str, float]]

    def curve(self, metric: str) -> dict[int, float]:
        """A metric by epoch, epochs ascending; NaN where it was undefined."""
        return {epoch: self.epochs[epoch][metric] for epoch in sorted(self.epochs)
                if metric in self.epochs[epoch]}

    def best(self, metric: str) -> tuple[int, float] | None:
        """The first epoch with the highest value, and the value; None if there is none."""
        finite = {e: v for e, v in self.curve(metric).items() if math.isfinite(v)}
        return max(finite.items(), key=lambda item: item[1]) if finite else None


def compare(folders: Sequence[Path], names: Sequence[str] | None = None, metric: str = METRIC,
            stem: Path = STEM) -> str:
    """Compare runs; write the table as ``.md`` and ``.csv`` and the curves as ``.png``.

    Args:
        folders: Work dirs, one per run.
        names: Of the runs, in the order of the folders; taken from the folders by default.
        metric: As logged, of the kind where more is better.
        stem: Path of the files without suffix, or a folder for files of the usual name.

    Returns:
        The table in Markdown, and in its last line where the files are.

    Raises:
        UserError: No run in a folder, a broken file, or a metric that no run has.
    """
    runs = read_runs(folders, names)
    check_metric(runs, metric)
    text = table(runs, metric)
    if stem.is_dir():
        stem /= STEM.name
    contents = (text.encode(), csv_text(runs, metric).encode(), picture(runs, metric))
    # Not with_suffix, which would cut `lr_0.02` short.
    paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES]
    atomic_write_all(dict(zip(paths, contents, strict=True)))
    return f'{text}\nResults: {" ".join(map(str, paths))}'


def read_runs(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """The runs of several work dirs; see `read_run`."""
    if names is None:
        names = _default_names(folders)
    elif len(names) != len(folders):
        raise UserError(f'{len(folders)} folders, but {len(names)} names',
                        [f'{folder}: {name}' for folder, name in
                         zip(folders, [*names, *['no name'] * len(folders)], strict=False)],
                        'give one name per folder, in the same order, or none at all')
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Read all that a work dir holds of its current run, the parts before a resumption included.

    Where an epoch was validated twice, as after ``--resume`` from an earlier checkpoint, the later
    result wins. Epoch 0 comes from ``zero_shot.json``, of the form of ``test_results.json``.

    Raises:
        UserError: There is no run, or a file is broken.
    """
    # MMEngine names the folders by date and time, so that their order is that of the parts.
    logs = sorted(folder.glob(f'*/{SCALARS}'))
    zero_shot = folder / ZERO_SHOT
    if not logs and not zero_shot.is_file():
        raise UserError(f'{folder}: no run in it' if folder.is_dir() else
                        f'{folder}: no such folder', _nearby(folder),
                        f'pass a work dir, which holds <timestamp>/{SCALARS}')
    epochs: dict[int, dict[str, float]] = {}
    if zero_shot.is_file():
        epochs[0] = _read_zero_shot(zero_shot)
    for log in logs:
        epochs.update(_read_scalars(log))
    return Run(name, folder, epochs)


def check_metric(runs: Sequence[Run], metric: str) -> None:
    """Raise a UserError that names similar metrics unless a run has this one."""
    known = sorted({key for run in runs for metrics in run.epochs.values() for key in metrics})
    if metric in known:
        return
    if not known:
        raise UserError('No epoch of these runs has been validated yet:',
                        [str(run.folder) for run in runs],
                        'wait for the end of the first epoch')
    # Without its prefix too, since that is what one leaves out.
    near = [key for key in known if key.rpartition('/')[2] == metric]
    near += [key for key in difflib.get_close_matches(metric, known, 5) if key not in near]
    raise UserError(f'No run has the metric {metric}; {"similar" if near else "there"} are:',
                    near or known, '--metric takes one of the names in the logs')


def table(runs: Sequence[Run], metric: str) -> str:
    """A Markdown table: one row per run, one column per validated epoch, then the best one.

    ``-`` stands for an epoch that was not validated, ``nan`` for a result that is undefined.
    """
    columns = _columns(runs, metric)
    rows = [[f'{metric} after epoch', *map(str, columns), 'best (epoch)']]
    for run in runs:
        curve, best = run.curve(metric), run.best(metric)
        rows.append([_cell(run.name)]
                    + [f'{curve[epoch]:.3f}' if epoch in curve else '-' for epoch in columns]
                    + [f'{best[1]:.3f} ({best[0]})' if best else '-'])
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ['-' * widths[0]] + ['-' * (width - 1) + ':' for width in widths[1:]]
    lines = [[row[0].ljust(widths[0])]
             + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
             for row in rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (lines[0], rule, *lines[1:]))


def csv_text(runs: Sequence[Run], metric: str) -> str:
    """The same table with all digits; empty where the Markdown one has ``-``."""
    columns = _columns(runs, metric)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    writer.writerow(['run', 'metric', *(f'epoch_{epoch}' for epoch in columns), 'best',
                     'best_epoch'])
    for run in runs:
        curve, best = run.curve(metric), run.best(metric)
        writer.writerow([run.name, metric, *(curve.get(epoch, '') for epoch in columns),
                         *((best[1], best[0]) if best else ('', ''))])
    return out.getvalue()


def picture(runs: Sequence[Run], metric: str) -> bytes:
    """The curves of all runs as PNG: the metric and, where it is an AP, AP50 beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    panels = [metric]
    if any(run.curve(f'{metric}_50') for run in runs):
        panels.append(f'{metric}_50')
    # Figure and canvas by hand: pyplot would choose a backend and keep global state.
    figure = Figure(figsize=(6 * len(panels), 5), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        handles = []
        for index, run in enumerate(runs):
            curve = run.curve(key)
            handles += axes.plot(list(curve), list(curve.values()), linewidth=1.8, markersize=6,
                                 color=_COLOURS[index % len(_COLOURS)],
                                 marker=_MARKERS[index % len(_MARKERS)])
        axes.set(xlabel='epoch', ylabel=_title(key), title=_title(key))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    # An invisible mark in front, since matplotlib leaves out names that begin with `_`.
    labels = [f'\u200b{run.name}' if run.name.startswith('_') else run.name for run in runs]
    # As many columns as fit, at about 11 characters per inch and 8 for a line's sample.
    columns = max(1, 66 * len(panels) // (max(map(len, labels)) + 8))
    legend = figure.legend(handles, labels, loc='outside lower center', frameon=False,
                           ncols=min(len(runs), columns))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a `$` in a name is no formula
    out = io.BytesIO()
    figure.savefig(out, format='png')
    return out.getvalue()


def _default_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; their paths if two are called the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _nearby(folder: Path) -> list[str]:
    """Work dirs that were perhaps meant: just above the folder or just below it."""
    above = [folder.parent] if (folder / SCALARS).is_file() else []
    below = {path.parents[2] for path in folder.glob(f'*/*/{SCALARS}')}
    return [f'did you mean {path}?' for path in (*above, *sorted(below))]


def _read_scalars(path: Path) -> dict[int, dict[str, float]]:
    """The metrics of each validation in a log, by epoch."""
    epochs = {}
    lines = _read(path).split(b'\n')
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError('not a JSON object')
        except ValueError as error:
            # A killed run leaves half a line behind: the last one, without its end of line.
            if number == len(lines):
                break
            raise _broken(path, error, number) from error
        # A record of training steps counts them, that of a validation has the epoch as its step.
        # Step 0 is a validation outside of training, of weights that the log does not name.
        epoch = record.get('step')
        if 'iter' not in record and isinstance(epoch, int) and epoch > 0:
            epochs[epoch] = _numbers(record)
    return epochs


def _read_zero_shot(path: Path) -> dict[str, float]:
    try:
        return _numbers(json.loads(_read(path))['metrics'])
    except ValueError as error:
        raise _broken(path, error) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(path, 'no "metrics" with a number for each name') from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error.strerror or error}') from error


def _broken(path: Path, error: object, line: int = 0) -> UserError:
    where = f'{path}, line {line}' if line else f'{path}'
    return UserError(f'{where}: broken: {error}',
                     cure='take the line out' if line else 'make the file anew or remove it')


def _numbers(record: dict) -> dict[str, float]:
    return {key: float(value) for key, value in record.items() if key not in _NO_METRICS
            and isinstance(value, (int, float)) and not isinstance(value, bool)}


def _columns(runs: Sequence[Run], metric: str) -> list[int]:
    """Epoch 0, and each that a run has the metric for."""
    return sorted({0}.union(*(run.curve(metric) for run in runs)))


def _cell(text: str) -> str:
    return ' '.join(text.split()).replace('|', '\\|')


def _title(metric: str) -> str:
    """``mask AP50`` for ``coco/segm_mAP_50``; other metrics keep their name."""
    kind, mark, rest = metric.partition('_mAP')
    if not mark or kind not in _KINDS:
        return metric
    return f'{_KINDS[kind]} AP{rest.replace("_", "")}'
