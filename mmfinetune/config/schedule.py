"""What the schedulers of a run do over its whole length, found by stepping them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmfinetune.config.lr import OPEN_END
from mmfinetune.utils.building import building
from mmfinetune.utils.errors import Message, UserError

if TYPE_CHECKING:
    from mmengine.optim import _ParamScheduler

    from mmfinetune.engine.runner import FineTuningRunner

# In units of a group's own rate: what counts as the same, and under what it does not matter.
_SAME, _NOTHING = 1e-6, 1e-4
_LOOKS = 2000  # at most so many steps are compared
# What of a scheduler is a place or a length, in epochs or steps.
_ENDS = ('begin', 'end', 'milestones', 'T_max', 'step_size', 'total_steps')
# Where something begins: at the end of the run that is too late.
_STARTS = ('begin', 'milestones', 'step_size')


@dataclass(frozen=True)
class Course:
    """A run's length and its learning rate.

    Attributes:
        samples: Length of the data set: images, as often as wrappers repeat them.
        steps: Steps of an epoch in each process.
        epochs: Number of epochs; None where the run is counted in steps.
        total: Steps of the run.
        factors: By how much the schedule multiplies the learning rates at each step; one for all groups.
    """

    samples: int
    steps: int
    epochs: int | None
    total: int
    factors: Sequence[float]

    def line(self, lr: float) -> str:
        """The learning rate at the first step, the highest, and at the last."""
        peak = self.factors.index(max(self.factors))
        places = dict.fromkeys((0, peak, self.total - 1))
        texts = [f'{self.factors[i] * lr:g} at step {i + 1:,}{" (the highest)" * (i == peak)}' for i in places]
        return f'         lr {", ".join(texts)}'

    def warnings(self, cfg: Mapping, lr: float) -> Iterator[Message]:
        """What of a schedule does not come to pass in a run of this length.

        Args:
            cfg: The run's config.
            lr: The planned learning rate.
        """
        begin = cfg['train_cfg'].get('val_begin', 1)
        if cfg.get('val_cfg') is not None and begin > (length := self.epochs or self.total):
            unit = 'epochs' if self.epochs else 'steps'
            yield Message('schedule-no-validation', begin=begin, length=length, unit=unit)
        for place, scheduler in listed(cfg.get('param_scheduler')):
            unit, length = 'steps', self.total
            if scheduler.get('by_epoch', True):
                unit, length = 'epochs', self.epochs or 0
            beyond = {
                key: [v for v in _numbers(scheduler.get(key)) if length - (key in _STARTS) < v < OPEN_END]
                for key in _ENDS
            }
            what = ', '.join(f'{key} {", ".join(map(str, values))}' for key, values in beyond.items() if values)
            if what:
                facts = {'type': scheduler['type'], 'what': what, 'length': length, 'unit': unit}
                yield Message('schedule-beyond-run', place=place, **facts)
        high = max(self.factors)
        facts = {'highest': high * lr, 'step': self.factors.index(high) + 1, 'lr': lr}
        if high < 1 - _SAME:
            yield Message('schedule-too-low', **facts)
        elif high > 1 + _SAME:
            yield Message('schedule-too-high', **facts)
        idle = sum(factor < _SAME for factor in self.factors)
        if idle > 0.05 * self.total:
            yield Message('schedule-idle', count=idle, total=self.total)


def listed(schedulers: Any) -> list[tuple[str, Mapping]]:
    """The schedulers of a config, which may be one, with their dotted place."""
    if isinstance(schedulers, Mapping):
        return [('param_scheduler', schedulers)] if 'type' in schedulers else []
    return [(f'param_scheduler.{i}', scheduler) for i, scheduler in enumerate(schedulers or ())]


def _numbers(value: Any) -> list[float]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, (int, float))]


def course_of(runner: FineTuningRunner, world: int = 1) -> Course:
    """Step the schedulers of a run to its end, and put all back as it was.

    Args:
        runner: A runner that is built.
        world: Number of processes whose images are in each of its batches, where it runs alone for them.

    Raises:
        UserError: An epoch has no step, or a scheduler changes the ratios of the param groups or cannot do so
            many steps.
    """
    from mmengine.dist import get_world_size
    from mmengine.runner import IterBasedTrainLoop

    steps, total = steps_of(runner.train_dataloader, world), runner.max_iters
    samples = len(runner.train_dataloader.dataset)
    if not steps:
        batch = runner.train_dataloader.batch_sampler.batch_size * get_world_size()
        raise UserError('train-no-steps', samples=samples, batch=batch)
    epochs = None
    if not isinstance(runner.train_loop, IterBasedTrainLoop):
        epochs = runner.max_epochs
        total = steps * epochs
    schedulers = schedulers_of(runner)
    # With the wrapper's own group, which only carries the base rate.
    before = [(group, {k: v for k, v in group.items() if k != 'params'}) for group in runner.optim_wrapper.param_groups]
    states = [dict(scheduler.state_dict()) for scheduler in schedulers]

    def played(worst: bool) -> list[float]:
        try:
            return list(_play(runner, schedulers, total, steps if epochs else total, worst))
        finally:
            for group, values in before:
                group.update(values)
            for scheduler, state in zip(schedulers, states, strict=True):
                scheduler.load_state_dict(state)

    factors = played(worst=False)
    if any(waits_for_metric(scheduler) for scheduler in schedulers):
        played(worst=True)
    if (lowest := min(factors)) < 0:
        facts = {'lowest': lowest * runner.group_settings[-1]['lr'], 'step': factors.index(lowest) + 1}
        raise UserError('schedule-negative', **facts)
    return Course(samples, steps, epochs, total, factors)


def steps_of(loader: Any, world: int) -> int:
    """Steps of an epoch in each of so many processes, of a loader whose batches are those of all together."""
    if world == 1:
        return len(loader)
    batches = loader.batch_sampler
    # Each process gets as many images, as its sampler rounds them up.
    steps = math.ceil(len(batches.sampler) / world) / (batches.batch_size // world)
    return math.floor(steps) if batches.drop_last else math.ceil(steps)


def schedulers_of(runner: FineTuningRunner) -> list[_ParamScheduler]:
    """The schedulers that a run steps: none without MMEngine's hook."""
    from mmengine.hooks import ParamSchedulerHook

    stepped = any(isinstance(hook, ParamSchedulerHook) for hook in runner.hooks)
    return runner.param_schedulers if stepped and isinstance(runner.param_schedulers, list) else []


