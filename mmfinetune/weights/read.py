"""Reading weights files of any format as data: torch, Detectron2's numpy pickle, safetensors."""

from __future__ import annotations

import collections
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    import torch


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
                cure='get the weights from a source you trust; a file of tensors needs no code',
            ) from None
        raise UserError(f'{path} is not a weights file: {first_line(error)}', cure=cure) from None
    except Exception as error:
        # On garbage the unpickler raises whatever that leads it to, IndexError and TypeError too.
        raise UserError(
            f'{path} cannot be read, it is truncated or no weights file: {first_line(error)}', cure=cure
        ) from None
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

    return [*(g for g in get_torch_safe_globals() if g is not getattr), (statistic, 'builtins.getattr')]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def state_dict_of(loaded: Mapping, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without the ``module.`` of a parallel wrapper.

    Raises:
        UserError: No tensors in it.
    """
    import torch

    source = loaded.get('state_dict', loaded.get('model', loaded))
    tensors = {k: v for k, v in source.items() if isinstance(v, torch.Tensor)} if isinstance(source, Mapping) else {}
    if not tensors:
        raise UserError(
            f'{path} holds no weights; its keys are: {", ".join(map(str, list(loaded)[:8])) or "none"}',
            cure='pass a file with a state_dict, e.g. one from the MMDetection zoo',
        )
    if all(k.startswith('module.') for k in tensors):
        tensors = {k.removeprefix('module.'): v for k, v in tensors.items()}
    return tensors


pass


CURE = 'use the weights of a Mask R-CNN with ResNet-50 and FPN, from the MMDetection zoo, torchvision or Detectron2'

# The number at the start of files by torch before 1.6, which were bare pickles too.
_TORCH_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


def load(path: Path) -> dict:
    """What a file of any supported format holds; no code of it runs."""
    with path.open('rb') as file:
        start = file.read(64)
    if path.suffix == '.safetensors' or (start[8:9] == b'{' and start[:2] != b'PK'):
        return _load_safetensors(path)
    torch_file = start.startswith((b'PK', _TORCH_MAGIC))
    if not torch_file and (path.suffix == '.pkl' or start.startswith(b'\x80')):
        return load_numpy_pickle(path)
    return read_checkpoint(path)


def _load_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework='pt', device='cpu') as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f'{path} cannot be read, it is truncated or no safetensors file: {str(error)[:200]}', cure='fetch it anew'
        ) from None
    try:
        classes = json.loads(metadata.get('classes', 'null'))
    except ValueError:
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
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(data: object, dtype: object, shape: object, order: str) -> _Array:
    array = _Array()
    array.value = _array(data, dtype, shape, order)
    return array


def _scalar(dtype: object, data: object) -> float | int | bool:
    return _array(data, dtype, (), 'C').item()


def _encode(text: str, encoding: str = '') -> bytes:
    # Pickles of protocol 2 hold bytes this way; a free choice of codec would import modules.
    if encoding not in ('latin1', 'latin-1'):
        raise pickle.UnpicklingError(f'bytes written as {encoding!r}')
    return text.encode('latin1')


_HARMLESS = {
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('_codecs', 'encode'): _encode,
    ('numpy', 'dtype'): _Dtype,
    ('numpy', 'ndarray'): _Array,
    **{
        (f'numpy.{core}.{module}', name): stand_in
        for core in ('core', '_core')
        for module, name, stand_in in (
            ('multiarray', '_reconstruct', _reconstruct),
            ('multiarray', 'scalar', _scalar),
            ('numeric', '_frombuffer', _frombuffer),
        )
    },
}


class _Forbidden(Exception):
    """A pickle asks for something other than data."""


class _NumpyUnpickler(pickle.Unpickler):
    """Knows how arrays of numbers are written, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _HARMLESS:
            raise _Forbidden(f'{module}.{name}')
        return _HARMLESS[module, name]


def load_numpy_pickle(path: Path) -> dict:
    import torch

    cure = 'delete it and fetch it again, or pass another file'
    try:
        with path.open('rb') as file:
            # Detectron2 reads its files with this encoding too: some come from Python 2.
            loaded = _NumpyUnpickler(file, encoding='latin1').load()
    except _Forbidden as culprit:
        raise UserError(
            f'{path} is refused: it is a pickle that would run {culprit}',
            cure='get the weights from a source you trust; a file of arrays needs no code',
        ) from None
    except Exception as error:
        # On garbage the unpickler raises whatever that leads it to, IndexError and TypeError too.
        raise UserError(
            f'{path} cannot be read, it is truncated or no pickle of arrays: '
            f'{str(error)[:200] or type(error).__name__}',
            cure=cure,
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f'{path} holds a {type(loaded).__name__}, not weights', cure=cure)

    def tensor(value: object) -> object:
        if not isinstance(value, _Array) or value.value is None:
            return value
        native = value.value.dtype.newbyteorder('=')
        return torch.from_numpy(np.array(value.value, native))

    model = loaded.get('model', loaded)
    return {'model': {str(k): tensor(v) for k, v in model.items()} if isinstance(model, Mapping) else {}}


def named_tensors(loaded: Mapping, path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file, with a note where ``state_dict_of`` took a prefix off."""
    import torch

    inner = loaded.get('state_dict', loaded.get('model', loaded))
    if isinstance(inner, Mapping) and not inner:
        raise UserError(f'{path} holds an empty state dict', cure=CURE)
    if ('param_groups' in loaded or 'optimizer' in loaded) and inner is loaded:
        raise UserError(
            f'{path} holds the state of an optimizer, but no weights',
            cure='pass the checkpoint of the model, with a state_dict in it',
        )
    tensors = state_dict_of(loaded, path)
    if any(isinstance(v, torch.Tensor) and k not in tensors for k, v in inner.items()):
        notes.append("the prefix 'module.' of a parallel wrapper was taken off all names")
    return tensors


def clean(tensors: Mapping[str, torch.Tensor], path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """All floating tensors as dense fp32."""
    import torch

    odd = [k for k, v in tensors.items() if v.layout != torch.strided or v.is_quantized or v.is_complex()]
    if odd:
        raise UserError(f'{path} holds sparse, quantized or complex tensors:', odd, CURE)
    for dtype, done in ((torch.float16, 'widened'), (torch.bfloat16, 'widened'), (torch.float64, 'rounded')):
        count = sum(v.dtype == dtype for v in tensors.values())
        if count:
            name = str(dtype).removeprefix('torch.')
            notes.append(f'{count} {name} tensors were {done} to float32')
    return {k: v.detach().to(torch.float32) if v.is_floating_point() else v.detach() for k, v in tensors.items()}


def check_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    problems = []
    for key, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            problems.append(f'{key}: {bad} of {tensor.numel()} numbers')
    if problems:
        raise UserError(
            f'{path} holds NaN or infinite weights in {len(problems)} tensors:',
            problems,
            'the run that made it diverged: take an earlier checkpoint of it, or other weights',
        )
