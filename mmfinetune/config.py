"""Load, check, compare and flatten configs."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.errors import UserError
from mmfinetune.files import atomic_write_text

if TYPE_CHECKING:
    from mmengine.config import Config

# What the Runner and the tools read at the top of a config. Any other name there is a helper
# variable (`data_root`, `train_pipeline`), and suspicious only if it is almost one of these.
TOP_LEVEL = (
    'activation_checkpointing', 'auto_scale_lr', 'cfg', 'compile', 'custom_hooks', 'custom_imports',
    'data_preprocessor', 'default_hooks', 'default_scope', 'demo_data', 'efficient_conv_bn_eval',
    'env_cfg', 'experiment_name', 'launcher', 'load_from', 'log_level', 'log_processor', 'model',
    'model_wrapper_cfg', 'optim_wrapper', 'param_scheduler', 'randomness', 'resume', 'runner_type',
    'test_cfg', 'test_dataloader', 'test_evaluator', 'train_cfg', 'train_dataloader', 'tta_model',
    'tta_pipeline', 'val_cfg', 'val_dataloader', 'val_evaluator', 'visualizer', 'weights',
    'work_dir', 'sync_buffers')
# Helper variables that the bases define, near enough to the names above to be taken for typos.
_HELPERS = ('train_pipeline', 'test_pipeline', 'val_pipeline', 'vis_backends')
NEEDED = ('model', 'train_dataloader', 'optim_wrapper', 'train_cfg', 'work_dir')
# Keys that builders take off before they call the class.
_BUILDER_KEYS = {'type', '_scope_', '_delete_', 'priority', 'constructor', 'paramwise_cfg',
                 'convert_to_iter_based', 'init_cfg'}
_LOADER_KEYS = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn',
                'num_batch_per_epoch'}
# mmcv's layer builders take keys of their own beside those of the layer.
_LAYER_CFGS = ('norm_cfg', 'act_cfg', 'conv_cfg', 'upsample_cfg', 'dcn')
# Dicts without a type, and all the keys that the Runner or the toolkit reads of them.
_PLAIN_DICTS = {
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'env_cfg.dist_cfg': {'backend', 'init_backend', 'timeout', 'init_method', 'port'},
    'randomness': {'seed', 'diff_rank_seed', 'deterministic'},
    'weights': {'checkpoint', 'url', 'fallbacks', 'reinit', 'into', 'ignore', 'head_init',
                'aliases'},
}
_FREE_FORM = ('custom_keys', 'reinit', 'aliases')


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``KEY=VALUE`` overrides.

    Args:
        path: A Python config.
        overrides: As given to ``--cfg-options``.

    Returns:
        The merged config, registered parts imported, keys checked.

    Raises:
        UserError: The file is missing or broken, or keys are unknown; all of them, each with a
            suggestion.
    """
    path = Path(path)
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path('configs')
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob('*.py')], 3, 0.5)
        raise UserError(f'There is no config {path}',
                        cure=f'did you mean {" or ".join(str(folder / n) for n in near)}?'
                        if near else 'the configs that come with the toolkit are in configs/')
    if path.suffix != '.py':
        raise UserError(f'{path} is no config: its name does not end in .py',
                        cure='pass a Python config such as configs/mask_rcnn_voc_pretrained.py')
    try:
        compile(path.read_text(encoding='utf-8'), str(path), 'exec')
    except (SyntaxError, ValueError) as error:
        line = getattr(error, 'lineno', None)
        raise UserError(f'{path}{f", line {line}" if line else ""}: {error}',
                        cure='mend the Python syntax there') from None
    with quiet_imports():
        import mmfinetune.register  # noqa: F401
    from mmengine.config import Config
    from mmengine.utils import import_modules_from_strings
    try:
        cfg = Config.fromfile(str(path), import_custom_modules=False)
        if cfg.get('custom_imports'):
            import_modules_from_strings(**cfg['custom_imports'])
    except Exception as error:
        # A config is code; whatever it raises is the user's to see, with the place.
        raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}',
                        cure='mend the config, or the _base_ it names') from None
    problems = []
    if overrides:
        problems = merge(cfg, parse_overrides(overrides))
    problems += check_keys(cfg)
    if problems:
        raise UserError(f'{path}: settings that nothing reads:', problems,
                        'mend the spelling; `python tools/flatten_config.py CONFIG` prints '
                        'all keys')
    missing = [k for k in NEEDED if k not in cfg]
    if missing:
        raise UserError(f'{path} lacks settings that a run needs:', missing,
                        'inherit from configs/mask_rcnn_voc_pretrained.py')
    return cfg


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence what mmdet says of optional packages that nothing here uses."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        yield


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``['a.b=1', 'c=[1,2]']`` to ``{'a.b': 1, 'c': [1, 2]}`` by MMEngine's own rules."""
    import argparse

    from mmengine.config import DictAction
    wrong = [p for p in pairs if '=' not in p or not p.split('=')[0]]
    if wrong:
        raise UserError('--cfg-options takes KEY=VALUE, not:', wrong,
                        'e.g. --cfg-options train_cfg.max_epochs=12')
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument('--options', nargs='+', action=DictAction)
    try:
        return parser.parse_args(['--options', *pairs]).options
    except (AssertionError, argparse.ArgumentError) as error:
        raise UserError(f'--cfg-options cannot be read: {error}',
                        cure='quote lists: --cfg-options "a.b=[1,2]"') from None


