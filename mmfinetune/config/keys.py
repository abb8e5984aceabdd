"""Settings that are unknown, found by the signatures of what a config names, or out of bounds."""

# ruff: noqa: SIM905 - the tables below are words, and a literal would take a line for each
from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import old_names, views
from mmfinetune.data.layout import SPLITS
from mmfinetune.utils.errors import Message

if TYPE_CHECKING:
    from mmengine.config import Config


# What the Runner and the tools read at the top of a config. Any other name there is a helper
# variable (`data_root`, `train_pipeline`), and suspicious only if it is almost one of these.
TOP_LEVEL = tuple(
    """
    activation_checkpointing auto_scale_lr cfg compile custom_hooks custom_imports data_preprocessor
    default_hooks default_scope demo_data efficient_conv_bn_eval env_cfg experiment_name launcher load_from
    log_level log_processor model model_wrapper_cfg optim_wrapper param_scheduler randomness resume runner_type
    test_cfg test_dataloader test_evaluator train_cfg train_dataloader tta_model tta_pipeline val_cfg
    val_dataloader val_evaluator visualizer weights work_dir sync_buffers
    """.split()
)
# Helper variables that the bases define, near enough to the names above to be taken for typos.
HELPERS = ('train_pipeline', 'test_pipeline', 'val_pipeline', 'vis_backends')
# What MMEngine's own reading of configs leaves in them.
LEFT_OVER = {'_scope_', '_delete_'}
# Keys that builders take off before they call the class.
_BUILDER_KEYS = LEFT_OVER | {'type', 'priority', 'constructor', 'paramwise_cfg', 'convert_to_iter_based', 'init_cfg'}
_LOADER_KEYS = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn', 'num_batch_per_epoch'}
# mmcv's layer builders take keys of their own in addition to those of the layer.
_LAYER_CFGS = ('norm_cfg', 'act_cfg', 'conv_cfg', 'upsample_cfg', 'dcn')
# Dicts without a type, and all the keys that the Runner or the toolkit reads of them.
_PLAIN_DICTS = {
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'env_cfg.dist_cfg': {'backend', 'init_backend', 'timeout', 'init_method', 'port'},
    'randomness': {'seed', 'diff_rank_seed', 'deterministic'},
    'weights': {'checkpoint', 'url', 'fallbacks', 'reinit', 'into', 'ignore', 'head_init', 'aliases'},
}
# Searched for a type in this order; MMEngine's registries are asked by these where they do not have it.
_REGISTRIES = tuple(
    """
    RUNNERS RUNNER_CONSTRUCTORS LOOPS HOOKS DATASETS DATA_SAMPLERS TRANSFORMS MODELS MODEL_WRAPPERS
    WEIGHT_INITIALIZERS OPTIMIZERS OPTIM_WRAPPERS OPTIM_WRAPPER_CONSTRUCTORS PARAM_SCHEDULERS METRICS EVALUATOR
    TASK_UTILS VISUALIZERS VISBACKENDS LOG_PROCESSORS
    """.split()
)
NEEDED = ('model', 'train_dataloader', 'optim_wrapper', 'train_cfg', 'work_dir')
DICTS = tuple(
    """
    model train_dataloader val_dataloader test_dataloader optim_wrapper train_cfg val_cfg test_cfg auto_scale_lr
    default_hooks env_cfg log_processor randomness visualizer weights
    """.split()
)
# Numbers that a run would crash on, or be ruined by: whether whole, and the lowest; POSITIVE is above 0.
POSITIVE = math.ulp(0.0)
_NUMBERS = {
    'optim_wrapper.optimizer.lr': (False, 0),
    'optim_wrapper.optimizer.momentum': (False, 0),
    'optim_wrapper.optimizer.weight_decay': (False, 0),
    'optim_wrapper.clip_grad.max_norm': (False, POSITIVE),
    'optim_wrapper.paramwise_cfg.custom_keys.*.lr_mult': (False, 0),
    'optim_wrapper.paramwise_cfg.custom_keys.*.decay_mult': (False, 0),
    'optim_wrapper.accumulative_counts': (True, 1),
    'train_dataloader.batch_size': (True, 1),
    'train_cfg.max_epochs': (True, 1),
    'train_cfg.max_iters': (True, 1),
    'train_cfg.val_interval': (True, 1),
    'train_cfg.val_begin': (True, 0),
    'default_hooks.checkpoint.every_n_iters': (True, 1),
    'model.test_cfg.*.score_thr': (False, 0),
    'model.test_cfg.*.max_per_img': (True, -1),  # for no limit
    'weights.reinit.*.std': (False, 0),
}
# Those that may be None.
_OPTIONAL = {'default_hooks.checkpoint.every_n_iters'}
_LOG_LEVELS = ('CRITICAL', 'ERROR', 'WARNING', 'INFO', 'DEBUG', 'NOTSET')
# The words of annotations that take no text.
_NO_TEXT = set('bool int float None NoneType Optional Union List Tuple Sequence list tuple typing'.split())
FREE_FORM = ('custom_keys', 'reinit', 'aliases')


