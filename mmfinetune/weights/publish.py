"""Write weights: for others to fine-tune from, or in torchvision's names."""

from __future__ import annotations

import io
import math
from pathlib import Path

from mmfinetune.data.classes import COCO_CLASSES
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_bytes, hash_in_name, sha256_of
from mmfinetune.weights.find import verify_file
from mmfinetune.weights.origins.torchvision import to_torchvision
from mmfinetune.weights.read import CURE, first_line, read_checkpoint, state_dict_of
from mmfinetune.weights.source import BN_EPS, RGB_MEAN, RGB_STD, Source
from mmfinetune.weights.sources import read_source
from mmfinetune.weights.work_dir import best_checkpoint


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
    slim = {
        'meta': {'dataset_meta': {'classes': tuple(classes)}},
        'state_dict': {k: v.clone() for k, v in state_dict_of(loaded, src).items()},
    }
    stem.parent.mkdir(parents=True, exist_ok=True)
    part = stem.with_name(stem.name + '.part')
    try:
        torch.save(slim, part)
        target = stem.with_name(f'{stem.name}-{sha256_of(part)[:8]}.pth')
        part.replace(target)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f'{stem} cannot be written: {first_line(error)}',
            cure='choose a folder you may write to, on a disk with room',
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return target


# --- Back and out ----------------------------------------------------------------------------


def _check_target(dst: Path) -> None:
    if dst.exists():
        raise UserError(f'{dst} exists and is not overwritten', cure='choose another name, or move it away')
    if dst.suffix not in ('.pth', '.pt'):
        raise UserError(
            f'{dst}: the result is a torch file, so its name must end in .pth', cure=f'write {dst.with_suffix(".pth")}'
        )
    if hash_in_name(dst):
        raise UserError(
            f'{dst}: a name that ends in a hash says what is in the file, and this file will have another',
            cure='choose a name without it',
        )


def _write(value: object, dst: Path) -> Path:
    import torch

    _check_target(dst)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    atomic_write_bytes(dst, buffer.getvalue())
    return dst


def save(source: Source, dst: Path) -> Path:
    """Write as MMDetection does; :func:`read_source` gives the same source again.

    Args:
        source: What to write.
        dst: Must not exist; ends in .pth and has no hash in its name.

    Raises:
        UserError: `dst` exists, has another name, or cannot be written.
    """
    meta = {
        'dataset_meta': {'classes': source.classes} if source.classes else {},
        'style': source.style,
        'mean': source.mean,
        'std': source.std,
        'rgb': source.rgb,
        'origin': source.kind,
        'notes': list(source.notes),
    }
    # Copies, since torch writes all of the memory that a view is a part of.
    return _write(
        {
            'meta': meta,
            'state_dict': {k: v.clone() for k, v in source.tensors.items()},
            'extra': {k: v.clone() for k, v in source.extra.items()},
        },
        Path(dst),
    )


def convert_file(src: Path, dst: Path, to: str = 'mmdet', bn_eps: float | None = None) -> Source:
    """Read `src`, write `dst`.

    Args:
        src: Weights of any supported origin.
        dst: See :func:`save`.
        to: 'mmdet', or 'torchvision' for a plain state dict of its ``maskrcnn_resnet50_fpn``.
        bn_eps: See :func:`read_source`.

    Returns:
        What was read; its notes include those on the writing.

    Raises:
        UserError: See :func:`read_source` and :func:`save`; or torchvision has no such model.
    """
    _check_target(Path(dst))  # before the reading, which takes a while
    source = read_source(src, bn_eps)
    if to == 'mmdet':
        save(source, dst)
        return source
    if source.kind == 'backbone':
        raise UserError(f'{src} is a backbone alone, not a Mask R-CNN', cure=CURE)
    if source.style == 'caffe' or source.rgb is False:
        raise UserError(
            f'{src} cannot become a torchvision model: it is of style {source.style}, fed with '
            f'{"BGR" if source.rgb is False else "RGB"}, and torchvision has the stride in the '
            '3x3 convolutions and RGB',
            cure='use weights in pytorch style',
        )
    if source.style is None or source.rgb is None:
        source.notes.append('the file does not tell style and channel order: torchvision needs pytorch style and RGB')
    if source.mean is not None and not all(
        math.isclose(a, b, abs_tol=0.01) for a, b in zip(source.mean + source.std, RGB_MEAN + RGB_STD, strict=True)
    ):
        source.notes.append(
            f'the weights expect mean {source.mean}, std {source.std}: give '
            "torchvision's model these / 255 as image_mean and image_std"
        )
    coco = None if source.classes is None else source.classes == COCO_CLASSES
    eps = float(source.extra.get('bn_eps', BN_EPS))
    _write(to_torchvision(source.tensors, source.extra, coco), Path(dst))
    source.notes.append(
        f'in torchvision BN must run with eps {eps:g}'
        + ('' if eps == BN_EPS else f': torchvision.models.detection._utils.overwrite_eps(model, {eps:g})')
    )
    return source
