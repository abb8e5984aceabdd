"""What is seen of a run: a status line on a terminal, one line an epoch, a small table after each validation."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmfinetune.engine.hooks import PRIORITY
from mmfinetune.engine.hooks.results import batches, by_epoch, trained
from mmfinetune.engine.state import run_state
from mmfinetune.utils import console
from mmfinetune.utils.text import duration, table

_REFRESH_S = 0.1
_KINDS = {'boxes': 'bbox', 'masks': 'segm'}
_STATS = {'AP': 'mAP', 'AP50': 'mAP_50', 'AP75': 'mAP_75'}


@HOOKS.register_module()
class ConsoleHook(Hook):
    """Shows a run on the console; MMEngine's ``LoggerHook`` writes all numbers into the log file.

    `FineTuningRunner` has it by default; ``default_hooks = dict(console=None)`` in a config leaves it out. The status
    line has the place in the run, the hours left, the loss and its terms as means over 20 steps, images per second and
    the most memory of the GPU so far. The line of an epoch has the same numbers as ``results.csv``; where training is
    not counted in epochs it stands for the steps up to a validation, or for as many as the data set has batches.

    Args:
        window: Number of steps that the status line is the mean of.
    """

    priority = PRIORITY['ConsoleHook']

    def __init__(self, window: int = 20) -> None:
        self.window = window
        self._shown_at = -math.inf
        self._begin = 0  # the iteration after the last line
        self._images = 0
        self._seconds = 0.0
        self._train_loss = math.nan
        self._best: dict[str, str] = {}
        self._last: dict[str, float] = {}  # of the validation before
        self._training = self._started = False

    def before_train(self, runner: Runner) -> None:
        self._training, self._started = True, False
        self._start_line(runner)
        if runner.logger.log_file and is_main_process():
            _show(runner, f'Log:   {console.near(runner.logger.log_file)}')
        console.status('Starting the processes that load data…')

    def after_train(self, runner: Runner) -> None:
        if runner.iter > self._begin:
            self._show_steps(runner, runner.iter, None)
        self._training = False

    def before_train_epoch(self, runner: Runner) -> None:
        if by_epoch(runner):
            self._start_line(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        hub = runner.message_hub
        time_taken = _current(hub.log_scalars, 'train/time')
        images = len(data_batch['inputs']) if isinstance(data_batch, dict) and 'inputs' in data_batch else 0
        self._images += images * get_world_size()
        self._seconds += time_taken
        if not self._started and not console.has_status():
            # In a log nothing else is seen of a first epoch that takes hours.
            loss = _current(hub.log_scalars, 'train/loss')
            left = hub.runtime_info.get('eta')
            rest = f', about {duration(left)} for the others' if left else ''
            _show(runner, f'Step {runner.iter + 1:,}: loss {loss:.3f}, {time_taken:.1f} s{rest}')
        self._started = True
        if time.monotonic() - self._shown_at >= _REFRESH_S:
            self._shown_at = time.monotonic()
            console.status(*self._status(runner, batch_idx, images))
        if runner.val_loop is None and not by_epoch(runner) and (runner.iter + 1) % batches(runner) == 0:
            self._show_steps(runner, runner.iter + 1, None)

    def after_train_epoch(self, runner: Runner) -> None:
        if by_epoch(runner):
            self._show_steps(runner, runner.iter, runner.epoch + 1)

    def before_val(self, runner: Runner) -> None:
        if self._training and not by_epoch(runner) and runner.iter > self._begin:
            self._show_steps(runner, runner.iter, None)
        self._best = {metric: entry['file'] for metric, entry in run_state(runner).best.items()}

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show_pass(runner, 'Validation', batch_idx, len(runner.val_dataloader))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        best = [metric for metric, entry in run_state(runner).best.items() if entry['file'] != self._best.get(metric)]
        text = validation_table(metrics or {}, self._last, best if self._training else ())
        self._last = dict(metrics or {})
        if text:
            _show(runner, text)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._show_pass(runner, 'Test', batch_idx, len(runner.test_dataloader))

    def _start_line(self, runner: Runner) -> None:
        self._begin, self._images, self._seconds = runner.iter, 0, 0.0

    def _show_steps(self, runner: Runner, done: int, epoch: int | None) -> None:
        """Show the line of the steps that have come to their end."""
        row = {'iter': done} if epoch is None else {'iter': done, 'epoch': epoch}
        found = trained(runner, row, self._begin)
        place = f'Epoch {epoch}/{runner.max_epochs}' if epoch else f'Step {done:,}/{runner.max_iters:,}'
        losses = {name.removeprefix('train/'): value for name, value in found.items() if 'loss' in name}
        seconds = found.get('train_seconds', self._seconds)
        parts = [*_loss_parts(losses, digits=3), self._speed(self._images, self._seconds), duration(seconds), _memory()]
        _show(runner, console.fit([place, *parts]))
        self._begin, self._images, self._seconds = done, 0, 0.0

    def _status(self, runner: Runner, batch_idx: int, images: int) -> list[str]:
        """The parts of the line of a step."""
        if by_epoch(runner):
            steps = f'{batch_idx + 1}/{len(runner.train_dataloader)}'
            place = f'epoch {runner.epoch + 1}/{runner.max_epochs} {steps}'
        else:
            place = f'step {runner.iter + 1}/{runner.max_iters}'
        means = {}
        for key, buffer in runner.message_hub.log_scalars.items():
            if key.startswith('train/'):
                values, counts = (part[-self.window :] for part in buffer.data)
                if counts.sum():
                    means[key.removeprefix('train/')] = float(values.sum() / counts.sum())
        losses = {name: value for name, value in means.items() if 'loss' in name}
        speed = self._speed(images * get_world_size(), means.get('time', 0))
        left = _clock(runner.message_hub.runtime_info.get('eta'))
        return [place, left, *_loss_parts(losses, digits=2), speed, _memory()]

    @staticmethod
    def _speed(images: float, seconds: float) -> str:
        return f'{images / seconds:.1f} img/s' if images and seconds else ''

    def _show_pass(self, runner: Runner, name: str, batch_idx: int, total: int) -> None:
        """Show how far a validation or a test is."""
        if batch_idx + 1 == total:
            console.status(f'{name} {total}/{total}: computing AP…')
        elif time.monotonic() - self._shown_at >= _REFRESH_S:
            self._shown_at = time.monotonic()
            console.status(f'{name} {batch_idx + 1}/{total}', _clock(runner.message_hub.runtime_info.get('eta')))


def validation_table(metrics: Mapping[str, float], before: Mapping[str, float], best: Sequence[str] = ()) -> str:
    """AP of boxes and masks with the change since the validation before, and the loss; or the first metrics on a line.

    Args:
        metrics: Of a validation.
        before: Of the one before; empty if there is none.
        best: The metrics that are the best so far.
    """
    loss = metrics.get('val/loss')
    rows, others = [], [name for name in best if name not in _rows_of(metrics).values()]
    for name, key in _rows_of(metrics).items():
        change = f'{metrics[key] - before[key]:+.3f}' if key in before else ''
        numbers = [_ap(metrics.get(key.removesuffix('mAP') + stat)) for stat in _STATS.values()]
        rows.append([f'  {name}', *numbers, change, 'best' * (key in best)])
    if not rows:
        shown = [f'{k} {v:.4g}' for k, v in metrics.items() if isinstance(v, (int, float))]
        return console.fit(['  Validation:', *shown, *(f'best {name}' for name in others)]) if shown else ''
    title = '  Validation' if loss is None else f'  val loss {loss:.3f}'
    text = table([[title, *_STATS, 'change' if before else '', ''], *rows])
    return text + ''.join(f'\n  best {name}' for name in others)


def _rows_of(metrics: Mapping[str, float]) -> dict[str, str]:
    """The key of AP for each kind of objects that was evaluated."""
    return {name: key for name, kind in _KINDS.items() if (key := f'coco/{kind}_mAP') in metrics}


def _ap(value: float | None) -> str:
    """A number of COCO's, which are -1 where there is no instance."""
    return '-' if value is None or value < 0 else f'{value:.3f}'


