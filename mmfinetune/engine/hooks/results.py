"""Writes the results of a run into its work dir while it trains."""

from __future__ import annotations

import math
import numbers
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mmdet
import mmengine
import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

import mmfinetune
from mmfinetune.config import views
from mmfinetune.engine.hooks import PRIORITY, warn
from mmfinetune.engine.hooks.checkpoint import checkpoint_hook
from mmfinetune.engine.runner import INITIAL_WEIGHTS
from mmfinetune.engine.state import begin_epoch, run_state
from mmfinetune.evaluation import plots, run_results
from mmfinetune.evaluation.history import History
from mmfinetune.evaluation.run_results import CLASS_BARS, CURVES, RESULTS, SUMMARY, RunFacts
from mmfinetune.utils.errors import Message
from mmfinetune.utils.extras import extra
from mmfinetune.utils.files import atomic_write_all, atomic_write_bytes, atomic_write_text


@HOOKS.register_module()
class ResultsHook(Hook):
    """Tables, curves and a summary of the run, after each validation, in the work dir.

    ``results.csv``, ``det_results.txt``, ``seg_results.txt``, ``record_mAP.txt``, ``curves.png``, ``per_class.png``,
    ``summary.md``; see `mmfinetune.evaluation.run_results`. A row stands for a validated epoch, or for a validation
    where training is not counted in epochs. Without any validation it stands for an epoch, or for as many iterations as
    the data set has batches.

    Training losses are means over the iterations of the epoch (between two rows where there are no epochs) and over all
    processes; a step that was skipped because its loss is not finite does not count. Learning rates are those of the
    last step. Seconds of training are those of its iterations; seconds of validation include the evaluation and what
    other hooks do after it, such as saving the best checkpoint.

    A resumed run continues with the rows up to its checkpoint. What cannot be written, or read, is a warning and never
    ends the training.
    """

    priority = PRIORITY['ResultsHook']
    files: RunFiles  # from `before_train` on

    def __init__(self) -> None:
        self._training = False
        self._val_start = math.nan

    def before_train(self, runner: Runner) -> None:
        unit, total = ('epoch', runner.max_epochs) if by_epoch(runner) else ('iter', runner.max_iters)
        folder = Path(runner.work_dir)
        facts = RunFacts(folder.resolve().name, '', total, unit)
        self.files = RunFiles(folder, facts)
        self._training = True
        _try_all({RESULTS: lambda: self.files.read(runner.cfg.get('resume'))})
        self.files.history.cut(runner.iter)
        if is_main_process():
            _try_all({SUMMARY: lambda: _gather(runner, facts)})
            # At once, so that epochs after the resumed checkpoint are gone from all files.
            self.files.write(_done(runner))

    def before_train_epoch(self, runner: Runner) -> None:
        begin_epoch(runner)

    def before_val(self, runner: Runner) -> None:
        self._val_start = time.perf_counter()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        # A validation outside of training is of weights that no epoch of this run made.
        if self._training:
            self._add(runner, runner.iter, runner.epoch, metrics or {})

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if runner.val_loop is None and not by_epoch(runner) and (runner.iter + 1) % batches(runner) == 0:
            self._add(runner, runner.iter + 1, 0, {})

    def after_train_epoch(self, runner: Runner) -> None:
        if runner.val_loop is None and runner.iter > self.files.last_iter:
            self._add(runner, runner.iter, runner.epoch + 1, {})

    def after_train(self, runner: Runner) -> None:
        if is_main_process():
            done = _done(runner)
            state = 'Finished' if done >= self.files.facts.total else 'Stopped early'
            _try_all({SUMMARY: lambda: self.files.write_summary(done, state)})
        self._training = False

    def _add(self, runner: Runner, iteration: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Make the row that has come to its end and write all files."""
        files = self.files
        row: dict[str, float] = {'iter': iteration, **({'epoch': epoch} if by_epoch(runner) else {})}
        row |= trained(runner, row, files.last_iter)
        row |= {k: float(v) for k, v in metrics.items() if isinstance(v, numbers.Real) and '_AP/' not in k}
        if metrics:
            row['val_seconds'] = time.perf_counter() - self._val_start
            files.per_class = run_results.per_class_of(runner.val_evaluator, metrics)
        files.history.add(row)
        if is_main_process():
            files.facts.best = _best_metrics(runner)  # `auto` becomes a metric with the first validation
            files.write(int(row.get('epoch', iteration)), metrics)


class RunFiles:
    """What a run leaves to read in its work dir: the rows so far, AP of each class at the last validation, and facts."""

    def __init__(self, folder: Path, facts: RunFacts) -> None:
        self.folder, self.facts = folder, facts
        self.history = History()
        self.per_class: run_results.PerClass = {}

    @property
    def last_iter(self) -> int:
        """The iteration of the last row; 0 without one."""
        return int(self.history.rows[-1]['iter']) if self.history.rows else 0

    def read(self, resumed: bool) -> None:
        """Read the table of a resumed run; the main process sets that of another run aside, and one that is damaged."""
        path, why = self.folder / RESULTS, 'is of an earlier run'
        if not path.is_file():
            return
        if resumed:
            try:
                self.history = History.from_csv(path.read_bytes())
                return
            except ValueError as error:
                why = f'cannot be read ({error})'
        if is_main_process():
            warn(Message('results-set-aside', path=path, why=why, kept=run_results.set_aside(path).name))

    def write(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Write all files, after so many epochs (or iterations) and with the metrics of a validation just made."""
        folder, history, classes = self.folder, self.history, self.per_class
        source = f'validation after {history.unit} {done}'

        def tables() -> None:
            texts = {RESULTS: history.to_csv()}
            texts[run_results.DETECTION] = run_results.result_lines(history, 'bbox')
            texts[run_results.SEGMENTATION] = run_results.result_lines(history, 'segm')
            if metrics:
                texts[run_results.RECORD_MAP] = run_results.record_map_text(metrics, classes, source.capitalize())
            atomic_write_all({folder / n: text.encode() for n, text in texts.items() if text or (folder / n).exists()})

        jobs: dict[str, Callable[[], object]] = {'tables': tables}
        if history.rows:
            jobs[CURVES] = lambda: atomic_write_bytes(folder / CURVES, plots.curves(history))
        if metrics and classes:
            jobs[CLASS_BARS] = lambda: atomic_write_bytes(folder / CLASS_BARS, plots.class_bars(classes, source))
        jobs[SUMMARY] = lambda: self.write_summary(done, 'Unfinished, running or stopped')
        _try_all(jobs)

    def write_summary(self, done: int, state: str) -> None:
        """Write ``summary.md``."""
        text = run_results.summary_text(self.facts, self.history, done, state, self.per_class, self.folder)
        atomic_write_text(self.folder / SUMMARY, text)


def _try_all(jobs: Mapping[str, Callable[[], object]]) -> None:
    """Do them; one that fails keeps no other from being done."""
    for what, work in jobs.items():
        with extra(what):
            work()


def trained(runner: Runner, row: Mapping[str, float], last_iter: int) -> dict[str, float]:
    """Losses, learning rates and time of the iterations that the row stands for.

    The message hub is saved with each checkpoint, so that nothing is lost by resuming.
    """
    steps = int(row['iter']) - last_iter
    if 'epoch' in row:
        start = run_state(runner).epoch_start
        steps = int(row['iter']) - start['iter'] if start.get('epoch') == row['epoch'] - 1 else batches(runner)
    recent = {}
    for key, buffer in runner.message_hub.log_scalars.items():
        values, counts = buffer.data
        if key.startswith('train/') and steps > 0 and values.size:
            recent[key.removeprefix('train/')] = values[-steps:][counts[-steps:] > 0]
    means = {f'train/{n}': _mean(values) for n, values in recent.items() if 'loss' in n or n.endswith('acc')}
    shares = all_gather_object(means)
    found = {name: math.fsum(share.get(name, value) for share in shares) / len(shares) for name, value in means.items()}
    for name in ('base_lr', 'lr'):
        if name in recent:
            found.setdefault('lr', float(recent[name][-1]))
    if 'time' in recent:
        found['train_seconds'] = float(recent['time'].sum())
    return {**found, **{name: float(values[-1]) for name, values in recent.items() if name.startswith('lr/')}}


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def by_epoch(runner: Runner) -> bool:
    return not isinstance(runner.train_loop, IterBasedTrainLoop)


def batches(runner: Runner) -> int:
    try:
        return len(runner.train_dataloader)
    except TypeError:  # a stream of unknown length: one row at the end
        return runner.max_iters


def _done(runner: Runner) -> int:
    return runner.epoch if by_epoch(runner) else runner.iter


def _best_metrics(runner: Runner) -> dict[str, bool]:
    """The metrics of ``save_best``, and whether less is better."""
    hook = checkpoint_hook(runner)
    return {key: rule == 'less' for key, rule in hook.best_rules.items() if rule} if hook else {}


def _gather(runner: Runner, facts: RunFacts) -> None:
    facts.command = shlex.join(['python', *sys.argv]).replace('\n', ' ')
    facts.best = _best_metrics(runner)
    facts.setup = _setup(runner)
    facts.data = [_data_row(runner, split) for split in ('train', 'val') if split == 'train' or runner.val_loop]


def _setup(runner: Runner) -> dict[str, str]:
    recipe = runner.cfg.get('weights') or {}
    file = recipe.get('checkpoint')
    rows = {'weights': _weights(runner, file)}
    if file and recipe.get('head_init'):
        rows['heads'] = recipe['head_init']
    loaded = runner.cfg.get('load_from')
    if loaded and runner.cfg.get('resume'):
        rows['resumed from'] = f'{loaded} ({_done(runner)} done)'
    elif loaded:
        rows['loaded'] = str(loaded)
    device = next(runner.model.parameters()).device
    name = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    versions = [f'{module.__name__} {module.__version__}' for module in (mmfinetune, mmdet, mmengine, torch)]
    versions.append(f'Python {platform.python_version()}')
    device_text = f'{get_world_size()} × {device.type} ({name})'
    return rows | {'seed': str(runner.seed), 'device': device_text, 'versions': ', '.join(versions)}


def _weights(runner: Runner, file: str | None) -> str:
    """Where a model starts from."""
    if not file:
        backbone = (runner.cfg.model.get('backbone') or {}).get('init_cfg') or {}
        source = backbone.get('checkpoint') if isinstance(backbone, dict) else None
        return f'random, backbone of {source}' if source else 'random'
    # Of a resumed run the facts come with its checkpoint; those of a plain Runner are not known.
    facts = runner.message_hub.runtime_info.get(INITIAL_WEIGHTS)
    if not facts:
        return file
    counts = f'{facts["loaded"]} tensors loaded, {facts["remapped"]} remapped, {facts["reinit"]} re-initialized'
    return f'{facts["file"]} (SHA-256 {facts["sha256"][:8]}…; {counts})'


def _data_row(runner: Runner, split: str) -> list[str]:
    """Split, images, objects, classes and file as they are loaded."""
    dataset = getattr(runner, f'{split}_dataloader').dataset
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    count = len(dataset)
    try:
        objects = f'{sum(len(dataset.get_data_info(i)["instances"]) for i in range(count)):,}'
    except (AttributeError, KeyError, TypeError, NotImplementedError):
        objects = '-'  # a data set of another kind than MMEngine's
    files = dict.fromkeys(
        str(views.annotation_file(d)) for _, d in views.parts_of(runner.cfg, split) if 'ann_file' in d
    )
    return [split, f'{count:,}', objects, str(len(classes)), ', '.join(files) or '-']