def check_keys(cfg: Config) -> list[Message]:
    """Find unknown settings: misspelt names at the top and arguments of classes."""
    problems = []
    for key in cfg:
        problem = None if key in HELPERS else unknown_key_problem(key, '', {*TOP_LEVEL}, False)
        if problem:
            problems.append(problem)
    for place, node in dicts(cfg.to_dict()):
        if is_judged(node, place):
            accepted, closed = accepted_keys(node, place)
            found = (unknown_key_problem(f'{place}.{key}', place, accepted, closed) for key in node)
            problems += [problem for problem in found if problem]
            problems += _text_for_numbers(node, place)
    return problems


def _text_for_numbers(node: Mapping, place: str) -> Iterator[Message]:
    """Arguments that are text, which many classes only see when they compute, where numbers are due."""
    cls = None if place in _PLAIN_DICTS else _find_class(node.get('type'))
    if place.endswith('_dataloader'):
        from torch.utils.data import DataLoader as cls
    kinds: dict[str, Any] = {}
    for base in reversed(inspect.getmro(cls)) if inspect.isclass(cls) else ():
        kinds.update(getattr(base.__dict__.get('__init__'), '__annotations__', {}))
    for key in [key for key in node if key in kinds]:
        kind = kinds[key] if isinstance(kinds[key], str) else inspect.formatannotation(kinds[key])
        if isinstance(node[key], str) and set(re.findall(r'\w+', kind)) <= _NO_TEXT:
            yield Message('config-text', key=f'{place}.{key}', value=node[key], kind=kind.replace('typing.', ''))


def check_values(cfg: Config) -> list[Message]:
    """Find settings of a kind or size that would crash a run."""
    problems = []
    for key in DICTS:
        if not isinstance(cfg.get(key, {}), Mapping) and (key in NEEDED or cfg[key] is not None):
            problems.append(Message('config-not-a-dict', key=key, value=cfg[key]))
    for key, (whole, lowest) in _NUMBERS.items():
        *parents, last = key.split('.')
        kinds = (int,) if whole else (int, float)
        for place, node in _at(cfg, parents):
            if last not in node or (node[last] is None and key in _OPTIONAL):
                continue
            value = node[last]
            # True is an int of Python.
            if isinstance(value, kinds) and not isinstance(value, bool) and lowest <= value < math.inf:
                continue
            facts = dict(key=f'{place}{last}', value=value, lowest=lowest)
            if whole:
                problems.append(Message('config-not-whole', **facts))
            elif lowest == POSITIVE:
                problems.append(Message('config-not-positive', **facts))
            else:
                problems.append(Message('config-not-a-number', **facts))
    told = {problem.facts['key'] for problem in problems}
    settings = {key: value for key, value in cfg.to_dict().items() if key in TOP_LEVEL}
    problems += [Message('config-nan', key=key) for key in _nan(settings) if key not in told]
    for place, node in _at(cfg, ['weights', 'reinit']):
        layers = [(f'{place}{layer}', init) for layer, init in node.items()]
        problems += [Message('config-not-a-dict', key=k, value=v) for k, v in layers if not isinstance(v, Mapping)]
    if not (isinstance(cfg.get('work_dir', '.'), str) and cfg.get('work_dir', '.')):
        problems.append(Message('config-not-text', key='work_dir', value=cfg.work_dir))
    if cfg.get('log_level', 'INFO') not in _LOG_LEVELS:
        problems.append(Message('config-choice', key='log_level', value=cfg.log_level, choices=', '.join(_LOG_LEVELS)))
    return problems


def _nan(node: Any, place: str = '') -> Iterator[str]:
    """The dotted places of what is not a number: no setting means that."""
    if isinstance(node, Mapping):
        items: Any = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        if isinstance(node, float) and math.isnan(node):
            yield place
        return
    for key, value in items:
        yield from _nan(value, f'{place}.{key}' if place else str(key))


def check_data(cfg: Config) -> list[Message]:
    """Find data settings of a kind that would crash a run, or make its numbers wrong."""
    problems: list[Message] = []
    for split in SPLITS:
        for place, dataset in views.parts_of(cfg, split):
            problems += _check_dataset(dataset, place)
        if split != 'train':
            problems += _check_evaluation(cfg, split)
    return problems


