"""Settings that nothing reads, found by the signatures of what a config names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config


# What the Runner and the tools read at the top of a config. Any other name there is a helper
# variable (`data_root`, `train_pipeline`), and suspicious only if it is almost one of these.
TOP_LEVEL = (
    'activation_checkpointing',
    'auto_scale_lr',
    'cfg',
    'compile',
    'custom_hooks',
    'custom_imports',
    'data_preprocessor',
    'default_hooks',
    'default_scope',
    'demo_data',
    'efficient_conv_bn_eval',
    'env_cfg',
    'experiment_name',
    'launcher',
    'load_from',
    'log_level',
    'log_processor',
    'model',
    'model_wrapper_cfg',
    'optim_wrapper',
    'param_scheduler',
    'randomness',
    'resume',
    'runner_type',
    'test_cfg',
    'test_dataloader',
    'test_evaluator',
    'train_cfg',
    'train_dataloader',
    'tta_model',
    'tta_pipeline',
    'val_cfg',
    'val_dataloader',
    'val_evaluator',
    'visualizer',
    'weights',
    'work_dir',
    'sync_buffers',
)
# Helper variables that the bases define, near enough to the names above to be taken for typos.
HELPERS = ('train_pipeline', 'test_pipeline', 'val_pipeline', 'vis_backends')
# Keys that builders take off before they call the class.
_BUILDER_KEYS = {
    'type',
    '_scope_',
    '_delete_',
    'priority',
    'constructor',
    'paramwise_cfg',
    'convert_to_iter_based',
    'init_cfg',
}
_LOADER_KEYS = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn', 'num_batch_per_epoch'}
# mmcv's layer builders take keys of their own beside those of the layer.
_LAYER_CFGS = ('norm_cfg', 'act_cfg', 'conv_cfg', 'upsample_cfg', 'dcn')
# Dicts without a type, and all the keys that the Runner or the toolkit reads of them.
_PLAIN_DICTS = {
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'env_cfg.dist_cfg': {'backend', 'init_backend', 'timeout', 'init_method', 'port'},
    'randomness': {'seed', 'diff_rank_seed', 'deterministic'},
    'weights': {'checkpoint', 'url', 'fallbacks', 'reinit', 'into', 'ignore', 'head_init', 'aliases'},
}
FREE_FORM = ('custom_keys', 'reinit', 'aliases')


def check_keys(cfg: Config) -> list[str]:
    """Find settings that nothing reads: misspelt names at the top and arguments of classes.

    Returns:
        One line for each, with a suggestion where one is near.
    """
    problems = []
    for key in cfg:
        near = difflib.get_close_matches(key, TOP_LEVEL, 1, 0.85)
        if key not in TOP_LEVEL + HELPERS and near:
            problems.append(f'{key}: did you mean {near[0]}?')
    for place, node in _dicts(cfg._cfg_dict):
        if not ('type' in node or place.endswith('_dataloader') or place in _PLAIN_DICTS) or place.endswith(
            _LAYER_CFGS
        ):
            continue
        accepted, closed = accepted_keys(node, place)
        found = (unknown_key_problem(f'{place}.{key}', place, accepted, closed) for key in node)
        problems += [problem for problem in found if problem]
    return problems


def _dicts(node: Any, place: str = '') -> Iterator[tuple[str, Mapping]]:
    """All dicts of a config with their dotted place, but for those with free-form keys."""
    if isinstance(node, Mapping):
        if place:
            yield place, node
        for key, value in node.items():
            if key not in FREE_FORM:
                yield from _dicts(value, f'{place}.{key}' if place else key)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _dicts(value, f'{place}.{i}')


def accepted_keys(node: Mapping, place: str) -> tuple[set[str], bool]:
    """Keys that whatever reads a dict takes, and whether it takes no others."""
    if place.endswith('_dataloader'):
        from torch.utils.data import DataLoader

        return {*inspect.signature(DataLoader).parameters, *_LOADER_KEYS}, True
    if place in _PLAIN_DICTS:
        return _PLAIN_DICTS[place] | {'_scope_', '_delete_'}, True
    cls = _find_class(node.get('type'))
    accepted = set(_BUILDER_KEYS)
    if cls is None:
        return accepted, False
    for base in inspect.getmro(cls) if inspect.isclass(cls) else [cls]:
        init = base.__dict__.get('__init__') if inspect.isclass(base) else base
        if init is None:
            continue
        try:
            parameters = inspect.signature(init).parameters
        except (TypeError, ValueError):
            break
        accepted |= {n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return accepted, True
    return accepted, False


def unknown_key_problem(dotted: str, place: str, known: set[str], closed: bool) -> str | None:
    """What is wrong with a key that is not among the known ones, or None."""
    part = dotted.rpartition('.')[2]
    if part in known:
        return None
    # A class that takes any keyword may read this one, unless it is almost one it names.
    near = difflib.get_close_matches(part, sorted(known - {'self'}), 1, 0.6 if closed else 0.85)
    if near:
        return f'{dotted}: did you mean {near[0]}?'
    return f'{dotted}: {place or "the config"} has no {part}' if closed else None


def _find_class(kind: Any) -> Any:
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    from mmdet import registry
    from mmengine.registry import Registry

    for candidate in vars(registry).values():
        # The module also holds MMEngine's registries, where `LoadAnnotations` is another class.
        if isinstance(candidate, Registry) and candidate.scope == 'mmdet':
            found = candidate.get(kind)
            if found is not None:
                return found
    return None
