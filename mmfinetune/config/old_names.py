"""Names that configs of earlier releases hold, and what they are called now: this table alone knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmfinetune.utils.errors import Message

if TYPE_CHECKING:
    from mmengine.config import Config

TYPES = {'BadNumbersHook': 'NonFiniteHook', 'BoardBackend': 'TensorBoardBackend'}
# The longest that fits counts.
KEYS = {
    'default_hooks.bad_numbers': 'default_hooks.nonfinite',
    'default_hooks.bad_numbers.factor': 'default_hooks.divergence.factor',
    'default_hooks.bad_numbers.window': 'default_hooks.divergence.window',
}
# Entries of `custom_hooks` that are entries of `default_hooks` now: its name, and the settings they stand for.
# None: their work is done without a hook.
HOOKS: dict[str, tuple[str, dict[str, Any]] | None] = {
    'WeightTransferHook': None,
    'GroupLrHook': ('tensorboard', {'lr': True}),
    'GradNormHook': ('tensorboard', {'grad_norm': True}),
    'BoardHook': ('tensorboard', {}),
    'BoardPicturesHook': ('tensorboard', {'pictures': 4}),
    'ResultsHook': ('results', {}),
    'SaveValidatedHook': None,
    'StopHook': None,
}
# What they are without any of these.
_PLAIN: dict[str, dict[str, Any]] = {
    'tensorboard': {'type': 'TensorBoardHook', 'lr': False, 'grad_norm': False, 'pictures': 0},
    'results': {'type': 'ResultsHook'},
}
# MMEngine adds these by itself unless they are None, and refuses None for others.
_MMENGINE = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')


def rename_keys(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted overrides by their present names."""
    renamed = {}
    for key, value in pairs.items():
        old = max((o for o in KEYS if key == o or key.startswith(f'{o}.')), key=len, default='')
        renamed[KEYS.get(old, '') + key[len(old) :]] = TYPES.get(value, value) if isinstance(value, str) else value
    return renamed


def translate(cfg: Config) -> Message | None:
    """Rewrite the old names of a config in place; a note on them, if there are any."""
    found = _rename_types(cfg) + _move_settings(cfg) + _move_hooks(cfg)
    return Message('config-old-names', names=', '.join(dict.fromkeys(found))) if found else None


def drop_removed(cfg: Config) -> None:
    """Take out the entries of `default_hooks` that were set to None, in place."""
    hooks = cfg.get('default_hooks') or {}
    for name in [n for n, hook in hooks.items() if hook is None and n not in _MMENGINE]:
        del hooks[name]


def _rename_types(cfg: Config) -> list[str]:
    backends = (cfg.get('visualizer') or {}).get('vis_backends') or []
    nodes = [*(cfg.get('default_hooks') or {}).values(), *backends, *(cfg.get('vis_backends') or [])]
    found = []
    for node in nodes:
        if isinstance(node, dict) and str(node.get('type')) in TYPES:
            found.append(node['type'])
            node['type'] = TYPES[node['type']]
    return found


def _move_settings(cfg: Config) -> list[str]:
    hooks = cfg.get('default_hooks') or {}
    if 'bad_numbers' not in hooks:
        return []
    old = hooks.pop('bad_numbers')
    watch = {key: old.pop(key) for key in ('factor', 'window') if old and key in old}
    for name, kind, given in (('nonfinite', 'NonFiniteHook', old), ('divergence', 'DivergenceHook', watch)):
        hooks[name] = None if old is None else {'type': kind, **(hooks.get(name) or {}), **given}
    return ['default_hooks.bad_numbers']


def _move_hooks(cfg: Config) -> list[str]:
    old = [hook for hook in cfg.get('custom_hooks') or [] if isinstance(hook, dict) and str(hook.get('type')) in HOOKS]
    if not {hook['type'] for hook in old} - {'ResultsHook'}:
        return []
    # A list of an earlier release: what it does not name was left out on purpose.
    moved: dict[str, Any] = dict.fromkeys(_PLAIN)
    for hook in old:
        target = HOOKS[hook['type']]
        if target is not None:
            name, settings = target
            given = {'pictures' if key == 'num_images' else key: hook[key] for key in hook if key != 'type'}
            moved[name] = {**(moved[name] or _PLAIN[name]), **settings, **given}
    cfg.setdefault('default_hooks', {}).update(moved)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook not in old]
    return [hook['type'] for hook in old]
