"""Predictions as other tools write them, made COCO result rows.

What is read another way than it is written is told by a note; what cannot be told stays, and is refused by
`detections.checked_rows`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from mmfinetune.data.coco_json import as_id
from mmfinetune.evaluation.detections import Truth, is_box
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.images import IMAGE_SUFFIXES
from mmfinetune.utils.masks import check_polygon, check_rle, to_rle

_SAMPLE = 500  # rows that tell how boxes are written
_FITS, _BETTER = 0.7, 0.1  # IoU of a box read in the right way with the box of its mask

# How boxes are written: arrays (N, 4) as left, top, width, height.
_READINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    'x, y, width, height': lambda b: b,
    'x1, y1, x2, y2': lambda b: np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]),
    'centre x, centre y, width, height': lambda b: np.hstack([b[:, :2] - b[:, 2:] / 2, b[:, 2:]]),
}


def regular(path: Path, rows: Sequence[Any], truth: Truth) -> tuple[list, list[Message]]:
    """The rows with ids of the ground truth, masks as run lengths and boxes of left, top, width, height.

    Returns:
        Rows, and notes on what was read in another way than COCO's.

    Raises:
        UserError: The coordinates are relative ones.
    """
    rows = [dict(row) if isinstance(row, dict) else row for row in rows]
    dicts = [row for row in rows if isinstance(row, dict)]
    notes = [
        *_identify(dicts, 'image_id', truth.images, _by_file_name(truth)),
        *_identify(dicts, 'category_id', truth.names, {name: [i] for i, name in truth.names.items()}),
    ]
    placed = [row for row in dicts if isinstance(row.get('image_id'), (int, str)) and row['image_id'] in truth.images]
    _require_pixels(path, placed)
    notes += _encode_polygons(placed, truth)
    notes += _read_boxes(placed, truth)
    return rows, notes


def _identify(rows: list[dict], key: str, known: Mapping, names: Mapping[Any, list]) -> list[Message]:
    """Put ids of the ground truth in the place of ids as text, or of names if more of the values are names."""
    values = {row[key] for row in rows if type(row.get(key)) in (int, float, str)}
    as_ids = {value: found for value in values if (found := value if value in known else as_id(value)) in known}
    as_names = {value: found[0] for value in values if len(found := _named(value, names)) == 1}
    notes = []
    chosen = as_ids
    if len(as_names) > len(as_ids):
        chosen = as_names
        notes = [Message('rows-named', key=key, count=len(chosen), example=next(iter(chosen)))]
    elif (
        len(as_names) == len(as_ids) == len(values)
        and as_names != as_ids
        and not any('file_name' in row for row in rows)
    ):
        other = [value for value in as_ids if as_names[value] != as_ids[value]]
        notes = [Message('rows-also-named', key=key, count=len(other), example=other[0])]
    for row in rows:
        if type(row.get(key)) in (int, float, str):
            row[key] = chosen.get(row[key], row[key])
    return notes


def _by_file_name(truth: Truth) -> dict[Any, list]:
    """Ids of the images by each end of their path, with and without suffix; a stem of digits as a number too."""
    found: dict[Any, list] = {}
    for image_id, image in truth.images.items():
        parts = PurePosixPath(image['file_name'].replace('\\', '/')).parts
        for first in range(len(parts)):
            end = PurePosixPath(*parts[first:])
            for name in {str(end), str(end.with_suffix(''))}:
                found.setdefault(name, []).append(image_id)
        if re.fullmatch('[0-9]{1,18}', end.stem):
            found.setdefault(int(end.stem), []).append(image_id)
    return found


def _named(value: Any, names: Mapping[Any, list]) -> list:
    """The ids that a name may stand for: of the whole, or of its end where it has folders in front."""
    if not isinstance(value, str):
        return names.get(value, [])
    path = PurePosixPath(value.replace('\\', '/'))
    ends = [str(PurePosixPath(*path.parts[first:])) for first in range(len(path.parts))]
    if path.suffix.lower() in IMAGE_SUFFIXES:
        ends += [end.removesuffix(path.suffix) for end in ends]
    return next((names[end] for end in [value, *ends] if end in names), [])


def _require_pixels(path: Path, rows: list[dict]) -> None:
    """Refuse boxes or polygons of which all coordinates are parts of the image's size."""
    for key, flat in (('bbox', _flat_box), ('segmentation', _flat_polygon)):
        found = [values for row in rows if (values := flat(row.get(key)))]
        if found and all(0 <= value <= 1 for values in found for value in values):
            raise UserError('rows-relative', path=path, key=key, example=[round(value, 4) for value in found[0][:4]])