def _show(runner: Runner, text: str) -> None:
    runner.logger.info(text, extra=console.SHOWN)


def _current(scalars: Mapping[str, Any], key: str) -> float:
    return float(scalars[key].current()) if key in scalars else 0.0


def _memory() -> str:
    return f'{torch.cuda.max_memory_allocated() / 1e9:.1f} GB' if torch.cuda.is_available() else ''


def _clock(seconds: float | None) -> str:
    """The time left: ``m:ss``, of hours ``4h05``."""
    if seconds is None:
        return ''
    whole = round(seconds)
    return f'eta {whole // 3600}h{whole // 60 % 60:02}' if whole >= 3600 else f'eta {whole // 60}:{whole % 60:02}'


def _loss_parts(losses: Mapping[str, float], digits: int) -> list[str]:
    """The loss and its terms; those of one stage, ``loss_rpn_cls`` and ``loss_rpn_bbox`` say, are joined by ``+``."""
    stages: dict[str, list[str]] = {}
    for name, value in losses.items():
        if name != 'loss':
            stage, _, rest = re.sub(r'loss_?', '', name).replace('.', '_').rpartition('_')
            number = f'{value:.{digits}f}'
            stages.setdefault(stage or rest, []).append(number.removeprefix('0') if value < 1 else number)
    terms = ' '.join(f'{stage} {"+".join(values)}' for stage, values in stages.items())
    return [f'loss {losses["loss"]:.3f}' if 'loss' in losses else '', terms]