def merge(cfg: Config, overrides: Mapping[str, Any]) -> list[str]:
    """Merge dotted overrides into a config.

    A key that is not there is taken only where the ``type`` beside it accepts it.

    Returns:
        One line for each unknown key; nothing is merged then.
    """
    problems = []
    for dotted in overrides:
        node: Any = cfg._cfg_dict
        parts = dotted.split('.')
        for depth, part in enumerate(parts):
            place = '.'.join(parts[:depth])
            if isinstance(node, Sequence) and not isinstance(node, str):
                if not part.isdigit() or int(part) >= len(node):
                    problems.append(f'{dotted}: {place} is a list of {len(node)}, '
                                    f'give a position from 0 to {len(node) - 1}')
                    break
                node = node[int(part)]
                continue
            if not isinstance(node, Mapping):
                problems.append(f'{dotted}: {place} is {node!r} and has no parts')
                break
            if part not in node:
                if depth and parts[depth - 1] in _FREE_FORM:
                    break
                accepted, closed = _accepted(node, place) if depth else \
                    ({*TOP_LEVEL, *_HELPERS}, True)
                # A dict without a type has no signature: only the keys it has are known. Hooks may
                # be added under any name.
                closed = closed or 'type' not in node and place != 'default_hooks'
                problem = _judge('.'.join(parts[:depth + 1]), place, {*node, *accepted}, closed)
                problems += [problem] if problem else []
                break
            node = node[part]
    if not problems:
        # Lists are merged by position only: `a.0.b=1` changes, `a=[1]` replaces.
        cfg.merge_from_dict(dict(overrides), allow_list_keys=True)
    return problems


def check_keys(cfg: Config) -> list[str]:
    """Find settings that nothing reads: misspelt names at the top and arguments of classes.

    Returns:
        One line for each, with a suggestion where one is near.
    """
    problems = []
    for key in cfg:
        near = difflib.get_close_matches(key, TOP_LEVEL, 1, 0.85)
        if key not in TOP_LEVEL + _HELPERS and near:
            problems.append(f'{key}: did you mean {near[0]}?')
    if cfg.get('weights') and not any(hook.get('type') == 'WeightTransferHook'
                                      for hook in cfg.get('custom_hooks') or []):
        # A list in a config replaces that of its base.
        problems.append('weights: nothing loads them, since custom_hooks lacks '
                        "dict(type='WeightTransferHook')")
    for place, node in _dicts(cfg._cfg_dict):
        if not ('type' in node or place.endswith('_dataloader') or place in _PLAIN_DICTS) \
                or place.endswith(_LAYER_CFGS):
            continue
        accepted, closed = _accepted(node, place)
        found = (_judge(f'{place}.{key}', place, accepted, closed) for key in node)
        problems += [problem for problem in found if problem]
    return problems


