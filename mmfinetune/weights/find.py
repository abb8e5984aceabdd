"""Find a weights file: where the config says, in the usual caches, or by download."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

from mmfinetune.utils.dist import rank0_first
from mmfinetune.utils.download import download
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import hash_in_name, looks_like, sha256_of
from mmfinetune.weights import read
from mmfinetune.weights.read import REPLACE

PRETRAIN_DIR = Path('pretrain')


@functools.cache
def _sha256(path: Path, _size: int, _changed: int) -> str:
    # A command verifies a file where it finds it and again where it reads it: one hash serves both.
    return sha256_of(path)


def verify_file(path: Path) -> str:
    """Check that a file exists, is not empty, and has the hash in its name, if there is one.

    Returns:
        Its SHA-256, 64 hexadecimal digits.

    Raises:
        UserError: Missing, a directory, empty, a text file, or of another hash than its name says.
    """
    if path.is_dir():
        raise UserError('weights-directory', path=path)
    if not path.is_file():
        raise UserError('weights-missing', path=path)
    status = path.stat()
    if status.st_size == 0:
        raise UserError('weights-empty', hint=REPLACE, path=path)
    kind = looks_like(path)
    if kind:
        raise UserError('weights-text', hint=REPLACE, path=path, kind=kind)
    digest = _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    expected = hash_in_name(path)
    if expected and not digest.startswith(expected):
        raise UserError('weights-damaged', hint=REPLACE, path=path, expected=expected)
    return digest


def search_places() -> list[Path]:
    """Folders in which downloaded weights are commonly found, best first."""
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache'))
    torch_home = Path(os.environ.get('TORCH_HOME', cache / 'torch'))
    return [PRETRAIN_DIR, torch_home / 'hub' / 'checkpoints', cache / 'mim', Path.cwd()]


def find_weights(checkpoint: str | Path, url: str | None = None) -> Path:
    """Find a weights file, or download it to ``pretrain/``.

    The path itself is tried first, then :func:`search_places` by file name, then ``url``. What is found is verified and
    stays where it is.

    Args:
        checkpoint: Path as the config gives it; the file name may end in a SHA-256 prefix.
        url: Where to download the file if it is found nowhere.

    Raises:
        UserError: Not found and not available for download, or damaged.
    """
    wanted = Path(checkpoint)
    if wanted.exists():
        verify_file(wanted)
        return wanted
    target = wanted if wanted.parent.is_dir() else PRETRAIN_DIR / wanted.name
    candidates = [folder / wanted.name for folder in search_places()]
    damaged = []
    for candidate in filter(Path.is_file, candidates):
        try:
            verify_file(candidate)
        except UserError as error:
            damaged.append(error.message)
            continue
        return candidate
    if url is None:
        searched = [Message('weights-searched', path=path) for path in candidates]
        raise UserError('weights-nowhere', problems=searched + damaged, path=wanted)
    return download(url, target, sha256=hash_in_name(wanted), check=_damage)


def locate(weights_cfg: Mapping) -> Path:
    """Make the file of a config's ``weights`` available, or the first of its ``fallbacks`` that is.

    Of several processes the first one searches; all get the path.

    Raises:
        UserError: No file is available; all reasons are listed.
    """

    def search() -> Path:
        choices = [weights_cfg, *(weights_cfg.get('fallbacks') or [])]
        reasons: list[Message] = []
        for choice in choices:
            try:
                path = find_weights(choice['checkpoint'], choice.get('url'))
            except UserError as error:
                if len(choices) == 1:
                    raise
                reasons.append(error.message)
                if choice is not choices[-1]:
                    print(f'{error.message}\nTrying the next source.')
                continue
            if reasons:
                print(f'Using {path} instead.')
            return path
        facts = dict(url=weights_cfg.get('url'), path=weights_cfg['checkpoint'])
        raise UserError('weights-no-source', problems=reasons, **facts)

    return rank0_first(search)


def is_url(address: str) -> bool:
    """Whether weights named on the command line must be downloaded."""
    return address.startswith(('http://', 'https://'))


def _damage(path: Path) -> Message | None:
    """Why a file that nothing else is known of holds no weights."""
    try:
        read.load(path)
    except UserError as error:
        return error.message
    return None


def fetch(address: str) -> Path:
    """Weights at a URL, downloaded to ``pretrain/`` and verified.

    Raises:
        UserError: The download failed, or is not what its name says.
    """
    name = re.split('[?#]', address)[0].rstrip('/').rpartition('/')[2]
    if name in ('', '.', '..') or '/' not in address.partition('://')[2]:
        raise UserError('download-address', url=address)
    path = download(address, PRETRAIN_DIR / name, sha256=hash_in_name(name), check=_damage)
    verify_file(path)
    return path
