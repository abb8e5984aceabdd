"""Load, check, compare and flatten configs."""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import old_names
from mmfinetune.config.keys import FREE_FORM, HELPERS, TOP_LEVEL, accepted_keys, check_keys, unknown_key_problem
from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

NEEDED = ('model', 'train_dataloader', 'optim_wrapper', 'train_cfg', 'work_dir')


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
        raise UserError(
            f'There is no config {path}',
            cure=f'did you mean {" or ".join(str(folder / n) for n in near)}?'
            if near
            else 'the configs that come with the toolkit are in configs/',
        )
    if path.suffix != '.py':
        raise UserError(
            f'{path} is no config: its name does not end in .py',
            cure='pass a Python config such as configs/mask_rcnn_voc_pretrained.py',
        )
    try:
        compile(path.read_text(encoding='utf-8'), str(path), 'exec')
    except (SyntaxError, ValueError) as error:
        line = getattr(error, 'lineno', None)
        raise UserError(
            f'{path}{f", line {line}" if line else ""}: {error}', cure='mend the Python syntax there'
        ) from None
    from mmengine.config import Config
    from mmengine.utils import import_modules_from_strings

    try:
        cfg = Config.fromfile(str(path), import_custom_modules=False)
        if cfg.get('custom_imports'):
            with quiet_imports():
                import_modules_from_strings(**cfg['custom_imports'])
    except Exception as error:
        # A config is code; whatever it raises is the user's to see, with the place.
        raise UserError(
            f'{path} cannot be read: {type(error).__name__}: {error}', cure='mend the config, or the _base_ it names'
        ) from None
    note = old_names.translate(cfg)
    if note is not None:
        print(f'note: {path}: {note}', file=sys.stderr, flush=True)
    problems = []
    if overrides:
        problems = merge(cfg, old_names.rename_keys(parse_overrides(overrides)))
    old_names.drop_removed(cfg)
    problems += check_keys(cfg)
    if problems:
        raise UserError(
            f'{path}: settings that nothing reads:',
            problems,
            'mend the spelling; `python tools/flatten_config.py CONFIG` prints all keys',
        )
    missing = [k for k in NEEDED if k not in cfg]
    if missing:
        raise UserError(
            f'{path} lacks settings that a run needs:', missing, 'inherit from configs/mask_rcnn_voc_pretrained.py'
        )
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
        raise UserError('--cfg-options takes KEY=VALUE, not:', wrong, 'e.g. --cfg-options train_cfg.max_epochs=12')
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument('--options', nargs='+', action=DictAction)
    try:
        return parser.parse_args(['--options', *pairs]).options
    except (AssertionError, argparse.ArgumentError) as error:
        raise UserError(
            f'--cfg-options cannot be read: {error}', cure='quote lists: --cfg-options "a.b=[1,2]"'
        ) from None


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
                    problems.append(
                        f'{dotted}: {place} is a list of {len(node)}, give a position from 0 to {len(node) - 1}'
                    )
                    break
                node = node[int(part)]
                continue
            if not isinstance(node, Mapping):
                problems.append(f'{dotted}: {place} is {node!r} and has no parts')
                break
            if part not in node:
                if depth and parts[depth - 1] in FREE_FORM:
                    break
                accepted, closed = accepted_keys(node, place) if depth else ({*TOP_LEVEL, *HELPERS}, True)
                # A dict without a type has no signature: only the keys it has are known. Hooks may
                # be added under any name.
                closed = closed or ('type' not in node and place != 'default_hooks')
                problem = unknown_key_problem('.'.join(parts[: depth + 1]), place, {*node, *accepted}, closed)
                problems += [problem] if problem else []
                break
            node = node[part]
    if not problems:
        # Lists are merged by position only: `a.0.b=1` changes, `a=[1]` replaces.
        cfg.merge_from_dict(dict(overrides), allow_list_keys=True)
    return problems