def _dicts(node: Any, place: str = '') -> Iterator[tuple[str, Mapping]]:
    """All dicts of a config with their dotted place, but for those with free-form keys."""
    if isinstance(node, Mapping):
        if place:
            yield place, node
        for key, value in node.items():
            if key not in _FREE_FORM:
                yield from _dicts(value, f'{place}.{key}' if place else key)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _dicts(value, f'{place}.{i}')


def _accepted(node: Mapping, place: str) -> tuple[set[str], bool]:
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
        accepted |= {n for n, p in parameters.items()
                     if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return accepted, True
    return accepted, False


def _judge(dotted: str, place: str, known: set[str], closed: bool) -> str | None:
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


def evaluators(cfg: Config, split: str) -> list:
    """The evaluator configs of a split, whether the config gives none, one or a list."""
    found = cfg.get(f'{split}_evaluator') or []
    return found if isinstance(found, list) else [found]


def plain(value: Any, keep_tuples: bool = False) -> Any:
    """A config as plain dicts, lists and values, without what does not change the run.

    ``_scope_`` (of ``mmdet::`` bases) and leftover ``_delete_`` are dropped.

    Args:
        value: A config or a part of it.
        keep_tuples: Tuples become lists otherwise, so that the two compare as equal. They must
            stay for a config to be run: mmcv's Resize takes a tuple only.
    """
    if isinstance(value, Mapping):
        return {k: plain(v, keep_tuples) for k, v in value.items()
                if k not in ('_scope_', '_delete_')}
    if isinstance(value, (list, tuple)):
        kind = tuple if keep_tuples and isinstance(value, tuple) else list
        return kind(plain(v, keep_tuples) for v in value)
    return value


def settings(cfg: Config, keep_tuples: bool = False) -> dict:
    """What the run reads of a config: the helper variables left out."""
    return {k: plain(v, keep_tuples) for k, v in cfg.items() if k in TOP_LEVEL}


def differences(ours: Any, theirs: Any, place: str = '') -> list[str]:
    """One line for each setting in which two plain configs differ."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        lines = []
        for key in sorted({*ours, *theirs}, key=str):
            where = f'{place}.{key}' if place else str(key)
            if key not in theirs:
                lines.append(f'{where}: {ours[key]!r} only in the first')
            elif key not in ours:
                lines.append(f'{where}: {theirs[key]!r} only in the second')
            else:
                lines += differences(ours[key], theirs[key], where)
        return lines
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [line for i, pair in enumerate(zip(ours, theirs, strict=True))
                for line in differences(*pair, f'{place}.{i}')]
    return [] if ours == theirs else [f'{place}: {ours!r} against {theirs!r}']


def compare(first: str | Path, second: str | Path) -> list[str]:
    """One line for each setting in which two config files differ; empty if they are one run."""
    return differences(settings(load(first)), settings(load(second)))


def flatten(path: str | Path) -> str:
    """The resolved config as the text of a file without ``_base_``."""
    from mmengine.config import Config
    resolved = settings(load(path), keep_tuples=True)
    order = [k for k in _READING_ORDER if k in resolved] + sorted(set(resolved)
                                                                  - set(_READING_ORDER))
    text = '\n\n'.join(Config({k: resolved[k]}).pretty_text.strip() for k in order)
    return f'# The resolved settings of {Path(path).name}, without _base_.\n\n{text}\n'


def write_new(path: Path, text: str) -> None:
    """Write a config file that is not there yet.

    Raises:
        UserError: It is there, or cannot be written.
    """
    if path.exists():
        raise UserError(f'{path} is there already', cure='name another file, or delete it')
    atomic_write_text(path, text)


_READING_ORDER = ('default_scope', 'custom_imports', 'work_dir', 'model', 'weights',
                  'train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator',
                  'test_evaluator', 'train_cfg', 'val_cfg', 'test_cfg', 'optim_wrapper',
                  'param_scheduler', 'auto_scale_lr', 'default_hooks', 'custom_hooks')
