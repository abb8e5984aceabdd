"""COCO result rows of what a model finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfinetune.utils.masks import mask_to_rle


def result_rows(
    image_id: int,
    category_ids: Sequence[int],
    labels: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray | None = None,
    masks: Sequence[Any] | np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """COCO result rows of one image: ``image_id, category_id, score``, ``bbox`` and ``segmentation``.

    Args:
        image_id: Id of the image.
        category_ids: Category id of each label.
        labels: (N,) class numbers.
        scores: (N,) float32.
        boxes: (N, 4) float32 left, top, right, bottom in px; rows have no ``bbox`` without them.
        masks: (N, H, W) bool, or N run lengths; rows have no ``segmentation`` without them.
    """
    rows = [
        {'image_id': image_id, 'category_id': category_ids[label], 'score': score}
        for label, score in zip(labels, _shortest(scores), strict=True)
    ]
    if boxes is not None:
        sizes = _shortest(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1))
        for row, bbox in zip(rows, sizes, strict=True):
            row['bbox'] = bbox
    if masks is not None:
        for row, mask in zip(rows, masks, strict=True):
            row['segmentation'] = _as_text(mask) if isinstance(mask, Mapping) else mask_to_rle(mask)
    return rows


def _shortest(values: np.ndarray) -> list:
    """The numbers with as many digits as a float32 has; as doubles they would get ten more."""
    return np.asarray(values, np.float32).astype(str).astype(float).tolist()


def _as_text(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle['counts']
    return {'size': [*map(int, rle['size'])], 'counts': counts.decode() if isinstance(counts, bytes) else counts}
