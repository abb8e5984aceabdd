"""One named parameter group for each part of the model, and updates that only finite gradients make."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from mmfinetune.engine.compat import lower_loss_scale
from mmfinetune.utils.errors import UserError

REST = 'rest'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayeredOptimWrapperConstructor:
    """Builds one param group per key of ``paramwise_cfg.custom_keys``.

    MMEngine's default constructor makes one group per *parameter* (about 160 for a Mask R-CNN), which hides the
    learning rates and keeps foreach updates from batching. Here a key is a module prefix (``backbone``,
    ``roi_head.mask_head``), the longest that fits wins, and the group carries the key as its ``name``. Parameters that
    no key covers make a group ``rest`` with the base learning rate. Frozen parameters are left out.

    Args:
        optim_wrapper_cfg: Config of the wrapper, with ``optimizer``.
        paramwise_cfg: ``dict(custom_keys={prefix: dict(lr_mult=1.0, decay_mult=1.0)})``.

    Raises:
        UserError: For any other setting, or a key that fits no parameter.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.optim_wrapper_cfg = optim_wrapper_cfg.copy()
        self.custom_keys = dict((paramwise_cfg or {}).get('custom_keys', {}))
        unknown = [f'paramwise_cfg.{k}' for k in (paramwise_cfg or {}) if k != 'custom_keys']
        for key, mult in self.custom_keys.items():
            unknown += [f'paramwise_cfg.custom_keys.{key}.{k}' for k in mult if k not in ('lr_mult', 'decay_mult')]
        if unknown:
            raise UserError('optim-unknown-settings', problems=unknown)

    def param_groups(self, model: nn.Module, lr: float, weight_decay: float | None) -> list[dict]:
        """The groups in the order of ``custom_keys``; each has ``name``, ``lr``, ``params``."""
        groups: dict[str, dict] = {}
        for name in (*self.custom_keys, REST):
            mult = self.custom_keys.get(name, {})
            groups[name] = {'name': name, 'params': [], 'lr': lr * mult.get('lr_mult', 1.0)}
            if weight_decay is not None:
                groups[name]['weight_decay'] = weight_decay * mult.get('decay_mult', 1.0)
        seen = set()
        for name, param in model.named_parameters():
            fitting = [k for k in self.custom_keys if name == k or name.startswith(k + '.')]
            key = max(fitting, key=len, default=REST)
            seen.add(key)
            if param.requires_grad:
                groups[key]['params'].append(param)
        missing = [f'custom_keys.{k}' for k in self.custom_keys if k not in seen]
        if missing:
            parts = ', '.join(name for name, _ in model.named_children())
            raise UserError('optim-unknown-parts', problems=missing, parts=parts)
        return [g for g in groups.values() if g['params']]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, 'module', model)
        cfg = self.optim_wrapper_cfg.copy()
        cfg.setdefault('type', 'OptimWrapper')
        optimizer_cfg = cfg.pop('optimizer').copy()
        optimizer_cfg['params'] = self.param_groups(model, optimizer_cfg['lr'], optimizer_cfg.get('weight_decay'))
        return OPTIM_WRAPPERS.build(cfg, default_args={'optimizer': OPTIMIZERS.build(optimizer_cfg)})


class GuardedUpdate(OptimWrapper):
    """Makes no update with a loss or a gradient that is not finite; see `guarded`.

    All processes do so alike: a loss that is not finite on one of them makes the gradient NaN that all share. Under
    fp16 the gradient scaler lowers its scale.

    Attributes:
        grad_norm: 2-norm of the gradient at the last step, before any clipping; None if it made no update.
        refused: Names of the param groups whose gradient kept the last step from an update; None if nothing did.
        scaled: Whether a gradient scaler is on, so that the loss scale may be to blame.
    """

    grad_norm: float | None = None
    refused: list[str] | None = None
    scaled = False

    def update_params(
        self, loss: torch.Tensor, step_kwargs: dict[str, Any] | None = None, zero_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Accumulate the gradient of a loss; at the end of an accumulation, update the weights if it is finite."""
        self.grad_norm = self.refused = None
        # NaN times the loss: not every term that is not finite reaches the gradient by itself.
        factor = torch.where(torch.isfinite(loss.detach()), torch.ones_like(loss), math.nan)
        self.backward(self.scale_loss(loss * factor))
        if not self.should_update():
            return
        groups = [[p.grad for p in g['params'] if p.grad is not None] for g in self.optimizer.param_groups]
        scaler = getattr(self, 'loss_scaler', None)  # AmpOptimWrapper's
        self.scaled = scaler is not None and scaler.is_enabled()
        scale = scaler.get_scale() if scaler is not None else 1.0
        norm = float(torch.nn.utils.get_total_norm([gradient for group in groups for gradient in group]))
        if math.isfinite(norm):
            self.grad_norm = norm / scale
        else:
            names = [g.get('name', f'group {i}') for i, g in enumerate(self.optimizer.param_groups)]
            pairs = zip(names, groups, strict=True)
            bad = [name for name, group in pairs if not all(torch.isfinite(gradient).all() for gradient in group)]
            # The norm of scaled gradients may overflow although none of them does.
            self.refused = None if self.scaled and not bad else bad
        if self.refused is None:
            self.step(**(step_kwargs or {}))
        elif self.scaled:
            lower_loss_scale(self)
        self.zero_grad(**(zero_kwargs or {}))


def guarded(kind: type[OptimWrapper]) -> type[OptimWrapper]:
    """The optimizer wrapper of a config, `GuardedUpdate` mixed in."""
    return type(f'Guarded{kind.__name__}', (GuardedUpdate, kind), {})
