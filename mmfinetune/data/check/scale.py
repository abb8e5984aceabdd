"""Whether masks are of the scale of their images."""

from __future__ import annotations

import numpy as np

from mmfinetune.data.check.kinds import BEYOND, BEYOND_LEAST, BEYOND_SHARE
from mmfinetune.data.check.masks import Masks
from mmfinetune.data.check.table import Table


def check_scale(table: Table, masks: Masks) -> None:
    """Mark coordinates from 0 to 1, and images of which the labels are of a larger picture."""
    sizes = np.stack(table.sizes_of(np.arange(len(table.annotations))), 1)
    rows = np.flatnonzero(np.isfinite(masks.extents).all(1) & (sizes > 2).all(1) & (masks.borders > 0))
    if not len(rows):
        return
    extents, images = masks.extents[rows], table.image_rows[rows]
    if (extents >= 0).all() and (extents <= 1).all():
        table.marks.add('labels-relative', rows)
        return
    reach = np.zeros(len(table.images))
    np.maximum.at(reach, images, (extents[:, 2:] / sizes[rows]).max(1))
    beyond = np.flatnonzero(reach > BEYOND)
    if are_larger(len(beyond), len(np.unique(images))):
        table.marks.add('labels-larger', beyond, lambda i: f'up to {reach[i]:.2f} times its size', reach)


def are_larger(beyond: int, images: int) -> bool:
    """Whether so many images with masks that reach beyond them are too many for slips."""
    return beyond >= max(BEYOND_LEAST, BEYOND_SHARE * images)
