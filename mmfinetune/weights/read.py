"""Read weights files of any format as data: torch, Detectron2's numpy pickle, safetensors."""

from __future__ import annotations

import collections
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.text import brief, is_text
from mmfinetune.weights.pickles import TORCH_MAGIC, require_bounded, require_room

if TYPE_CHECKING:
    import torch


REPLACE = 'delete it and run again to download it again, or pass another file with --weights'
USE_OURS = 'use the weights of a Mask R-CNN with ResNet-50 and FPN, from the MMDetection zoo, torchvision or Detectron2'


def load(path: Path) -> dict:
    """What a file of any supported format holds; no code in it runs.

    Raises:
        UserError: Truncated, not a weights file, or a pickle that holds more than data.
    """
    with path.open('rb') as file:
        start = file.read(64)
    if path.suffix == '.safetensors' or (start[8:9] == b'{' and start[:2] != b'PK'):
        return _load_safetensors(path)
    torch_file = start.startswith((b'PK', TORCH_MAGIC))
    if not torch_file and (path.suffix == '.pkl' or start.startswith(b'\x80')):
        return load_numpy_pickle(path)
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> dict:
    """Load a torch checkpoint without running any code in it.

    Returns:
        What the file holds; tensors are on the CPU.

    Raises:
        UserError: Truncated, damaged, not a checkpoint, or a pickle that holds more than data.
    """
    import torch

    try:
        require_bounded(path)
        damaged = _damaged_part(path)
        if damaged is not None:
            raise UserError('weights-crc', path=path, part=damaged)
        with torch.serialization.safe_globals(_safe_globals()):
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except UserError:
        raise
    except Exception as error:
        # On garbage the unpickler raises whatever that leads it to, IndexError and TypeError too.
        raise _unreadable(path, error) from None
    # Many tensors may share the numbers of one, and one may repeat a single number without end.
    require_room(sum(t.numel() * max(t.element_size(), 4) for t in _tensors_in(loaded)), path)
    return _require_dict(loaded, path)


def _tensors_in(loaded: object) -> Iterator[torch.Tensor]:
    """All tensors that can be trained from, however deep, each once."""
    import torch

    left, seen = [loaded], set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
        elif isinstance(value, torch.Tensor) and _is_dense(value):
            yield value
        seen.add(id(value))


def _damaged_part(path: Path) -> str | None:
    """The first part of a zip file that has changed since it was written, by its CRC, which torch does not check."""
    with path.open('rb') as file:
        if file.read(2) != b'PK':
            return None
        with zipfile.ZipFile(file) as archive:
            # Under `torch.serialization.set_crc32_options(False)` all are 0.
            return archive.testzip() if any(part.CRC for part in archive.infolist()) else None


def _unreadable(path: Path, error: Exception) -> UserError:
    culprit = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if culprit:
        return UserError('weights-code', path=path, culprit=culprit[1])
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError('weights-unreadable', path=path, reason=reason)


def _require_dict(loaded: object, path: Path) -> dict:
    if not isinstance(loaded, dict):
        raise UserError('weights-not-a-dict', path=path, type=type(loaded).__name__)
    return loaded


def _safe_globals() -> list:
    """What MMEngine's own checkpoints hold besides tensors: history buffers and numpy scalars.

    MMEngine's list has ``getattr`` too, for the statistics of a history buffer. As it stands a
    crafted file could reach any module through it, so only those statistics are handed out.
    """
    from mmengine.logging import HistoryBuffer
    from mmengine.runner.checkpoint import get_torch_safe_globals

    def statistic(owner: object, name: str) -> object:
        if owner is not HistoryBuffer or name.startswith('_'):
            raise pickle.UnpicklingError(f'GLOBAL builtins.getattr({owner!r}, {name!r})')
        return getattr(owner, name)

    known = [g for g in get_torch_safe_globals() if g is not getattr]
    settings = ((stand_in, f'{module}.{name}') for (module, name), stand_in in _SETTINGS.items())
    return [*known, (statistic, 'builtins.getattr'), *settings]


class _Namespace(dict):
    """Stands in for a namespace while unpickling: its attributes as a dict."""

    def __setstate__(self, state: dict) -> None:
        self.update(state)


def _path(*parts: str) -> str:
    return '/'.join(parts)


# What training scripts keep of their command line.
_SETTINGS = {
    ('argparse', 'Namespace'): _Namespace,
    ('types', 'SimpleNamespace'): _Namespace,
    **{
        (module, name): _path
        for module in ('pathlib', 'pathlib._local')
        for name in ('PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath')
    },
}


def _load_safetensors(path: Path) -> dict:
    from safetensors import safe_open

    try:
        with safe_open(path, framework='pt', device='cpu') as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # see `read_checkpoint`
        raise _unreadable(path, error) from None
    try:
        classes = json.loads(metadata.get('classes', 'null'))
    except (ValueError, RecursionError):
        classes = None
    return {'state_dict': tensors, 'meta': {'CLASSES': classes} if classes else {}}


