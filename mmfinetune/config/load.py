"""Read a config file and judge it."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.config import old_names, reach
from mmfinetune.config import overrides as config_overrides
from mmfinetune.config.keys import NEEDED, TOP_LEVEL, check_data, check_keys, check_values
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.weights import data_only

if TYPE_CHECKING:
    from mmengine.config import Config

# Makes the parts of the toolkit known by name; configs import it.
REGISTER = 'mmfinetune.register'


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply ``KEY=VALUE`` overrides.

    Returns:
        The merged config, its `custom_imports` imported, keys and values checked.

    Raises:
        UserError: The file is missing or broken, or merged settings are wrong: all of them are named.
    """
    path = Path(path)
    pairs = config_overrides.parse(overrides)
    cfg = _read(path)
    with judging(path):
        sources = reach.read_sources(path)
        if problems := old_names.find_2x(cfg, TOP_LEVEL, reach.unread(sources)):
            raise UserError('config-of-2x', problems=problems, path=str(path))
        if REGISTER not in sys.modules:
            raise UserError('config-no-register', path=str(path), module=REGISTER)
        problems = reach.check(cfg, sources)
        # What is not of the right kind cannot be translated, and is refused below.
        old = None if check_values(cfg) else old_names.translate(cfg)
        dropped, wrong = config_overrides.merge(
            cfg, old_names.rename_keys(pairs), lambda key: reach.shown(reach.places(sources, key))
        )
        old_names.drop_removed(cfg)
        require_valid(cfg, path, [*problems, *wrong])
        missing = [k for k in NEEDED if k not in cfg]
        if missing:
            raise UserError('config-incomplete', problems=missing, path=str(path))
    if os.environ.get('RANK', '0') == '0':
        for note in filter(None, [old, *dropped]):
            print(f'note: {path}: {note}', file=sys.stderr, flush=True)
    return cfg


@contextlib.contextmanager
def judging(path: str | Path) -> Iterator[None]:
    """Say of which config it is that a setting in it is of a kind that nobody foresees.

    Raises:
        UserError: The block stumbled over a value.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, OSError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        facts = dict(kind=type(error).__name__, why=str(error), place=f'{place.name}: {place.line}')
        raise UserError('config-value', path=str(path), **facts) from error


def require_valid(cfg: Config, path: str | Path, problems: Sequence[Message] = ()) -> None:
    """Raise a UserError with the problems given and those of merged settings, if there are any."""
    values = check_values(cfg)
    problems = [*problems, *values, *check_keys(cfg), *([] if values else check_data(cfg))]
    if problems:
        raise UserError('config-wrong-settings', problems=problems, path=str(path))


def _read(path: Path) -> Config:
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path('configs')
        near = difflib.get_close_matches(path.name, [p.name for p in folder.glob('*.py')], 3, 0.5)
        raise UserError(
            'config-missing',
            hint='did you mean {near}?' if near else 'the configs that come with the toolkit are in configs/',
            path=str(path),
            near=' or '.join(str(folder / n) for n in near),
        )
    if path.suffix != '.py':
        raise UserError('config-not-python', path=str(path))
    try:
        compile(path.read_text(encoding='utf-8'), str(path), 'exec')
    except (SyntaxError, ValueError) as error:
        raise UserError(
            'config-syntax', path=str(path), line=getattr(error, 'lineno', None) or '?', why=str(error)
        ) from None
    from mmengine.config import Config
    from mmengine.utils import import_modules_from_strings

    data_only.install()
    try:
        cfg = Config.fromfile(str(path), import_custom_modules=False)
        if cfg.get('custom_imports'):
            # What mmdet says of optional packages that nothing here uses.
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter('ignore')
                import_modules_from_strings(**cfg['custom_imports'])
    except Exception as error:
        # A config is code; whatever it raises is the user's to see, with the place.
        raise UserError('config-unreadable', path=str(path), kind=type(error).__name__, why=str(error)) from None
    return cfg
