"""What a training will take, from the times of a few steps: time, memory, disk, and what limits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmfinetune.utils.errors import Message
from mmfinetune.utils.files import nearest
from mmfinetune.utils.text import duration, plural

_GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """What a probe has measured; times in s, sizes in bytes.

    Attributes:
        startup: From the start of the program to the first batch's request.
        first: What the first steps take beyond the time of as many others, the start of the loader included.
        step: A step without its wait for the batch.
        loader: Time between two batches where nothing else is done.
        epoch_start: Wait for the first batch of a later epoch.
        epoch_end: What hooks do after an epoch, saving included.
        image: An image of a validation.
        evaluate, evaluate_image: An evaluation of no image, and what each image adds.
        validation_end: What hooks do after a validation, saving the best included.
        memory: Most memory of the GPU, or of the main process on a CPU.
        on_gpu: Which of both.
        checkpoint, best: Sizes of the files.
        other: Bytes of all other files after one epoch.
    """

    startup: float
    first: float
    step: float
    loader: float
    epoch_start: float
    epoch_end: float
    image: float
    evaluate: float
    evaluate_image: float
    validation_end: float
    memory: int
    on_gpu: bool
    checkpoint: int
    best: int
    other: int


@dataclass(frozen=True)
class Length:
    """How much of everything a run does.

    Attributes:
        steps: Of an epoch in each process, or of the run where it is not counted in epochs.
        epochs: Times that many steps.
        validations: Passes over the validation split.
        val_images, test_images: Of each process.
        workers: Processes that load data for training.
        checkpoints, best: Most files at the same time.
    """

    steps: int
    epochs: int
    validations: int
    val_images: int
    test_images: int
    workers: int
    checkpoints: int
    best: int


@dataclass(frozen=True)
class Forecast:
    """A forecast; times in s, sizes in bytes. `limits` is ``step``, ``loader`` or ``validation``."""

    step: float
    epoch: float
    validation: float
    validations: int
    total: float
    test: float
    memory: int
    on_gpu: bool
    disk: int
    free: int
    limits: str
    workers: int
    parts: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), 'ends': _clock(self.total)}

    def _cure(self) -> Message:
        if self.limits == 'loader':
            return Message('forecast-limit-loader', workers=self.workers)
        return Message('forecast-limit-validation') if self.limits == 'validation' else Message('forecast-limit-step')

    def lines(self) -> Iterator[str]:
        """The forecast as text."""
        yield f'Time:   {duration(self.total)} in all, until {_clock(self.total)}, if started now'
        times = f'a step {self.step:.2f} s, an epoch {duration(self.epoch)}'
        if self.validations:
            times += f', {plural(self.validations, "validation")} of {duration(self.validation)}'
        yield f'        {times}'
        if self.test:
            yield f'        a test after it {duration(self.test)}'
        kind = 'of the GPU' if self.on_gpu else 'in the main process'
        yield f'Memory: {self.memory / _GIB:.1f} GiB {kind}'
        yield f'Disk:   {self.disk / _GIB:.2f} GiB needed, {self.free / _GIB:.1f} GiB free'
        shares = ', '.join(f'{name} {seconds / self.total:.0%}' for name, seconds in self.parts.items())
        yield f'Limit:  {self._cure()} ({shares})'
        if self.disk > self.free:
            yield f'warning: {Message("forecast-disk", need=self.disk / _GIB, free=self.free / _GIB)}'


def forecast(measured: Measured, length: Length, free: int) -> Forecast:
    """Put times and lengths together.

    Args:
        measured: What a probe has found.
        length: Of the run.
        free: Bytes free on the disk.
    """
    m, n = measured, length
    step = with_loader(m.step, m.loader, n.workers)
    evaluation = m.evaluate + n.val_images * m.evaluate_image
    validation = n.val_images * m.image + evaluation + m.validation_end
    steps = n.epochs * n.steps
    parts = {
        'start': m.startup + m.first,
        'steps': steps * m.step,
        'loader': steps * (step - m.step) + (n.epochs - 1) * m.epoch_start,
        'validation': n.validations * validation,
        'saving': n.epochs * m.epoch_end,
    }
    test = n.test_images * (m.image + m.evaluate_image) + m.evaluate if n.test_images else 0.0
    limits = 'loader' if m.loader > m.step else 'step'
    if parts['validation'] > steps * step:
        limits = 'validation'
    disk = n.checkpoints * m.checkpoint + n.best * m.best + m.other * max(1, n.validations)
    epoch = n.steps * step + m.epoch_end + (m.epoch_start if n.epochs > 1 else 0)
    facts = (m.memory, m.on_gpu, disk, free, limits, n.workers, parts)
    return Forecast(step, epoch, validation, n.validations, sum(parts.values()), test, *facts)


def with_loader(step: float, loader: float, workers: int) -> float:
    """Seconds of a step and its batch: processes load beside the steps; without any, steps wait for the loading."""
    return max(step, loader) if workers else step + loader


def validations_of(length: int, begin: int, interval: int, dynamic: Sequence[tuple[int, int]] = ()) -> int:
    """How often a run of so many epochs (or steps) is validated; its end always is.

    Args:
        length: Of the run.
        begin, interval: ``val_begin`` and ``val_interval``.
        dynamic: ``dynamic_intervals``: pairs of a place and the interval from it on.
    """
    from mmengine.runner.utils import calc_dynamic_intervals

    from mmfinetune.engine.train_loop import interval_after, is_validation_due

    places = calc_dynamic_intervals(interval, list(dynamic) or None)
    return sum(is_validation_due(at, length, begin, interval_after(at, *places)) for at in range(1, length + 1))


def room(work_dir: Path) -> int:
    """Bytes free where a work dir is or will be."""
    return shutil.disk_usage(nearest(work_dir)).free


def _clock(seconds: float) -> str:
    return time.strftime('%Y-%m-%d %H:%M', time.localtime(time.time() + seconds))
