"""Configs as plain values: compared, and written as one file without ``_base_``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config.keys import LEFT_OVER, TOP_LEVEL
from mmfinetune.config.load import load
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_text

if TYPE_CHECKING:
    from mmengine.config import Config


def plain(value: Any, keep_tuples: bool = False) -> Any:
    """A config as plain dicts, lists and values, without what does not change the run.

    ``_scope_`` (of ``mmdet::`` bases) and leftover ``_delete_`` are dropped.

    Args:
        value: A config or a part of it.
        keep_tuples: Tuples become lists otherwise, so that the two compare as equal. They must
            stay for a config to be run: mmcv's Resize takes a tuple only.
    """
    if isinstance(value, Mapping):
        return {k: plain(v, keep_tuples) for k, v in value.items() if k not in LEFT_OVER}
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
        return [
            line for i, pair in enumerate(zip(ours, theirs, strict=True)) for line in differences(*pair, f'{place}.{i}')
        ]
    return [] if ours == theirs else [f'{place}: {ours!r} against {theirs!r}']


def compare(first: str | Path, second: str | Path) -> list[str]:
    """One line for each setting in which two config files differ; empty if they are one run."""
    return differences(settings(load(first)), settings(load(second)))


def flatten(path: str | Path) -> str:
    """The resolved config as the text of a file without ``_base_``."""
    from mmengine.config import Config

    resolved = settings(load(path), keep_tuples=True)
    order = [k for k in _READING_ORDER if k in resolved] + sorted(set(resolved) - set(_READING_ORDER))
    text = '\n\n'.join(Config({k: resolved[k]}).pretty_text.strip() for k in order)
    return f'# The resolved settings of {Path(path).name}, without _base_.\n\n{text}\n'


def require_new(path: Path, overwrite: bool) -> None:
    """Refuse a file that exists, unless it may be replaced."""
    if path.exists() and not overwrite:
        raise UserError('config-exists', path=str(path))


def write(path: Path, text: str, overwrite: bool = False) -> None:
    """Write a config file; a UserError if it exists and may not be replaced, or cannot be written."""
    require_new(path, overwrite)
    atomic_write_text(path, text)


_READING_ORDER = tuple(
    """
    default_scope custom_imports work_dir model weights train_dataloader val_dataloader test_dataloader
    val_evaluator test_evaluator train_cfg val_cfg test_cfg optim_wrapper param_scheduler auto_scale_lr
    default_hooks custom_hooks
    """.split()  # noqa: SIM905 - a literal would take a line for each
)