def waits_for_metric(scheduler: _ParamScheduler) -> bool:
    """Whether a scheduler goes by the results of validations, as ``ReduceOnPlateauLR`` does."""
    return getattr(scheduler, 'need_val_args', False)


def _play(
    runner: FineTuningRunner, schedulers: Sequence[_ParamScheduler], total: int, epoch: int, worst: bool
) -> Iterator[float]:
    """Step schedulers; yields by how much the learning rates are multiplied at each step.

    Args:
        runner: A runner that is built.
        schedulers: Its schedulers.
        total: Steps of the run.
        epoch: Steps of an epoch.
        worst: Whether each validation finds no progress, and not no metric.
    """
    pairs = list(zip(runner.optim_wrapper.optimizer.param_groups, runner.group_settings, strict=False))
    looks = max(1, total // _LOOKS)
    with warnings.catch_warnings():
        # Of schedulers that are stepped without the optimizer.
        warnings.simplefilter('ignore')
        for step in range(1, total + 1):
            yield next((group['lr'] / base['lr'] for group, base in pairs if base['lr']), 1.0)
            if step <= epoch or step % looks == 0 or step > total - epoch:
                _require_ratios(pairs, schedulers, step)
            with building('param_scheduler'):
                advance(schedulers, step, epoch)
                if worst and step % epoch == 0:
                    for scheduler in filter(waits_for_metric, schedulers):
                        scheduler.step({scheduler.monitor: 0.0})


def replay(runner: FineTuningRunner) -> None:
    """Step new schedulers as often as the run has."""
    from mmengine.runner import IterBasedTrainLoop

    epoch = runner.max_iters if isinstance(runner.train_loop, IterBasedTrainLoop) else len(runner.train_dataloader)
    for step in range(1, runner.iter + 1):
        advance(schedulers_of(runner), step, epoch)


def advance(schedulers: Sequence[_ParamScheduler], step: int, epoch: int) -> None:
    """Do what `ParamSchedulerHook` does after a step, and after an epoch of so many steps."""
    for scheduler in schedulers:
        if not scheduler.by_epoch or step % epoch == 0:
            scheduler.step()


def _require_ratios(pairs: Sequence[tuple[dict, dict]], schedulers: Sequence[_ParamScheduler], step: int) -> None:
    """Compare each scheduled setting of the groups with what it was before there were schedulers."""
    problems = []
    for name in sorted({scheduler.param_name for scheduler in schedulers}):
        shares = [group[name] / base[name] for group, base in pairs if base.get(name)]
        if shares and max(shares) - min(shares) > _SAME and max(shares) > _NOTHING:
            types = ', '.join(dict.fromkeys(type(s).__name__ for s in schedulers if s.param_name == name))
            labels = [base.get('name', f'group {i}') for i, (_, base) in enumerate(pairs)]
            now, was = (
                ', '.join(
                    f'{label} {values[name]:g}' for label, values in itertools.islice(zip(labels, of, strict=True), 6)
                )
                for of in zip(*pairs, strict=True)
            )
            problems.append(Message('schedule-ratios-of', types=types, name=name, step=step, values=now, was=was))
    if problems:
        raise UserError('schedule-ratios', problems=problems)
