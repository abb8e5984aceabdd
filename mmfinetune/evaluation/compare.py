"""Validation metrics of several runs side by side: tables, a CSV file and a picture of the curves.

A run's curve is read from what MMEngine logs, ``<work_dir>/<timestamp>/vis_data/scalars.json``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.evaluation import plots
from mmfinetune.evaluation.history import History, best_of
from mmfinetune.evaluation.plots import title_of
from mmfinetune.evaluation.run_results import RESULTS
from mmfinetune.evaluation.stats import PREFIX
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.extras import extra
from mmfinetune.utils.files import atomic_write_all, reason_of
from mmfinetune.utils.text import block, csv_text, duration, is_number, near

METRIC = 'coco/segm_mAP'
STEM = Path('work_dirs/comparison')
ZERO_SHOT = 'zero_shot.json'
SCALARS = 'vis_data/scalars.json'
# Logged with each validation, but not measured by it.
_NOT_METRICS = ('step', 'time', 'data_time')
VAL_LOSS = 'val/loss'
_MAIN = ('coco/segm_mAP', 'coco/bbox_mAP')


@dataclass
class Run:
    """The validation results of one run.

    Args:
        name: Name of the run in the table and the legend.
        epochs: Metrics after each validated epoch; epoch 0 stands for the weights before training.
        seconds: Time spent in training steps; None if not known.
    """

    name: str
    folder: Path
    epochs: dict[int, dict[str, float]]
    seconds: float | None = None

    def curve(self, metric: str) -> dict[int, float]:
        """A metric by epoch, epochs ascending; NaN where it was undefined."""
        return {epoch: self.epochs[epoch][metric] for epoch in sorted(self.epochs) if metric in self.epochs[epoch]}

    def best(self, metric: str) -> tuple[int, float] | None:
        """The first epoch with the best value, and the value; None if there is none."""
        return best_of(self.curve(metric), less='loss' in metric)


def compare_runs(
    folders: Sequence[Path], names: Sequence[str] | None = None, metrics: Sequence[str] = (METRIC,), stem: Path = STEM
) -> str:
    """Compare runs; write tables as ``.md`` and ``.csv`` and the curves as ``.png``.

    Args:
        folders: Work dirs.
        names: Names of the runs, in the order of the folders; those of the folders by default.
        metrics: Metrics by the names in the logs; more is better, except of those with ``loss`` in
            their name.
        stem: Path of the files without suffix, or a folder for files of the usual name.

    Returns:
        The tables in Markdown; the last line says where the files are.

    Raises:
        UserError: No run in a folder, a broken file, or a metric that no run has.
    """
    runs, metrics = read_runs(folders, names), list(dict.fromkeys(metrics))
    check_metrics(runs, metrics)
    text = '\n'.join([*(metric_table(runs, metric) for metric in metrics), overview(runs)])
    if stem.is_dir():
        stem /= STEM.name
    contents = {'.md': text.encode(), '.csv': metric_csv(runs, metrics).encode()}
    with extra('the picture'):
        contents['.png'] = picture(runs, metrics)
    # Not with_suffix, which would cut `lr_0.02` short.
    files = {stem.with_name(stem.name + suffix): content for suffix, content in contents.items()}
    atomic_write_all(files)
    return f'{text}\nResults: {" ".join(map(str, files))}'


def read_runs(folders: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """The runs of several work dirs; see `read_run`."""
    if names is None:
        names = [folder.resolve().name for folder in folders]
        if len(set(names)) < len(names):
            names = [str(folder) for folder in folders]
    elif len(names) != len(folders):
        raise UserError(
            'compare-name-count',
            problems=[f'{folder}: {name}' for folder, name in itertools.zip_longest(folders, names, fillvalue='-')],
            folders=len(folders),
            names=len(names),
        )
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Read the current run of a work dir, including the parts before a resumption.

    Validations after the checkpoint that a later part was resumed from are left out, since
    training did not continue from them. Epoch 0 comes from ``zero_shot.json``, which has the form
    of ``test_results.json``; validation losses and training time from ``results.csv``, if it exists.

    Raises:
        UserError: There is no run, or a file is broken.
    """
    if not folder.is_dir():
        raise UserError('compare-no-folder', folder=folder)
    # MMEngine names the folders by date and time, so that their order is that of the parts.
    logs = sorted(folder.glob(f'*/{SCALARS}'))
    zero_shot = folder / ZERO_SHOT
    if not logs and not zero_shot.is_file():
        raise UserError('compare-no-run', problems=_nearby(folder), folder=folder, file=SCALARS)
    epochs: dict[int, dict[str, float]] = {}
    for log in logs:
        first, validated = _read_scalars(log)
        epochs = {epoch: metrics for epoch, metrics in epochs.items() if epoch < first}
        epochs.update(validated)
    if zero_shot.is_file():
        try:
            epochs[0] = _numbers(json.loads(zero_shot.read_bytes())['metrics'])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise UserError('compare-zero-shot', path=zero_shot) from error
    try:
        history = History.from_csv((folder / RESULTS).read_bytes())
    except (OSError, ValueError):
        history = History()
    for row in history.rows:
        epoch = int(row.get('epoch', -1))
        if epoch in epochs:
            # Logged losses are smoothed over several validations, these are not.
            epochs[epoch].update((k, v) for k, v in row.items() if k.startswith('val/'))
    seconds = history.curve('train_seconds')
    return Run(name, folder, epochs, math.fsum(seconds.values()) if seconds else None)


