"""Ground truth and detections made by hand or drawn, for the tests of evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from mmfinetune.evaluation.detections import Truth
from mmfinetune.evaluation.report import Report, analyse

SIZE = 60, 80  # height, width of the images made by hand
# Ids with gaps and in no order, as own data may have them.
CATEGORIES = [{'id': 7, 'name': 'cat'}, {'id': 2, 'name': 'dog'}, {'id': 4, 'name': 'cow'}]
CAT, DOG, COW = 7, 2, 4
Box = tuple[int, int, int, int]


def rle_of(box: Box, size: tuple[int, int] = SIZE) -> dict:
    """The mask of a rectangle of left, top, right, bottom."""
    mask = np.zeros(size, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    rle = mask_api.encode(np.asfortranarray(mask))
    return {'size': list(size), 'counts': rle['counts'].decode()}


def xywh(box: Box) -> list[int]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def data_set(
    things: Sequence[tuple], images: int = 2, categories: Sequence[dict] = CATEGORIES, size: tuple[int, int] = SIZE
) -> dict:
    """A COCO data set of (image id, category id, box, crowd or not) with rectangular masks."""
    return {
        'images': [
            {'id': i, 'file_name': f'image_{i}.png', 'height': size[0], 'width': size[1]} for i in range(1, images + 1)
        ],
        'categories': [dict(c) for c in categories],
        'annotations': [
            {
                'id': number,
                'image_id': image,
                'category_id': category,
                'iscrowd': int(bool(crowd)),
                'bbox': xywh(box),
                'area': xywh(box)[2] * xywh(box)[3],
                'segmentation': rle_of(box, size),
            }
            for number, (image, category, box, *crowd) in enumerate(things, 1)
        ],
    }


def truth_of(things: Sequence[tuple], **options: Any) -> Truth:
    return Truth(Path('made.json'), data_set(things, **options))


def rows_of(found: Sequence[tuple], kind: str = 'segm') -> list[dict]:
    """COCO result rows of (image id, category id, box, score)."""
    return [
        {
            'image_id': image,
            'category_id': category,
            'score': score,
            **({'segmentation': rle_of(box)} if kind == 'segm' else {'bbox': xywh(box)}),
        }
        for image, category, box, score in found
    ]


# A cat is found, a dog predicted as a cow, a cat missed, and a dog found where nothing is; there is no cow.
A, B, C = (5, 5, 25, 25), (40, 10, 70, 50), (10, 40, 30, 55)
THINGS = [(1, CAT, A), (1, DOG, B), (2, CAT, B)]
FOUND = [(1, CAT, A, 0.9), (1, COW, B, 0.8), (2, DOG, (0, 57, 3, 60), 0.7)]


def report_of(
    found: Sequence[tuple] = FOUND,
    kinds: Sequence[str] = ('segm', 'bbox'),
    things: Sequence[tuple] = THINGS,
    images: int = 2,
    **options: Any,
) -> Report:
    """The report of detections of rectangles; by default of `FOUND` against `THINGS`."""
    rows = {kind: rows_of(found, kind) for kind in kinds}
    return analyse(truth_of(things, images=images), rows, {'predictions': 'p'}, **options)


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def draw(
    images: int, detections: int, classes: int = 20, seed: int = 0, size: tuple[int, int] = (375, 500)
) -> tuple[dict, dict[str, list[dict]]]:
    """A data set of the size and the number of objects of VOC's, and detections of it.

    Objects are polygons, 2.4 an image on average, every tenth a crowd region. Detections are
    jittered objects, some of another class or found twice, and many of nothing with low scores.

    Args:
        images: Number of images.
        detections: Number in each image.
        classes: Number of classes.
        seed: Of all that is drawn.
        size: Height and width of the images.

    Returns:
        The data set, and result rows by kind.
    """
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 17)[:-1]

    def outline(count: int) -> np.ndarray:
        """(count, 16, 2) points around centres in the image, of small to large radii."""
        centre = rng.uniform(0, 1, (count, 1, 2)) * size[::-1]
        radius = np.exp(rng.uniform(np.log(8), np.log(110), (count, 1, 2)))
        wobble = rng.uniform(0.7, 1.1, (count, len(angles), 1))
        return centre + radius * wobble * np.stack([np.cos(angles), np.sin(angles)], -1)

    def encode(points: np.ndarray) -> list[dict]:
        clipped = np.clip(points, 0, np.array(size[::-1]) - 1).reshape(len(points), 32)
        return mask_api.frPyObjects(clipped.tolist(), *size) if len(points) else []

    data = data_set([], images, [{'id': k + 1, 'name': f'class {k}'} for k in range(classes)], size)
    rows: dict[str, list[dict]] = {'segm': [], 'bbox': []}
    for image_id in range(1, images + 1):
        things = outline(rng.poisson(2.4))
        labels = rng.integers(1, classes + 1, len(things))
        for points, label, rle in zip(things, labels, encode(things), strict=True):
            area = int(mask_api.area(rle))
            if area:
                polygon = np.clip(points, 0, np.array(size[::-1]) - 1).ravel().round(2).tolist()
                crowd = rng.random() < 0.1
                data['annotations'].append(
                    {
                        'id': len(data['annotations']) + 1,
                        'image_id': image_id,
                        'category_id': int(label),
                        'iscrowd': int(crowd),
                        'area': area,
                        'bbox': mask_api.toBbox(rle).tolist(),
                        'segmentation': {'size': list(size), 'counts': rle['counts'].decode()} if crowd else [polygon],
                    }
                )
        times = rng.integers(0, 4, len(things))
        guesses = np.repeat(things, times, 0)
        guesses = guesses + rng.normal(0, 4, (len(guesses), 1, 2)) + rng.normal(0, 2, guesses.shape)
        known = np.where(
            rng.random(len(guesses)) < 0.85, np.repeat(labels, times), rng.integers(1, classes + 1, len(guesses))
        )
        nothing = outline(max(0, detections - len(guesses)))
        points = np.concatenate([guesses, nothing])[:detections]
        label = np.concatenate([known, rng.integers(1, classes + 1, len(nothing))])[:detections]
        score = np.concatenate([rng.beta(5, 2, len(guesses)), rng.beta(1, 6, len(nothing))])
        for rle, category, value in zip(encode(points), label, score[:detections], strict=True):
            row = {'image_id': image_id, 'category_id': int(category), 'score': round(float(value), 3)}
            x, y, w, h = mask_api.toBbox(rle) + rng.normal(0, 1.5, 4)
            rows['segm'].append({**row, 'segmentation': {'size': list(size), 'counts': rle['counts'].decode()}})
            rows['bbox'].append({**row, 'bbox': [x, y, max(w, 1.0), max(h, 1.0)]})
    return data, rows
