"""Writes the results of a run into its work dir while it trains."""

from __future__ import annotations

import logging
import math
import numbers
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import mmdet
import mmengine
import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop

import mmfinetune
from mmfinetune.engine.hooks import PRIORITY
from mmfinetune.engine.hooks.checkpoint import checkpoint_hook
from mmfinetune.engine.runner import INITIAL_WEIGHTS
from mmfinetune.engine.state import begin_epoch, run_state
from mmfinetune.evaluation import history as evaluation_history
from mmfinetune.evaluation import plots, run_results
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, atomic_write_bytes, atomic_write_text


@HOOKS.register_module()
class ResultsHook(Hook):
    """Tables, curves and a summary of the run, after each validation, in the work dir.

    ``results.csv``, ``det_results.txt``, ``seg_results.txt``, ``record_mAP.txt``, ``curves.png``,
    ``per_class.png``, ``summary.md``; see `mmfinetune.evaluation.run_results`. A row stands for a validated
    epoch, or for a validation where training is not counted in epochs. Without any validation it
    stands for an epoch, or for as many iterations as the data set has batches.

    Training losses are means over the iterations of the epoch (between two rows where there are
    no epochs) and over all processes; a step that was skipped for a loss that is not finite does
    not count. Learning rates are those of the last step. Seconds of training are those of its
    iterations; seconds of validation include the evaluation and what other hooks make of it, such
    as the best checkpoint.

    A resumed run goes on with the rows up to its checkpoint. What cannot be written, or read, is
    warned of and never ends the training.
    """

    priority = PRIORITY['ResultsHook']

    def __init__(self) -> None:
        self._history = evaluation_history.History()
        self._facts: run_results.RunFacts | None = None
        self._per_class: run_results.PerClass = {}
        self._val_start: float | None = None

    def before_train(self, runner) -> None:
        if self._facts is None:
            self._begin(runner)

    def before_train_epoch(self, runner) -> None:
        # Kept in checkpoints, since a run may be resumed in the middle of the epoch.
        begin_epoch(runner)

    def before_val(self, runner) -> None:
        # A hook may validate a resumed model before this one's turn in before_train.
        if _training(runner) and self._facts is None:
            self._begin(runner)
        self._val_start = time.perf_counter()

    def after_val_epoch(self, runner, metrics: Mapping[str, float] | None = None) -> None:
        # A validation outside of training is of weights that no epoch of this run made.
        if _training(runner):
            self._add(runner, runner.iter, metrics or {})

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.val_loop is None and not _by_epoch(runner) and (runner.iter + 1) % _batches(runner) == 0:
            self._add(runner, runner.iter + 1, {})

    def after_train_epoch(self, runner) -> None:
        if runner.val_loop is None and runner.iter > self._last_iter():
            self._add(runner, runner.iter, {}, runner.epoch + 1)

    def after_train(self, runner) -> None:
        done = _done(runner)
        self._guarded(
            run_results.SUMMARY,
            lambda: self._write_summary(runner, done, 'Finished' if done >= self._facts.total else 'Stopped early'),
        )

    def _last_iter(self) -> int:
        return self._history.rows[-1]['iter'] if self._history.rows else 0

    def _begin(self, runner) -> None:
        """Read what an earlier part of the run left, and gather what does not change."""
        if runner._resume:
            self._guarded(run_results.RESULTS, lambda: self._read(Path(runner.work_dir)))
            self._history.cut(runner.iter)
        unit = 'epoch' if _by_epoch(runner) else 'iter'
        total = runner.max_epochs if unit == 'epoch' else runner.max_iters
        self._facts = run_results.RunFacts(Path(runner.work_dir).resolve().name, '', total, unit)
        if not is_main_process():
            return
        table = Path(runner.work_dir) / run_results.RESULTS
        if not runner._resume and table.exists():
            self._guarded(run_results.RESULTS, lambda: self._set_aside(table, 'is of an earlier run'))
        self._guarded(run_results.SUMMARY, lambda: self._gather(runner))
        # At once, so that epochs after the resumed checkpoint are gone from all files.
        self._write(runner, _done(runner))

    def _read(self, work_dir: Path) -> None:
        path = work_dir / run_results.RESULTS
        if not path.is_file():
            return
        try:
            self._history = evaluation_history.History.from_csv(path.read_bytes())
        except ValueError as error:
            if is_main_process():
                self._set_aside(path, f'cannot be read ({error})')

    def _set_aside(self, path: Path, why: str) -> None:
        _warn(f'{path} {why}: it is now {run_results.set_aside(path).name}, and a new one is begun')

    def _gather(self, runner) -> None:
        self._facts.command = shlex.join(['python', *sys.argv]).replace('\n', ' ')
        self._facts.setup = _setup(runner)
        self._facts.data = [row for split in ('train', 'val') for row in _data_row(runner, split)]

    def _add(self, runner, iteration: int, metrics: Mapping[str, float], epoch: int | None = None) -> None:
        """Make the row that has come to its end and write all files."""
        row = {'iter': iteration}
        if _by_epoch(runner):
            row['epoch'] = runner.epoch if epoch is None else epoch
        row.update(self._trained(runner, row))
        if not is_main_process():
            self._history.add(row)
            return
        row.update(
            (key, float(value))
            for key, value in metrics.items()
            if isinstance(value, numbers.Real) and '_AP/' not in key
        )
        if self._val_start is not None and metrics:
            row['val_seconds'] = time.perf_counter() - self._val_start
        self._history.add(row)
        if metrics:
            self._per_class = run_results.per_class_of(runner.val_evaluator, metrics)
        self._write(runner, row.get('epoch', iteration), metrics)

    def _trained(self, runner, row: Mapping[str, int]) -> dict[str, float]:
        """Losses, learning rates and time of the iterations that the row stands for.

        The message hub is saved with each checkpoint, so that nothing is lost by resuming.
        """
        hub = runner.message_hub
        steps = row['iter'] - self._last_iter()
        if 'epoch' in row:
            known = run_state(runner).epoch_start
            steps = row['iter'] - known['iter'] if known.get('epoch') == row['epoch'] - 1 else _batches(runner)
        recent = {
            key.removeprefix('train/'): buffer.data[0][-steps:]
            for key, buffer in hub.log_scalars.items()
            if key.startswith('train/') and steps > 0 and buffer.data[0].size
        }
        found = {
            f'train/{name}': _mean(values) for name, values in recent.items() if 'loss' in name or name.endswith('acc')
        }
        shares = all_gather_object(found)
        found = {
            name: math.fsum(share.get(name, value) for share in shares) / len(shares) for name, value in found.items()
        }
        groups = {name: float(values[-1]) for name, values in recent.items() if name.startswith('lr/')}
        base = [float(recent[name][-1]) for name in ('base_lr', 'lr') if name in recent]
        if base:
            found['lr'] = base[0]
        if 'time' in recent:
            found['train_seconds'] = float(recent['time'].sum())
        return {**found, **groups}

    def _write(self, runner, done: int, metrics: Mapping[str, float] | None = None) -> None:
        folder, history, classes = Path(runner.work_dir), self._history, self._per_class
        source = f'validation after {history.unit} {done}'

        def tables() -> None:
            texts = {
                run_results.RESULTS: history.to_csv(),
                run_results.DETECTION: run_results.result_lines(history, 'bbox'),
                run_results.SEGMENTATION: run_results.result_lines(history, 'segm'),
            }
            if metrics:
                texts[run_results.RECORD_MAP] = run_results.record_map_text(metrics, classes, source.capitalize())
            atomic_write_all(
                {folder / name: text.encode() for name, text in texts.items() if text or (folder / name).exists()}
            )

        self._guarded('tables', tables)
        if history.rows:
            self._guarded(
                run_results.CURVES, lambda: atomic_write_bytes(folder / run_results.CURVES, plots.curves(history))
            )
        if metrics and classes:
            self._guarded(
                run_results.CLASS_BARS,
                lambda: atomic_write_bytes(folder / run_results.CLASS_BARS, plots.class_bars(classes, source)),
            )
        self._guarded(run_results.SUMMARY, lambda: self._write_summary(runner, done, 'Unfinished, running or stopped'))

    def _write_summary(self, runner, done: int, state: str) -> None:
        if is_main_process():
            folder = Path(runner.work_dir)
            # Only now, since `auto` becomes a metric with the first validation.
            self._facts.best = _best_metrics(runner)
            atomic_write_text(
                folder / run_results.SUMMARY,
                run_results.summary_text(self._facts, self._history, done, state, self._per_class, folder),
            )

    def _guarded(self, what: str, work: Callable[[], None]) -> None:
        """Do it; a failure is warned of, since hours of training are worth more than a table."""
        try:
            work()
        except (UserError, OSError) as error:
            _warn(f'Training goes on without {what}: {error}')
        except Exception:
            _warn(f'Training goes on without {what}: {traceback.format_exc()}')


