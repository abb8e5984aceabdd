"""Find, verify, read and publish weights files. Only tensor data is ever unpickled."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.errors import UserError
from mmfinetune.files import download, looks_like, sha256_of

if TYPE_CHECKING:
    import torch

PRETRAIN_DIR = Path('pretrain')
_HASH = re.compile(r'[-_]([0-9a-f]{8,64})\.(?:pth|pt|pkl|safetensors)$')


def hash_in_name(name: str | Path) -> str | None:
    """The SHA-256 prefix at the end of a file name (torch hub's and mmdet's convention)."""
    found = _HASH.search(Path(name).name)
    return found.group(1) if found else None


def verify_file(path: Path) -> str:
    """Check that a file is there, not empty, and as its name says.

    Returns:
        The verdict as a phrase.

    Raises:
        UserError: Missing, a folder, empty, a text file, or another hash than the name's.
    """
    cure = 'delete it and run again to fetch it anew, or pass another file with --weights'
    if path.is_dir():
        raise UserError(f'{path} is a folder, not a weights file',
                        cure='pass the .pth file in it with --weights')
    if not path.is_file():
        raise UserError(f'There is no weights file {path}',
                        cure='check the path, or drop --weights to use the one in the config')
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
        raise UserError(f'{path} is damaged: its SHA-256 begins with {digest[:len(prefix)]}, '
                        f'but its name says {prefix}', cure=cure)
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
        raise UserError(f'There is no weights file {wanted}. Looked for:', looked + damaged,
                        'put the file there, or pass another one with --weights')
    target.parent.mkdir(parents=True, exist_ok=True)
    return download(url, target, sha256=hash_in_name(wanted))


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint file without running any code of it.

    Returns:
        What the file holds; tensors are on the CPU.

    Raises:
        UserError: Truncated, no checkpoint, or a pickle that holds more than data.
    """
    import pickle

    import torch
    cure = 'delete it and run again to fetch it anew, or pass another file with --weights'
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r'GLOBAL ([\w.]+)', str(error))
        if culprit:
            raise UserError(
                f'{path} is refused: it is a pickle that would run {culprit.group(1)}',
                cure='get the weights from a source you trust; a file of tensors needs no code'
            ) from None
        raise UserError(f'{path} is not a weights file: {_first_line(error)}', cure=cure) from None
    except Exception as error:
        # On garbage the unpickler raises whatever that leads it to, IndexError and TypeError too.
        raise UserError(f'{path} cannot be read, it is truncated or no weights file: '
                        f'{_first_line(error)}', cure=cure) from None
    if not isinstance(loaded, dict):
        raise UserError(f'{path} holds a {type(loaded).__name__}, not weights', cure=cure)
    return loaded


def _safe_globals() -> list:
    """What MMEngine's own checkpoints hold beside tensors: history buffers and numpy scalars.

    MMEngine's list has ``getattr`` too, for the statistics of a history buffer. As it stands a
    crafted file could reach any module through it, so only those statistics are handed out.
    """
    import pickle

    from mmengine.logging import HistoryBuffer
    from mmengine.runner.checkpoint import get_torch_safe_globals

    def statistic(owner: object, name: str) -> object:
        if owner is not HistoryBuffer or name.startswith('_'):
            raise pickle.UnpicklingError(f'GLOBAL builtins.getattr({owner!r}, {name!r})')
        return getattr(owner, name)

    return [*(g for g in get_torch_safe_globals() if g is not getattr),
            (statistic, 'builtins.getattr')]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def state_dict_of(loaded: Mapping, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without the ``module.`` of a parallel wrapper.

    Raises:
        UserError: No tensors in it.
    """
    import torch
    source = loaded.get('state_dict', loaded.get('model', loaded))
    tensors = {k: v for k, v in source.items() if isinstance(v, torch.Tensor)} \
        if isinstance(source, Mapping) else {}
    if not tensors:
        raise UserError(f'{path} holds no weights; its keys are: '
                        f'{", ".join(map(str, list(loaded)[:8])) or "none"}',
                        cure='pass a file with a state_dict, e.g. one from the MMDetection zoo')
    if all(k.startswith('module.') for k in tensors):
        tensors = {k.removeprefix('module.'): v for k, v in tensors.items()}
    return tensors


def publish(src: Path, stem: Path) -> Path:
    """Strip a checkpoint to its weights and name it by its hash.

    Args:
        src: A checkpoint, or the work dir of a run (its best checkpoint is taken).
        stem: Target path without hash and suffix.

    Returns:
        ``<stem>-<first 8 of SHA-256>.pth``.
    """
    import torch
    src = best_checkpoint(src) if src.is_dir() else src
    verify_file(src)
    loaded = read_checkpoint(src)
    meta = loaded.get('meta', {})
    # MMDetection 2.x wrote CLASSES, 3.x dataset_meta.
    classes = meta.get('dataset_meta', {}).get('classes') or meta.get('CLASSES') or ()
    slim = {'meta': {'dataset_meta': {'classes': tuple(classes)}},
            'state_dict': {k: v.clone() for k, v in state_dict_of(loaded, src).items()}}
    stem.parent.mkdir(parents=True, exist_ok=True)
    part = stem.with_name(stem.name + '.part')
    try:
        torch.save(slim, part)
        target = stem.with_name(f'{stem.name}-{sha256_of(part)[:8]}.pth')
        part.replace(target)
    except (OSError, RuntimeError) as error:
        raise UserError(f'{stem} cannot be written: {_first_line(error)}',
                        cure='choose a folder you may write to, on a disk with room') from None
    finally:
        part.unlink(missing_ok=True)
    return target


def last_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that a run wrote last; None if there is none."""
    pointer = work_dir / 'last_checkpoint'
    # The path in it is that of the machine that wrote it; the name is enough.
    file = work_dir / Path(pointer.read_text().strip()).name if pointer.is_file() else None
    return file if file is not None and file.is_file() else None


def candidates(work_dir: Path) -> list[Path]:
    """Checkpoints that a run could be resumed from, the last written first."""
    found = [*work_dir.glob('epoch_*.pth'), *work_dir.glob('iter_*.pth')]
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    last = last_checkpoint(work_dir)
    return [last, *(p for p in found if p != last)] if last else found


def best_checkpoint(work_dir: Path) -> Path:
    """The best checkpoint of a run, else its last.

    Raises:
        UserError: The folder holds none.
    """
    best = sorted(work_dir.glob('best_*.pth'), key=lambda p: p.stat().st_mtime)
    if best:
        return best[-1]
    last = last_checkpoint(work_dir)
    if last is not None:
        return last
    raise UserError(f'There is no checkpoint in {work_dir}',
                    cure='train first, or pass a checkpoint with --weights')
