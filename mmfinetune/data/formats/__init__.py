"""The formats of data sets: one file and one row each."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmfinetune.data.records import Reader
from mmfinetune.utils.errors import Message, UserError


class Format(NamedTuple):
    """A row of the table of formats.

    Attributes:
        reader: Module in this package and class of the reader.
        layout: What the reader looks for.
        options: What :meth:`Reader.open` takes besides :data:`COMMON`.
    """

    reader: str
    layout: str
    options: tuple[str, ...] = ()


COMMON = ('classes', 'min_area', 'progress')
_COCO = ('boxes_as_masks', 'relative', 'crowd_as_objects', 'trust_sizes', 'image_root')


FORMATS = {
    'coco2017': Format(
        'coco.Coco2017Reader', 'annotations/instances_{train,val}2017.json next to train2017/ and val2017/', _COCO
    ),
    'coco': Format(
        'coco.CocoReader',
        'COCO JSON (images, annotations, categories) in the folder, in annotations/ or in '
        'train/, val/, test/; or one such file',
        _COCO,
    ),
    'voc': Format(
        'voc.VocReader',
        'a PASCAL VOC devkit: JPEGImages/, SegmentationObject/, SegmentationClass/',
        ('trust_masks', 'splits'),
    ),
    'sbd': Format('sbd.SbdReader', 'SBD: dataset/inst/*.mat and dataset/img/*.jpg', ('sbd_split', 'voc')),
    'cityscapes': Format('cityscapes.CityscapesReader', 'leftImg8bit/ next to gtFine/ with *_gtFine_instanceIds.png'),
    'labelme': Format('labelme.LabelmeReader', "LabelMe JSON files with 'shapes'", ('image_root',)),
    'yolo': Format(
        'yolo.YoloReader', 'data.yaml, or images/ and labels/*.txt with classes.txt', ('boxes_as_masks', 'image_root')
    ),
    'mask-png': Format(
        'masks.MaskPngReader',
        'images/ and masks/ with one PNG of object numbers for each image',
        ('void', 'background'),
    ),
    'binary-masks': Format(
        'masks.BinaryMasksReader',
        'a black-and-white mask PNG for each image and class: CLASS/name.jpg and '
        '.png, masks/CLASS/name.png or name_CLASS.png',
        ('threshold', 'background'),
    ),
}
_FILES = {'.json': 'coco', '.yaml': 'yolo', '.yml': 'yolo'}  # formats that one file may stand for


def reader_for(name: str) -> type[Reader]:
    """The class that reads a format."""
    module, reader = FORMATS[name].reader.split('.')
    return getattr(importlib.import_module(f'{__name__}.{module}'), reader)


def require_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the reader of this format would not look at.

    Raises:
        UserError: All of them.
    """
    problems = []
    # 0 is a value, though it equals False.
    for option in (key for key, value in options.items() if value is not None and value is not False):
        if option not in (*COMMON, *FORMATS[name].options):
            others = ', '.join(other for other, row in FORMATS.items() if option in row.options)
            problems.append(Message('format-option', option=option.replace('_', '-'), others=others or 'no format'))
    if problems:
        raise UserError('format-options', problems=problems, format=name)


def detect(root: Path) -> tuple[str, str]:
    """The format of a data set, and why.

    Raises:
        UserError: It looks like no format or like several.
    """
    if root.is_file() and root.suffix.lower() in _FILES:
        return _FILES[root.suffix.lower()], f'a {root.suffix.lower()[1:].upper()} file'
    found = _reasons(root) if root.is_dir() else {}
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        lines = [Message('format-possible', format=f, reason=r) for f, r in found.items()]
        raise UserError('format-ambiguous', problems=lines, path=root)
    lines = [Message('format-layout', format=f, layout=row.layout) for f, row in FORMATS.items()]
    inside = root.iterdir() if root.is_dir() else ()
    folders = sorted(p for p in inside if p.is_dir() and not p.name.startswith('.'))
    if inner := [f'{folder} ({name})' for folder in folders[:20] for name in _reasons(folder)]:
        raise UserError('format-inside', problems=lines, path=root, inner=', '.join(inner))
    raise UserError('format-unknown', problems=lines, path=root)


def _reasons(root: Path) -> dict[str, str]:
    found = {}
    for name in FORMATS:
        with contextlib.suppress(OSError, ValueError, UserError):
            if reason := reader_for(name).detect(root):
                found[name] = reason
    return found
