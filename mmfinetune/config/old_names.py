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
# Entries of `custom_hooks` that are entries of `default_hooks` now: name, type and the settings that stood for them.
# None: their work is done without a hook.
HOOKS: dict[str, tuple[str, str, dict[str, Any]] | None] = {
    'WeightTransferHook': None,
    'GroupLrHook': ('tensorboard', 'TensorBoardHook', {'lr': True}),
    'GradNormHook': ('tensorboard', 'TensorBoardHook', {'grad_norm': True}),
    'BoardHook': ('tensorboard', 'TensorBoardHook', {}),
    'BoardPicturesHook': ('tensorboard', 'TensorBoardHook', {'pictures': 4}),
    'ResultsHook': ('results', 'ResultsHook', {}),
    'SaveValidatedHook': None,
    'StopHook': None,
}
_SETTINGS = {'num_images': 'pictures'}
_OFF = {'lr': False, 'grad_norm': False, 'pictures': 0}
# A list with one of these is of an earlier release: what it does not name was left out on purpose.
_RETIRED = HOOKS.keys() - {'ResultsHook'}
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
    """Rewrite the old names of a config in place.

    Returns:
        A note on what was found; None for nothing.
    """
    found = _rename_types(cfg) + _move_settings(cfg) + _move_hooks(cfg)
    if not found:
        return None
    return Message(
        'config-old-names',
        'the config has names of an earlier release, which will be removed in the next: {names}',
        names=', '.join(dict.fromkeys(found)),
    )


def drop_removed(cfg: Config) -> None:
    """Take out the entries of `default_hooks` that were set to None, in place."""
    hooks = cfg.get('default_hooks') or {}
    for name in [n for n, hook in hooks.items() if hook is None and n not in _MMENGINE]:
        del hooks[name]


def _rename_types(cfg: Config) -> list[str]:
    found = []
    visualizer = cfg.get('visualizer') or {}
    hooks = (cfg.get('default_hooks') or {}).values()
    places = [*hooks, *(cfg.get('custom_hooks') or ()), *(visualizer.get('vis_backends') or ())]
    places += cfg.get('vis_backends') or []
    for node in places:
        if isinstance(node, dict) and node.get('type') in TYPES:
            found.append(node['type'])
            node['type'] = TYPES[node['type']]
    return found


def _move_settings(cfg: Config) -> list[str]:
    hooks = cfg.get('default_hooks') or {}
    if 'bad_numbers' not in hooks:
        return []
    old = hooks.pop('bad_numbers')
    if old is None:
        hooks.update(nonfinite=None, divergence=None)
    else:
        watch = {key: old.pop(key) for key in ('factor', 'window') if key in old}
        hooks['nonfinite'] = {'type': 'NonFiniteHook', **(hooks.get('nonfinite') or {}), **old}
        hooks['divergence'] = {'type': 'DivergenceHook', **(hooks.get('divergence') or {}), **watch}
    return ['default_hooks.bad_numbers']


def _move_hooks(cfg: Config) -> list[str]:
    old = [hook for hook in cfg.get('custom_hooks') or [] if isinstance(hook, dict) and hook.get('type') in HOOKS]
    if not any(hook['type'] in _RETIRED for hook in old):
        return []
    moved: dict[str, dict[str, Any]] = {}
    for hook in old:
        target = HOOKS[hook['type']]
        if target is not None:
            name, kind, settings = target
            given = {_SETTINGS.get(str(key), str(key)): value for key, value in hook.items() if key != 'type'}
            moved.setdefault(name, {'type': kind, **(_OFF if name == 'tensorboard' else {})}).update(
                {**settings, **given}
            )
    hooks = cfg.setdefault('default_hooks', {})
    for name in ('tensorboard', 'results'):
        hooks[name] = moved.get(name)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook not in old]
    return [hook['type'] for hook in old]
