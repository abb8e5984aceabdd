"""Write weights: for others to fine-tune from, or under torchvision's names."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path

from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_bytes, hash_in_name
from mmfinetune.weights import read
from mmfinetune.weights.find import verify_file
from mmfinetune.weights.origins.torchvision import to_torchvision
from mmfinetune.weights.read import USE_OURS
from mmfinetune.weights.source import BN_EPS, RGB_MEAN, RGB_STD, Source, coco_classes
from mmfinetune.weights.sources import open_source
from mmfinetune.weights.work_dir import best_checkpoint


def publish(src: Path, stem: Path, overwrite: bool = False) -> Path:
    """Strip a checkpoint to its weights and name it by its hash.

    Args:
        src: A checkpoint, or the work dir of a run (its best checkpoint is taken).
        stem: Target path without hash and suffix.
        overwrite: Whether the target may exist.

    Returns:
        ``<stem>-<first 8 of SHA-256>.pth``.

    Raises:
        UserError: There are no weights in `src`, or the target exists or cannot be written.
    """
    src = best_checkpoint(src) if src.is_dir() else src
    verify_file(src)
    loaded = read.read_checkpoint(src)
    classes = read.recorded_classes(loaded)
    slim = {'meta': {'dataset_meta': {'classes': classes}}, 'state_dict': read.state_dict_of(loaded, src)}
    data = _torch_file(slim)
    target = stem.with_name(f'{stem.name}-{hashlib.sha256(data).hexdigest()[:8]}.pth')
    _check_free(target, overwrite)
    atomic_write_bytes(target, data)
    return target


def _torch_file(content: dict) -> bytes:
    import torch

    def copied(value: object) -> object:
        # torch writes all of the memory that a view is a part of.
        if isinstance(value, dict):
            return {key: copied(inner) for key, inner in value.items()}
        return value.clone() if isinstance(value, torch.Tensor) else value

    buffer = io.BytesIO()
    torch.save(copied(content), buffer)
    return buffer.getvalue()


def _check_free(dst: Path, overwrite: bool) -> None:
    if dst.is_dir() or (dst.exists() and not overwrite):
        raise UserError('weights-target-exists', path=dst)


def _check_target(dst: Path, overwrite: bool) -> None:
    _check_free(dst, overwrite)
    if dst.suffix not in ('.pth', '.pt'):
        raise UserError('weights-target-suffix', path=dst)
    if hash_in_name(dst):
        raise UserError('weights-target-hash', path=dst)


def save(source: Source, dst: Path, overwrite: bool = False) -> Path:
    """Write as MMDetection does; opening the file gives the same source again.

    Args:
        source: What to write.
        dst: Ends in .pth and has no hash in its name.
        overwrite: Whether `dst` may exist.

    Raises:
        UserError: `dst` exists, has another name, or cannot be written.
    """
    _check_target(dst, overwrite)
    meta = {
        'dataset_meta': {'classes': source.classes} if source.classes else {},
        **{name: getattr(source, name) for name in ('style', 'mean', 'std', 'rgb', 'origin')},
        'notes': [(note.code, str(note)) for note in source.notes],
    }
    atomic_write_bytes(dst, _torch_file({'meta': meta, 'state_dict': source.tensors, 'extra': source.extra}))
    return dst


def convert_file(
    src: Path, dst: Path, to: str = 'mmdet', bn_eps: float | None = None, overwrite: bool = False
) -> Source:
    """Read `src`, write `dst`.

    Args:
        src: Weights of any supported origin.
        dst: See :func:`save`.
        to: 'mmdet', or 'torchvision' for a plain state dict of its ``maskrcnn_resnet50_fpn``.
        bn_eps: See :func:`open_source`.
        overwrite: Whether `dst` may exist.

    Returns:
        What was read; its notes include those on the writing.

    Raises:
        UserError: See :func:`open_source` and :func:`save`; or torchvision has no such model.
    """
    _check_target(dst, overwrite)  # before the reading, which takes a while
    source = open_source(src, bn_eps)
    if to == 'mmdet':
        save(source, dst, overwrite)
    else:
        if source.origin == 'backbone':
            raise UserError('torchvision-backbone', hint=USE_OURS, path=src)
        if source.style == 'caffe' or source.rgb is False:
            order = 'BGR' if source.rgb is False else 'RGB'
            raise UserError('torchvision-style', path=src, style=source.style, order=order)
        coco = None if source.classes is None else source.classes == coco_classes()
        state = to_torchvision(source.tensors, source.extra, coco)
        atomic_write_bytes(dst, _torch_file(state))
        _note_differences(source)
    return source


def _note_differences(source: Source) -> None:
    """What must be known to use the weights in torchvision."""
    if source.style is None or source.rgb is None:
        source.note('torchvision-style-unknown')
    if source.mean is not None and source.std is not None:
        pairs = zip(source.mean + source.std, RGB_MEAN + RGB_STD, strict=True)
        if not all(math.isclose(a, b, abs_tol=0.01) for a, b in pairs):
            source.note('torchvision-statistics', mean=source.mean, std=source.std)
    eps = float(source.extra.get('bn_eps', BN_EPS))
    if eps != BN_EPS:
        source.note('torchvision-eps', eps=eps)
