"""The learning-rate rule, in one place. Precedence: command line > config > rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config


@dataclass(frozen=True)
class LrPlan:
    """The learning rates of a run.

    Attributes:
        lr: Base learning rate after scaling.
        source: How it came about, as arithmetic.
        mults: What it is multiplied with for each param group.
        batch: Images of an update, as arithmetic.
    """

    lr: float
    source: str
    mults: dict[str, float]
    batch: str

    @property
    def groups(self) -> dict[str, float]:
        """Learning rate of each param group."""
        return {name: self.lr * mult for name, mult in self.mults.items()}

    def lines(self) -> list[str]:
        """The learning rates and what they come from, one a line."""
        groups = [f'         lr/{name:10} {self.lr * mult:<8g} = {mult:g} x lr' for name, mult in self.mults.items()]
        return [f'Batch: {self.batch}', f'lr:    {self.lr:g} = {self.source}', *groups]


def _base_of(auto: Mapping) -> int:
    base = auto.get('base_batch_size')
    if not isinstance(base, int) or base <= 0:
        raise UserError('lr-base-batch-size', base=base)
    return base


def plan_lr(cfg: Mapping, world_size: int, lr: float | None = None, scale: bool = True) -> LrPlan:
    """Work out the learning rates of a config.

    Scaled linearly: lr × (GPUs × images per GPU × accumulation) / base_batch_size, the rule of Goyal
    et al., "Accurate, Large Minibatch SGD", https://arxiv.org/abs/1706.02677.

    Args:
        cfg: A resolved config.
        world_size: Number of processes (GPUs).
        lr: From the command line; taken as it is, never scaled.
        scale: False leaves the config's lr as it is.

    Raises:
        UserError: ``auto_scale_lr.base_batch_size`` is missing or not positive.
    """
    wrapper = cfg['optim_wrapper']
    own = wrapper['optimizer']['lr']
    auto = cfg.get('auto_scale_lr') or {}
    batch_size = cfg['train_dataloader']['batch_size']
    accumulation = wrapper.get('accumulative_counts', 1)
    images = world_size * batch_size * accumulation
    batch = f'{images} images an update ({world_size} GPU x {batch_size} x {accumulation} accumulation)'
    base = auto.get('base_batch_size') if auto.get('enable', False) else None
    if base:
        batch += ', as many as the config is for' if images == base else f'; the config is for {base}'
    if lr is not None:
        result, source = lr, '--lr'
    elif not scale:
        result, source = own, "the config's, unscaled (--no-scale-lr)"
    elif not auto.get('enable', False):
        result, source = own, "the config's (auto_scale_lr is off)"
    else:
        base = _base_of(auto)
        # In this order: at the size that the lr is for it is that lr to the bit.
        result = own * world_size * batch_size * accumulation / base
        source = f'{own:g} x ({world_size} GPU x {batch_size} images x {accumulation} accumulation) / {base}'
    keys = (wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    mults = {name: mult.get('lr_mult', 1.0) for name, mult in keys.items()} or {'all': 1.0}
    return LrPlan(result, source, mults, batch)


# What of a scheduler counts steps where it goes by steps.
_IN_STEPS = ('begin', 'end', 'milestones', 'T_max', 'step_size', 'total_iters', 'total_steps', 'periods', 'restarts')
# MMEngine's `end` of a scheduler that has none.
OPEN_END = int(1e9)
# The same of a training loop.
_LOOP_STEPS = ('max_iters', 'val_interval', 'val_begin')


def adapt_schedule(cfg: Mapping, world_size: int, scale: bool = True) -> list[str]:
    """Let everything that is counted in steps see as many images as at the base batch size.

    A step of ``world_size`` processes is ``world_size × batch_size / base_batch_size`` steps of the
    config. Accumulation does not count: schedulers step with every step, updating or not.

    Args:
        cfg: Resolved config; changed in place.
        world_size: Number of processes.
        scale: False leaves everything as it is.

    Returns:
        A line for each change.

    Raises:
        UserError: ``auto_scale_lr.base_batch_size`` is missing or not positive.
    """
    auto = cfg.get('auto_scale_lr') or {}
    if not scale or not auto.get('enable', False):
        return []
    factor = world_size * cfg['train_dataloader']['batch_size'] / _base_of(auto)
    if factor == 1:
        return []

    def adapted(value):
        if isinstance(value, (list, tuple)):
            return [adapted(v) for v in value]
        # An end that is left open stays open.
        return max(1, math.ceil(value / factor)) if isinstance(value, (int, float)) and 0 < value < OPEN_END else value

    lines = []

    def adapt(settings, name, keys):
        for key in keys:
            if settings.get(key):
                old, settings[key] = settings[key], adapted(settings[key])
                if key == 'end':
                    # A LinearLR of one step would stay at its start_factor for ever.
                    settings[key] = max(settings[key], min(old, settings.get('begin', 0) + 2))
                lines.append(f'{name}.{key}: {old} -> {settings[key]} steps (/ {factor:g})')

    schedulers = cfg.get('param_scheduler') or []
    for scheduler in [schedulers] if isinstance(schedulers, dict) else schedulers:
        # MMEngine's default.
        if scheduler.get('by_epoch', True):
            continue
        adapt(scheduler, scheduler['type'], _IN_STEPS)
        if scheduler['type'].startswith('Exponential'):
            # As much in one step as in `factor` of the config's.
            old, scheduler['gamma'] = scheduler['gamma'], scheduler['gamma'] ** factor
            lines.append(f'{scheduler["type"]}.gamma: {old:g} -> {scheduler["gamma"]:g} a step')
    loop = cfg.get('train_cfg') or {}
    if loop.get('max_iters'):
        adapt(loop, 'train_cfg', _LOOP_STEPS)
    return lines


def set_rates(cfg: Config, plan: LrPlan) -> None:
    """Write the planned learning rate into a config, and keep `Runner.scale_lr` from scaling it again."""
    cfg.optim_wrapper.optimizer.lr = plan.lr
    # Runner.scale_lr leaves out the accumulation.
    cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or {}, enable=False)