def _mean(values: np.ndarray) -> float:
    """Of the finite ones; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)


def _training(runner) -> bool:
    # Asking the runner for its epoch would build the training loop.
    return runner._train_loop is not None and not isinstance(runner._train_loop, dict)


def _by_epoch(runner) -> bool:
    return not isinstance(runner.train_loop, IterBasedTrainLoop)


def _batches(runner) -> int:
    try:
        return len(runner.train_dataloader)
    except TypeError:  # a stream of unknown length: one row at the end
        return runner.max_iters


def _done(runner) -> int:
    return runner.epoch if _by_epoch(runner) else runner.iter


def _best_metrics(runner) -> dict[str, bool]:
    """The metrics of ``save_best``, and whether less is better."""
    hook = checkpoint_hook(runner)
    return {key: rule == 'less' for key, rule in hook.best_rules.items() if rule} if hook else {}


def _setup(runner) -> dict[str, str]:
    recipe = runner.cfg.get('weights') or {}
    file = recipe.get('checkpoint')
    device = next(runner.model.parameters()).device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == 'cuda'
        else f'{platform.machine()}, {torch.get_num_threads()} threads'
    )
    rows = {'weights': _weights(runner, file) if file else _initial(runner.cfg)}
    if file and recipe.get('head_init'):
        rows['heads'] = recipe['head_init']
    if runner._load_from:
        rows['resumed from' if runner._resume else 'loaded'] = (
            f'{runner._load_from}' + f' ({_done(runner)} done)' * bool(runner._resume)
        )
    return {
        **rows,
        'seed': str(runner.seed),
        'device': f'{get_world_size()} × {device.type} ({name})',
        'versions': ', '.join(
            f'{name} {version}'
            for name, version in (
                ('mmfinetune', mmfinetune.__version__),
                ('mmdet', mmdet.__version__),
                ('mmengine', mmengine.__version__),
                ('torch', torch.__version__),
                ('Python', platform.python_version()),
            )
        ),
    }


def _initial(cfg: Mapping) -> str:
    """Where a model without weights file starts from."""
    backbone = (cfg['model'].get('backbone') or {}).get('init_cfg') or {}
    source = backbone.get('checkpoint') if isinstance(backbone, dict) else None
    return f'random, backbone of {source}' if source else 'random'


def _weights(runner, file: str) -> str:
    # Of a resumed run the facts come with its checkpoint; those of a plain Runner are not known.
    facts = runner.message_hub.runtime_info.get(INITIAL_WEIGHTS)
    if not facts:
        return file
    counts = f'{facts["loaded"]} tensors loaded, {facts["remapped"]} remapped, {facts["reinit"]} re-initialized'
    return f'{facts["file"]} (SHA-256 {facts["sha256"][:8]}…; {counts})'


def _data_row(runner, split: str) -> list[list[str]]:
    """Split, images, objects, classes and file as they are loaded; empty without the split."""
    if split == 'val' and runner.val_loop is None:
        return []
    dataset = getattr(runner, f'{split}_dataloader').dataset
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    count = len(dataset)
    try:
        objects = f'{sum(len(dataset.get_data_info(i)["instances"]) for i in range(count)):,}'
    except (AttributeError, KeyError, TypeError, NotImplementedError):
        objects = '-'  # a data set of another kind than MMEngine's
    return [[split, f'{count:,}', objects, str(len(classes)), str(getattr(dataset, 'ann_file', '-'))]]
