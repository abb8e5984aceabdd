"""Find, verify, read and publish weights files. Only tensor data is ever unpickled."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils import files
from mmfinetune.utils.dist import rank0_first
from mmfinetune.utils.download import download
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import hash_in_name, looks_like, sha256_of
from mmfinetune.weights import find as weights_find

if TYPE_CHECKING:
    from mmengine.config import Config

PRETRAIN_DIR = Path('pretrain')


def verify_file(path: Path) -> str:
    """Check that a file is there, not empty, and as its name says.

    Returns:
        The verdict as a phrase.

    Raises:
        UserError: Missing, a folder, empty, a text file, or another hash than the name's.
    """
    cure = 'delete it and run again to fetch it anew, or pass another file with --weights'
    if path.is_dir():
        raise UserError(f'{path} is a folder, not a weights file', cure='pass the .pth file in it with --weights')
    if not path.is_file():
        raise UserError(
            f'There is no weights file {path}', cure='check the path, or drop --weights to use the one in the config'
        )
    if path.stat().st_size == 0:
        raise UserError(f'{path} is empty', cure=cure)
    kind = looks_like(path)
    if kind:
        raise UserError(f'{path} is not a weights file: it looks like {kind}', cure=cure)
    prefix = hash_in_name(path)
    if prefix is None:
        return 'no hash in the file name to check against'
    digest = sha256_of(path)
    if not digest.startswith(prefix):
        raise UserError(
            f'{path} is damaged: its SHA-256 begins with {digest[: len(prefix)]}, but its name says {prefix}', cure=cure
        )
    return f'SHA-256 begins with {prefix}, as its name says'


def search_places() -> list[Path]:
    """Folders in which downloaded weights are commonly found, best first."""
    cache = Path(os.environ.get('XDG_CACHE_HOME', Path.home() / '.cache'))
    torch_home = Path(os.environ.get('TORCH_HOME', cache / 'torch'))
    return [PRETRAIN_DIR, torch_home / 'hub' / 'checkpoints', cache / 'mim', Path.cwd()]


def find_weights(checkpoint: str | Path, url: str | None = None) -> Path:
    """Make a weights file available in ``pretrain/``.

    The path itself is tried first, then :func:`search_places` by file name, then ``url``. A copy
    found elsewhere, or downloaded, is verified and only then put at its place.

    Args:
        checkpoint: Path as the config gives it; the file name may end in a SHA-256 prefix.
        url: Where to download it from if it is nowhere.

    Returns:
        The path of the verified file.

    Raises:
        UserError: Not found and not to be downloaded, or damaged.
    """
    wanted = Path(checkpoint)
    if wanted.exists():
        verify_file(wanted)
        return wanted
    target = wanted if wanted.parent.is_dir() else PRETRAIN_DIR / wanted.name
    damaged = []
    for folder in search_places():
        candidate = folder / wanted.name
        if not candidate.is_file():
            continue
        try:
            verify_file(candidate)
        except UserError as error:
            damaged.append(error.message)
            continue
        if candidate.resolve().parent == target.resolve().parent:
            return candidate
        print(f'Copying {candidate} to {target}')
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + '.copy')
        shutil.copyfile(candidate, part)
        part.replace(target)
        return target
    if url is None:
        looked = [str(f / wanted.name) for f in search_places()]
        raise UserError(
            f'There is no weights file {wanted}. Looked for:',
            looked + damaged,
            'put the file there, or pass another one with --weights',
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    return download(url, target, sha256=hash_in_name(wanted))


def find(cfg: Config) -> Path:
    """Make the config's weights available; its ``fallbacks`` are tried where the first fail.

    Raises:
        UserError: None is to be had; all reasons are listed.
    """
    recipe = cfg['weights']

    def search() -> Path:
        choices = [recipe, *(recipe.get('fallbacks') or [])]
        reasons = []
        for choice in choices:
            try:
                path = weights_find.find_weights(choice['checkpoint'], choice.get('url'))
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
        raise UserError(
            'No source has the weights:',
            reasons,
            f'check the network and run again, or fetch {recipe.get("url")} by other '
            f'means and put it at {recipe["checkpoint"]}',
        )

    return rank0_first(search)


def is_url(address: str) -> bool:
    """Whether weights given by hand are to be downloaded."""
    return address.startswith(('http://', 'https://'))


def fetch(address: str) -> Path:
    """A file or URL given by hand; a URL is downloaded to ``pretrain/`` and verified.

    Raises:
        UserError: It cannot be had.
    """
    if not is_url(address):
        return Path(address)
    name = address.split('?')[0].rstrip('/').rpartition('/')[2]
    target = weights_find.PRETRAIN_DIR / name
    path = download(address, target, sha256=files.hash_in_name(name))
    weights_find.verify_file(path)
    return path