class _Dtype:
    """Stands in for numpy.dtype while unpickling; plain numbers only."""

    def __init__(self, code: str, *_: object) -> None:
        code = code.decode('ascii') if isinstance(code, bytes) else code
        if not isinstance(code, str) or not re.fullmatch(r'[<>|=]?(f[248]|[iu][1248]|b1)', code):
            raise pickle.UnpicklingError(f'array of {code!r}, not of numbers')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ('<', '>'):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands in for numpy.ndarray while unpickling.

    numpy's own ``__setstate__`` trusts what a file says about its memory.
    """

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, 'F' if fortran else 'C')


def _array(data: object, dtype: object, shape: object, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError('array without a type')
    data = data.encode('latin1') if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _frombuffer(data: object, dtype: object, shape: object, order: str) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _scalar(dtype: object, data: object) -> float | int | bool:
    if not isinstance(data, (bytes, str)) or len(data) > 8:
        raise pickle.UnpicklingError('a number of more than 8 bytes')
    return _array(data, dtype, (), 'C').item()


def _encode(text: str, encoding: str = '') -> bytes:
    # Pickles of protocol 2 hold bytes this way; a free choice of codec would import modules.
    if encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError(f'bytes written as {encoding!r}')
    return text.encode('latin1')


_HARMLESS = {
    **_SETTINGS,
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('_codecs', 'encode'): _encode,
    ('numpy', 'dtype'): _Dtype,
    ('numpy', 'ndarray'): _Array,
    **{
        (f'numpy.{core}.{module}', name): stand_in
        for core in ('core', '_core')
        for module, name, stand_in in (
            ('multiarray', '_reconstruct', lambda *_: _Array()),
            ('multiarray', 'scalar', _scalar),
            ('numeric', '_frombuffer', _frombuffer),
        )
    },
}


class _NumpyUnpickler(pickle.Unpickler):
    """Knows how arrays of numbers are written, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return _HARMLESS[module, name]


def load_numpy_pickle(path: Path) -> dict:
    """What Detectron2's pickle of numpy arrays holds, as tensors.

    Raises:
        UserError: Truncated, not a pickle of arrays, or one that holds more than data.
    """
    import torch

    try:
        require_bounded(path)
        with path.open('rb') as file:
            # Detectron2 reads its files with this encoding too: some come from Python 2.
            loaded = _NumpyUnpickler(file, encoding='latin1').load()
    except UserError:
        raise
    except Exception as error:  # see `read_checkpoint`
        raise _unreadable(path, error) from None
    loaded = _require_dict(loaded, path)

    def tensor(value: object) -> object:
        if not isinstance(value, _Array) or value.value is None:
            return value
        native = value.value.dtype.newbyteorder('=')
        return torch.from_numpy(np.array(value.value, native))

    model = loaded.get('model', loaded)
    return {'model': {k: tensor(v) for k, v in model.items()} if isinstance(model, Mapping) else {}}


def state_dict_of(loaded: Mapping, path: Path, notes: list[Message] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without the ``module.`` of a parallel wrapper.

    Args:
        loaded: What the file holds.
        path: The file, for messages.
        notes: Gets a note where a prefix was removed.

    Raises:
        UserError: There are no weights in it, or they are no dense numbers under names.
    """
    import torch

    inner = loaded.get('state_dict', loaded.get('model', loaded))
    if isinstance(inner, Mapping) and not inner:
        raise UserError('weights-no-tensors', path=path)
    if inner is loaded and ('param_groups' in loaded or 'optimizer' in loaded):
        raise UserError('weights-optimizer', path=path)
    tensors = {k: v for k, v in inner.items() if isinstance(v, torch.Tensor)} if isinstance(inner, Mapping) else {}
    if not tensors:
        raise UserError('weights-none-inside', path=path, keys=', '.join(map(_shown_key, list(loaded)[:8])) or 'none')
    if unnamed := [brief(k) for k in tensors if not isinstance(k, str) or not is_text(k)]:
        raise UserError('weights-names', problems=unnamed, path=path)
    if odd := [k for k, v in tensors.items() if not _is_dense(v)]:
        raise UserError('weights-not-dense', problems=odd, path=path)
    if all(k.startswith('module.') for k in tensors):
        tensors = {k.removeprefix('module.'): v for k, v in tensors.items()}
        if notes is not None:
            notes.append(Message('weights-prefix'))
    return tensors


def _shown_key(key: object) -> str:
    return key if isinstance(key, str) and is_text(key) and len(key) < 80 else brief(key)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it holds its numbers, of a kind that weights and counts are stored as, in rows and columns."""
    import torch

    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    known = (*floats, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    return tensor.layout == torch.strided and tensor.dtype in known and not (tensor.is_meta or tensor.is_nested)


def recorded_classes(loaded: Mapping) -> tuple[str, ...]:
    """The names of the classes that a file records; empty where it records none."""
    meta = loaded.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    data = meta.get('dataset_meta')
    data = data if isinstance(data, Mapping) else {}
    # MMDetection 2.x wrote CLASSES, 3.x dataset_meta.
    for value in (data.get('classes'), data.get('CLASSES'), meta.get('CLASSES'), loaded.get('classes')):
        if (
            isinstance(value, (list, tuple))
            and all(isinstance(name, str) and is_text(name) for name in value)
            and value
        ):
            return tuple(value)
    return ()


def clean(tensors: Mapping[str, torch.Tensor], notes: list[Message]) -> dict[str, torch.Tensor]:
    """All floating tensors as fp32; a note tells of those that were not."""
    import torch

    for dtype, change in ((torch.float16, 'widened'), (torch.bfloat16, 'widened'), (torch.float64, 'rounded')):
        count = sum(v.dtype == dtype for v in tensors.values())
        if count:
            name = str(dtype).removeprefix('torch.')
            notes.append(Message('weights-precision', count=count, dtype=name, change=change))
    return {k: v.detach().to(torch.float32) if v.is_floating_point() else v.detach() for k, v in tensors.items()}


def check_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise a UserError that lists the tensors with NaN or infinite numbers, if there are any."""
    problems = [
        Message('tensor-not-finite', key=key, count=count, total=tensor.numel())
        for key, tensor in tensors.items()
        if (count := int((~tensor.isfinite()).sum()))
    ]
    if problems:
        raise UserError('weights-not-finite', problems=problems, path=path)