def _check_dataset(dataset: Mapping, place: str) -> Iterator[Message]:
    if 'type' not in dataset:
        yield Message('config-no-type', key=place)
    for key in ('metainfo', 'data_prefix', 'filter_cfg'):
        if not isinstance(dataset.get(key) or {}, Mapping):
            yield Message('config-not-a-dict', key=f'{place}.{key}', value=dataset[key])
    for key in ('ann_file', 'data_root'):
        if isinstance(dataset.get(key), (list, tuple)):
            yield Message('config-list-of-files', key=f'{place}.{key}')
        elif not isinstance(dataset.get(key) or '', (str, os.PathLike)):
            yield Message('config-not-text', key=f'{place}.{key}', value=dataset[key])
    for key in ('data_prefix', 'filter_cfg'):
        for name, value in (dataset[key] if isinstance(dataset.get(key), Mapping) else {}).items():
            if key == 'data_prefix' and not isinstance(value, (str, os.PathLike)):
                yield Message('config-not-text', key=f'{place}.{key}.{name}', value=value)
            if name == 'min_size' and not isinstance(value, (int, float)):
                yield Message('config-not-a-number', key=f'{place}.{key}.{name}', value=value, lowest=0)
    metainfo = dataset.get('metainfo')
    classes = metainfo.get('classes') if isinstance(metainfo, Mapping) else None
    if isinstance(classes, str):
        if not Path(classes).is_file():
            yield Message('config-classes-text', key=f'{place}.metainfo.classes', value=classes)
    elif classes is not None and not (
        isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    ):
        yield Message('config-classes', key=f'{place}.metainfo.classes', value=classes)


def _check_evaluation(cfg: Config, split: str) -> Iterator[Message]:
    """What would leave images of a split out of its numbers."""
    loader = cfg.get(f'{split}_dataloader') or {}
    sampler = loader.get('sampler')
    kind = sampler.get('type') if isinstance(sampler, Mapping) else None
    if isinstance(kind, str) and not kind.endswith('DefaultSampler'):
        yield Message('config-eval-sampler', key=f'{split}_dataloader.sampler', type=kind)
    for key in ('drop_last', 'num_batch_per_epoch'):
        if loader.get(key):
            yield Message('config-eval-part', key=f'{split}_dataloader.{key}', value=loader[key])
    for place, dataset in views.parts_of(cfg, split):
        kinds = [evaluator.get('type') for evaluator in views.evaluators(cfg, split) if evaluator.get('ann_file')]
        if dataset.get('indices') is not None and not {'CocoMetric', 'mmdet.CocoMetric'}.isdisjoint(map(str, kinds)):
            yield Message('config-eval-indices', key=f'{place}.indices', evaluator=f'{split}_evaluator')


def _at(node: Any, parts: Sequence[str], place: str = '') -> Iterator[tuple[str, Any]]:
    """The dicts at a place whose parts may be ``*``, with their dotted name."""
    if not parts:
        yield place, node
        return
    for key in list(node) if parts[0] == '*' else [parts[0]]:
        child = node.get(key)
        if isinstance(child, Mapping):
            yield from _at(child, parts[1:], f'{place}{key}.')


def dicts(node: Any, place: str = '') -> Iterator[tuple[str, Mapping]]:
    """All dicts of a config with their dotted place, except those with free-form keys."""
    if isinstance(node, Mapping):
        if place:
            yield place, node
        for key, value in node.items():
            if key not in FREE_FORM:
                yield from dicts(value, f'{place}.{key}' if place else key)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from dicts(value, f'{place}.{i}')


def accepted_keys(node: Mapping, place: str) -> tuple[set[str], bool]:
    """Keys that whatever reads a dict takes, and whether it takes no others."""
    if place.endswith('_dataloader'):
        from torch.utils.data import DataLoader

        return {*inspect.signature(DataLoader).parameters, *_LOADER_KEYS}, True
    if place in _PLAIN_DICTS:
        return _PLAIN_DICTS[place] | LEFT_OVER, True
    cls = _find_class(node.get('type'))
    accepted = set(_BUILDER_KEYS)
    inits = [base.__dict__.get('__init__') for base in inspect.getmro(cls)] if inspect.isclass(cls) else [cls]
    for init in filter(None, inits):
        try:
            parameters = inspect.signature(init).parameters
        except (TypeError, ValueError):
            break
        accepted |= {n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return accepted, True
    return accepted, False


def is_judged(node: Mapping, place: str) -> bool:
    """Whether all keys that a dict may have are known from what reads it."""
    known = 'type' in node or place.endswith('_dataloader') or place in _PLAIN_DICTS
    return known and not place.endswith(_LAYER_CFGS)


def unknown_key_problem(key: str, place: str, known: set[str], closed: bool) -> Message | None:
    """What is wrong with a dotted key that is not among the known ones, or None.

    Args:
        key: The key.
        place: The dict that it is in.
        known: Names of the keys that this may have.
        closed: Whether it may have no others; else only a name that is almost a known one is wrong.
    """
    name = key.rpartition('.')[2]
    if name in known:
        return None
    if closed and (way := old_names.of_2x(key)):
        return Message('config-2x', key=key, way=way)
    near = difflib.get_close_matches(name, sorted(known - {'self'}), 1, 0.6 if closed else 0.85)
    if near:
        return Message('config-key-near', key=key, near=near[0])
    if not closed:
        return None
    return Message('config-key-unknown', key=key, place=place or 'the config', name=name)


def _find_class(kind: Any) -> Any:
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    from mmdet import registry

    found = (getattr(registry, name).get(kind) for name in _REGISTRIES)
    return next((cls for cls in found if cls is not None), None)