def _flat_box(box: Any) -> list:
    return box if is_box(box) else []


def _flat_polygon(shape: Any) -> list:
    parts = _polygons(shape)
    numbers = [value for part in parts for value in part]
    return numbers if all(type(value) in (int, float) for value in numbers) else []


def _polygons(shape: Any) -> list[list]:
    """Polygons of a segmentation; none if it is something else."""
    if not isinstance(shape, list) or not shape:
        return []
    parts = shape if isinstance(shape[0], list) else [shape]
    return parts if all(isinstance(part, list) for part in parts) else []


def _encode_polygons(rows: list[dict], truth: Truth) -> Iterable[Message]:
    count = 0
    for row in rows:
        parts, image = _polygons(row.get('segmentation')), truth.images[row['image_id']]
        size = image['height'], image['width']
        try:
            for part in parts:
                check_polygon(part, *size)
        except Problem:
            continue
        if parts:
            row['segmentation'] = to_rle([part for part in parts if len(part) >= 6] or [[0.0] * 6], *size)
            count += 1
    return [Message('rows-polygons', count=count)] if count else []


def _read_boxes(rows: list[dict], truth: Truth) -> list[Message]:
    """Read boxes as their masks say that they are written; without masks, say that they leave their images."""
    boxed = [row for row in rows if is_box(row.get('bbox'))]
    pairs = [pair for row in boxed[:: max(1, len(boxed) // _SAMPLE)] if (pair := _with_mask_box(row, truth))]
    if not pairs:
        return _leaving(boxed, truth)
    written, wanted = (np.array(boxes, float) for boxes in zip(*pairs, strict=True))
    fit = {name: float(np.median(_ious(read(written), wanted))) for name, read in _READINGS.items()}
    usual, best = next(iter(fit)), max(fit, key=lambda name: fit[name])
    boxes = _READINGS[best](np.array([row['bbox'] for row in boxed], float))
    if fit[best] < _FITS or fit[best] < fit[usual] + _BETTER or (boxes[:, 2:] < 0).any():
        return []
    for row, box in zip(boxed, boxes.tolist(), strict=True):
        row['bbox'] = box
    return [Message('rows-boxes-read', count=len(boxed), reading=best)]


def _with_mask_box(row: dict, truth: Truth) -> tuple[list, list] | None:
    image = truth.images[row['image_id']]
    try:
        rle = check_rle(row.get('segmentation'), image['height'], image['width'])
    except Problem:
        return None
    return (row['bbox'], mask_api.toBbox(rle).tolist()) if mask_api.area(rle) else None


def _ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    both = np.maximum(high - low, 0).prod(1)
    areas = np.maximum(boxes[:, 2:], 0).prod(1) + others[:, 2:].prod(1)
    return both / np.maximum(areas - both, 1e-9)


def _leaving(rows: list[dict], truth: Truth) -> list[Message]:
    if not rows:
        return []
    boxes = np.array([row['bbox'] for row in rows], float)
    sizes = np.array([[truth.images[row['image_id']][side] for side in ('width', 'height')] for row in rows], float)
    leaving = (boxes[:, :2] + boxes[:, 2:] > 1.02 * sizes + 2).any(1)
    corners = (boxes[:, 2:] >= boxes[:, :2]).all() and (boxes[:, 2:] <= 1.02 * sizes + 2).all()
    if not corners or leaving.mean() < 0.2:
        return []
    return [Message('rows-boxes-leave', count=int(leaving.sum()), all=len(rows))]
