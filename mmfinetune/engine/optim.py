"""One named parameter group for each part of the model."""

from __future__ import annotations

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from mmfinetune.utils.errors import UserError

REST = 'rest'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayeredOptimWrapperConstructor:
    """Builds one param group per key of ``paramwise_cfg.custom_keys``.

    MMEngine's default constructor makes one group per *parameter* (about 160 for a Mask R-CNN),
    which hides the learning rates and keeps foreach updates from batching. Here a key is a module
    prefix (``backbone``, ``roi_head.mask_head``), the longest that fits wins, and the group
    carries the key as its ``name``. Parameters that no key covers make a group ``rest`` with the
    base learning rate. Frozen parameters are left out.

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
        unknown += [
            f'paramwise_cfg.custom_keys.{key}.{k}'
            for key, mult in self.custom_keys.items()
            for k in mult
            if k not in ('lr_mult', 'decay_mult')
        ]
        if unknown:
            raise UserError(
                'LayeredOptimWrapperConstructor does not know these settings:',
                unknown,
                'use custom_keys={prefix: dict(lr_mult=…, decay_mult=…)}, or drop '
                "optim_wrapper.constructor for MMEngine's own constructor",
            )

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
            modules = ', '.join(n for n, _ in model.named_children())
            raise UserError(
                'optim_wrapper.paramwise_cfg names parts that the model does not have:',
                missing,
                f'the parts of this model are: {modules}',
            )
        return [g for g in groups.values() if g['params']]

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, 'module', model)
        cfg = self.optim_wrapper_cfg.copy()
        cfg.setdefault('type', 'OptimWrapper')
        optimizer_cfg = cfg.pop('optimizer').copy()
        optimizer_cfg['params'] = self.param_groups(model, optimizer_cfg['lr'], optimizer_cfg.get('weight_decay'))
        return OPTIM_WRAPPERS.build(cfg, default_args={'optimizer': OPTIMIZERS.build(optimizer_cfg)})
