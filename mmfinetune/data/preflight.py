"""What a run knows of its annotation files, checked before it starts."""

from __future__ import annotations

import locale
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.data import coco_json
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.images import image_size
from mmfinetune.utils.text import brief


@dataclass(frozen=True)
class Split:
    """What a run knows of an annotation file.

    Attributes:
        path: The file.
        images: Number of images.
        annotations: Number of annotations, crowd regions included.
        usable: Number of images with at least one annotation that is not a crowd region.
        classes: Category names in the file's order, which is that of the labels.
    """

    path: Path
    images: int
    annotations: int
    usable: int
    classes: tuple[str, ...]


def read_split(path: Path, image_root: Path | None = None, classes: Sequence[str] | None = None) -> Split:
    """Read an annotation file and check it for a run.

    Args:
        path: COCO JSON.
        image_root: Folder that the file names are relative to; None does not look at the images.
        classes: Class names of the config in label order, if it names them.

    Raises:
        UserError: All problems of the first kind found: see `coco_json.Coco.require`, other classes than the
            config's, missing or unreadable images.
    """
    coding = locale.getpreferredencoding(False)
    if coding.lower() not in ('utf-8', 'utf8') and path.is_file() and not path.read_bytes().isascii():
        # MMDetection would read other names than are written there.
        raise UserError('coco-locale', path=path, encoding=coding)
    coco = coco_json.read(path, compact=True).require(
        images=('width', 'height'), annotations=('id',), links=False, utf8=True
    )
    if classes is not None and tuple(classes) != coco.classes:
        raise UserError('coco-classes', path=path, config=', '.join(classes), file=', '.join(coco.classes))
    if image_root is not None:
        _check_headers(coco, image_root)
    with_objects = {a['image_id'] for a in coco.annotations if not a.get('iscrowd')}
    usable = sum(image['id'] in with_objects for image in coco.images)
    return Split(path, len(coco.images), len(coco.annotations), usable, coco.classes)


def _check_headers(coco: coco_json.Coco, image_root: Path) -> None:
    problems = []
    for image in coco.images:
        path, size = image_root / image['file_name'], (image['width'], image['height'])
        try:
            found = image_size(path)
        except Problem as problem:
            problems.append(problem.message.at(path))
            continue
        # Some files have the size before the EXIF rotation; mmcv takes what it reads.
        if found not in (size, size[::-1]):
            problems.append(
                Message('image-size', path=path, found='{}x{}'.format(*found), listed='x'.join(map(brief, size)))
            )
    if problems:
        raise UserError('coco-images', problems=problems, path=coco.path, bad=len(problems), count=len(coco.images))
