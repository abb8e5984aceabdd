"""What the sizes of images and objects say about a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        UserError: A file is malformed, has no classes, no objects to learn, or sizes missing.
    """
    images, most, train = {}, 0, {}
    for split, path in files.items():
        found = coco_json.read(path, compact=True).require(unique_files=True).data
        images[split] = len(found['images'])
        counts: dict[Any, int] = {}
        for annotation in found['annotations']:
            if not annotation.get('iscrowd'):
                counts[annotation['image_id']] = counts.get(annotation['image_id'], 0) + 1
        most = max([most, *counts.values()])
        if split == 'train':
            train, usable = found, len(counts)
    path = files['train']
    cure = f'`python tools/check_dataset.py {path.parent.parent}` lists all that is wrong with it'
    if not train['categories']:
        raise UserError(f'{path} has no categories', cure=cure)
    awkward = [repr(c['name']) for c in train['categories'] if '{{' in c['name']]
    if awkward:
        raise UserError(
            f'{path}: MMEngine takes {{{{ in a config for a placeholder, and so in these class names:',
            awkward,
            'rename the categories in all annotation files',
        )
    if not usable:
        raise UserError(
            f'{path}: no image has an object: there is nothing to learn',
            cure='annotate objects, or pass the right folder',
        )
    row = {image['id']: i for i, image in enumerate(train['images'])}
    objects = [a for a in train['annotations'] if not a.get('iscrowd')]
    try:
        sizes = np.array([(i['width'], i['height']) for i in train['images']], float)
        boxes = np.array([a['bbox'] for a in objects], float).reshape(-1, 4)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{path}: an image without width and height, or an object without bbox ({error})', cure=cure
        ) from None
    if not np.isfinite(sizes).all() or sizes.min() <= 0:
        raise UserError(f'{path}: an image without a positive size', cure=cure)
    sides = np.sqrt(np.clip(boxes[:, 2], 0, None) * np.clip(boxes[:, 3], 0, None))
    order = {c['id']: i for i, c in enumerate(train['categories'])}
    pairs = {(a['image_id'], order[a['category_id']]) for a in objects}
    real = sides > 0
    if not real.any():
        raise UserError(f'{path}: no object has a box of a positive size', cure=cure)
    return Statistics(
        tuple(c['name'] for c in train['categories']),
        images,
        len({a['image_id'] for a in train['annotations']}),
        usable,
        np.bincount([c for _, c in pairs], minlength=len(order)),
        sizes,
        sides[real],
        np.array([row[a['image_id']] for a in objects])[real],
        most,
        train['images'][0]['file_name'],
    )