def check_metrics(runs: Sequence[Run], metrics: Sequence[str]) -> None:
    """Raise a UserError that names similar metrics unless a run has each of these."""
    known = sorted({key for run in runs for values in run.epochs.values() for key in values})
    if not known:
        raise UserError('compare-not-validated', problems=[str(run.folder) for run in runs])
    problems = []
    for metric in metrics:
        if metric not in known:
            # Without its prefix too, since that is what one leaves out.
            alike = ' or '.join(key for key in known if key.rpartition('/')[2] == metric)
            suggestion = f'; did you mean {alike}?' if alike else near(metric, known, '; ', most=5)
            problems.append(Message('compare-no-metric', metric=metric, suggestion=suggestion))
    if problems:
        raise UserError('compare-metrics', problems=problems, known=', '.join(known))


def metric_table(runs: Sequence[Run], metric: str) -> str:
    """A Markdown table: one row per run, one column per validated epoch, then the best one.

    ``-`` stands for an epoch that was not validated, ``nan`` for a result that is undefined.
    """
    columns = _columns(runs, metric)
    rows = [[f'{metric} after epoch', *map(str, columns), 'best (epoch)']]
    for run in runs:
        curve = run.curve(metric)
        values = [f'{curve[epoch]:.3f}' if epoch in curve else '-' for epoch in columns]
        rows.append([run.name, *values, _best(run, metric)])
    return block(rows)


def overview(runs: Sequence[Run]) -> str:
    """A Markdown table: best mask and box AP, number of epochs and training time of each run."""
    rows = [['run', *(f'best {title_of(metric)} (epoch)' for metric in _MAIN), 'epochs', 'training time']]
    for run in runs:
        seconds = '-' if run.seconds is None else duration(run.seconds)
        rows.append([run.name, *(_best(run, metric) for metric in _MAIN), str(max(run.epochs, default=0)), seconds])
    return block(rows)


def metric_csv(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """The tables of all metrics with all digits; empty where the Markdown ones have ``-``."""
    columns = sorted({epoch for metric in metrics for epoch in _columns(runs, metric)})
    rows: list[list] = [['run', 'metric', *(f'epoch_{epoch}' for epoch in columns), 'best', 'best_epoch']]
    for metric, run in itertools.product(metrics, runs):
        curve, (place, value) = run.curve(metric), run.best(metric) or ('', '')
        rows.append([run.name, metric, *(curve.get(epoch, '') for epoch in columns), value, place])
    return csv_text(rows)


def picture(runs: Sequence[Run], metrics: Sequence[str]) -> bytes:
    """The curves of all runs as PNG.

    A panel for each metric and, where it is an AP, for AP50 next to it; one for the validation
    loss if all runs have it.
    """
    panels = [n for m in metrics for n in (m, f'{m}_50') if n == m or any(run.curve(n) for run in runs)]
    if all(run.curve(VAL_LOSS) for run in runs):
        panels.append(VAL_LOSS)
    panels = list(dict.fromkeys(panels))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, places = plots.new_figure(6 * columns, 5 * rows, rows, columns, dpi=150)
    for axes, key in zip(places, panels, strict=False):
        title = 'validation loss' if key == VAL_LOSS else title_of(key)
        handles = plots.lines(axes, [run.curve(key) for run in runs], title, 'epoch')
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    labels = plots.legible([run.name for run in runs])
    # As many columns as fit, at about 11 characters per inch and 8 for a line's sample.
    fitting = max(1, 66 * columns // (max(map(len, labels)) + 8))
    plots.legend(figure, handles, labels, loc='outside lower center', ncols=min(len(runs), fitting))
    return plots.png(figure)


def _nearby(folder: Path) -> list[str]:
    """Work dirs that were perhaps meant: just above the folder or just below it."""
    above = [folder.parent] if (folder / SCALARS).is_file() else []
    below = {path.parents[2] for path in folder.glob(f'*/*/{SCALARS}')}
    return [f'did you mean {path}?' for path in (*above, *sorted(below))]


def _read_scalars(path: Path) -> tuple[float, dict[int, dict[str, float]]]:
    """The first epoch of a log, infinity without training and validation; and the metrics of each validation."""
    first, epochs = math.inf, {}
    try:
        lines = path.read_bytes().split(b'\n')
    except OSError as error:
        raise UserError('compare-unreadable', path=path, reason=reason_of(error)) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError('not a JSON object')
            metrics = _numbers(record)
        except (ValueError, OverflowError, RecursionError) as error:
            # A killed run leaves half a line behind: the last one, without its end of line.
            if number == len(lines):
                break
            raise UserError('compare-broken-line', path=path, line=number, error=error) from error
        # A record of training steps counts them, that of a validation has the epoch as its step.
        # Step 0 is a validation outside of training, of weights that the log does not name.
        training = 'iter' in record
        # Where training is not counted in epochs, steps stand for them in validations too.
        epoch = record.get('epoch', record.get('step')) if training else record.get('step')
        if isinstance(epoch, int) and epoch > 0:
            first = min(first, epoch)
            if not training:
                epochs[epoch] = metrics
    return first, epochs


def _numbers(record: dict) -> dict[str, float]:
    """The metrics of a record; NaN where there was no ground truth, for which COCO has -1."""
    return {
        key: math.nan if value == -1 and key.startswith(PREFIX) else float(value)
        for key, value in record.items()
        if key not in _NOT_METRICS and (isinstance(value, float) or is_number(value))
    }


def _columns(runs: Sequence[Run], metric: str) -> list[int]:
    """Epoch 0, and each that a run has the metric for."""
    return sorted({0}.union(*(run.curve(metric) for run in runs)))


def _best(run: Run, metric: str) -> str:
    best = run.best(metric)
    return f'{best[1]:.3f} ({best[0]})' if best else '-'
