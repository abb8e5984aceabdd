"""The learning-rate rule, in one place. Precedence: command line > config > rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmfinetune.errors import UserError


@dataclass(frozen=True)
class LrPlan:
    """The learning rates of a run.

    Attributes:
        lr: Base learning rate after scaling.
        source: How it came about, as arithmetic.
        groups: Learning rate of each param group.
    """

    lr: float
    source: str
    groups: dict[str, float]


def scaled_lr(lr: float, base_batch_size: int, world_size: int, batch_size: int,
              accumulative_counts: int = 1) -> float:
    """Linear scaling: lr × (GPUs × images per GPU × accumulation) / base_batch_size.

    Rule of Goyal et al., "Accurate, Large Minibatch SGD", https://arxiv.org/abs/1706.02677.
    """
    return lr * world_size * batch_size * accumulative_counts / base_batch_size


def plan_lr(cfg: Mapping, world_size: int, lr: float | None = None, scale: bool = True) -> LrPlan:
    """Work out the learning rates of a config.

    Args:
        cfg: A resolved config with ``optim_wrapper``, ``train_dataloader``, ``auto_scale_lr``.
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
    if lr is not None:
        result, source = lr, '--lr'
    elif not scale:
        result, source = own, "the config's, unscaled (--no-scale-lr)"
    elif not auto.get('enable', False):
        result, source = own, "the config's (auto_scale_lr is off)"
    else:
        base = auto.get('base_batch_size', 0)
        if not isinstance(base, int) or base <= 0:
            raise UserError('auto_scale_lr.base_batch_size must be a positive number of images, '
                            f'not {base!r}', cure='set it to the batch size that the lr is for')
        result = scaled_lr(own, base, world_size, batch_size, accumulation)
        source = (f'{own:g} x ({world_size} GPU x {batch_size} images x {accumulation} '
                  f'accumulation) / {base}')
    keys = (wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    groups = {name: result * mult.get('lr_mult', 1.0) for name, mult in keys.items()}
    return LrPlan(result, source, groups or {'all': result})
