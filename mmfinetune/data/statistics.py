"""What the sizes of images and objects say about a training."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfinetune.data import coco_json
from mmfinetune.utils.errors import UserError


@dataclass(frozen=True)
class Statistics:
    """What the numbers of the config follow from, of the training split unless said otherwise.

    Attributes:
        classes: Names in the file's order.
        images: Number of images of each split.
        with_objects: Training images with an annotation.
        usable: Training images with an object, crowd regions left out.
        per_class: Training images with the class, by class.
        sizes: Widths and heights of the images, (N, 2), px.
        objects: sqrt(width x height) of each object's box, (M,), px.
        image_of: Index of the image of each object, (M,).
        most_objects: The most objects in an image of any split.
        first_image: File name of the first image.
    """

    classes: tuple[str, ...]
    images: dict[str, int]
    with_objects: int
    usable: int
    per_class: np.ndarray
    sizes: np.ndarray
    objects: np.ndarray
    image_of: np.ndarray
    most_objects: int
    first_image: str


def gather(files: dict[str, Path]) -> Statistics:
    """Read the annotation files and take their statistics.

    Raises:
        UserError: A file is malformed, has no objects to learn, or lacks usable sizes.
    """
    splits = {
        split: coco_json.read(path, compact=True).require(('width', 'height'), ('bbox',), unique_files=True)
        for split, path in files.items()
    }
    train = splits['train']
    if awkward := [repr(name) for name in train.classes if '{{' in name]:
        raise UserError('statistics-names', problems=awkward, path=train.path, mark='{{')
    counts = {split: Counter(a['image_id'] for a in _objects(coco)) for split, coco in splits.items()}
    objects = _objects(train)
    if not objects:
        raise UserError('statistics-empty', path=train.path)
    sizes = _numbers(train, [(i['width'], i['height']) for i in train.images], 2, 'width and height of an image')
    boxes = _numbers(train, [a['bbox'] for a in objects], 4, 'bbox of an object')
    if sizes.min() <= 0:
        raise _unusable(train, 'width and height of an image')
    sides = np.sqrt(boxes[:, 2:].clip(0).prod(1))
    real = sides > 0
    if not real.any():
        raise _unusable(train, 'bbox of every object')
    row = {image['id']: i for i, image in enumerate(train.images)}
    column = {category['id']: i for i, category in enumerate(train.categories)}
    pairs = {(a['image_id'], column[a['category_id']]) for a in objects}
    return Statistics(
        train.classes,
        {split: len(coco.images) for split, coco in splits.items()},
        len({a['image_id'] for a in train.annotations}),
        len(counts['train']),
        np.bincount([c for _, c in pairs], minlength=len(column)),
        sizes,
        sides[real],
        np.array([row[a['image_id']] for a in objects])[real],
        max(max(of_image.values(), default=0) for of_image in counts.values()),
        train.images[0]['file_name'],
    )


def _objects(coco: coco_json.Coco) -> list[dict]:
    """The annotations that are not crowd regions."""
    return [a for a in coco.annotations if not a.get('iscrowd')]


def _numbers(coco: coco_json.Coco, values: list, columns: int, what: str) -> np.ndarray:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        array = np.array(values, float).reshape(len(values), columns)
        if np.isfinite(array).all():
            return array
    raise _unusable(coco, what)


def _unusable(coco: coco_json.Coco, what: str) -> UserError:
    return UserError('statistics-sizes', path=coco.path, what=what)
