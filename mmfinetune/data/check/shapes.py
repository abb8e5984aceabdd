"""Repairs of one segmentation: clip, turn, measure. Polygons stay polygons."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as mask_api

from mmfinetune.data.check.kinds import BOX_TOLERANCE_PX
from mmfinetune.utils.masks import mask_to_rle, to_rle

if TYPE_CHECKING:
    from shapely import Polygon


def usable_polygons(shape: object) -> list[list[float]] | None:
    """The usable polygons of a segmentation, a flat single one wrapped; None if it is not a list."""
    if not isinstance(shape, list):
        return None
    if shape and all(type(value) in (int, float) for value in shape):
        shape = [shape]
    parts = [part for part in shape if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
    return [part for part in parts if all(type(v) in (int, float) and abs(v) < 1e9 for v in part)]


def clip(polygons: Iterable[list[float]], width: int, height: int) -> list[list[float]]:
    """The parts of polygons within the image, rounded to 1/100 px."""
    import shapely

    clipped: list[list[float]] = []
    for part in polygons:
        shape = shapely.make_valid(shapely.Polygon(np.reshape(part, (-1, 2))))
        inside = shapely.clip_by_rect(shape, 0, 0, width, height)
        for piece in shapely.get_parts(shapely.get_parts(inside)):
            if piece.geom_type == 'Polygon' and piece.area > 0:
                clipped.append(_one_ring(shapely.geometry.polygon.orient(piece)))
    return clipped


def _one_ring(polygon: Polygon) -> list[float]:
    """A polygon as a single ring: COCO has no holes, so a slit leads to each and back."""
    outline = np.asarray(polygon.exterior.coords)
    rings = [outline]
    for hole in polygon.interiors:
        rings += [np.asarray(hole.coords), outline[:1]]
    return np.concatenate(rings).round(2).ravel().tolist()


def turn_polygons(polygons: Iterable[list[float]], orientation: int, width: int, height: int) -> list[list[float]]:
    """Polygons of a stored image, as they are once its EXIF orientation of 5 to 8 (EXIF 2.32, tag 0x0112) is applied."""
    turned = []
    for part in polygons:
        x, y = np.reshape(part, (-1, 2)).T
        points = {5: (y, x), 6: (height - y, x), 7: (height - y, width - x), 8: (y, width - x)}[orientation]
        turned.append(np.stack(points, 1).ravel().round(2).tolist())
    return turned


def turn_mask(mask: np.ndarray, orientation: int) -> np.ndarray:
    """A mask (H, W) of a stored image as (W, H), its EXIF orientation of 5 to 8 applied."""
    return {5: mask.T, 6: np.rot90(mask, -1), 7: np.rot90(mask, 2).T, 8: np.rot90(mask)}[orientation]


def turn(shape: Any, orientation: int, width: int, height: int) -> Any:
    """A segmentation of a stored image as one of the upright image; see `turn_polygons`."""
    polygons = usable_polygons(shape)
    if polygons is not None:
        return turn_polygons(polygons, orientation, width, height)
    if not isinstance(shape, dict):
        return shape
    return mask_to_rle(turn_mask(mask_api.decode(to_rle(shape, height, width)), orientation))


def frame_of(shapes: Iterable[Any], width: int, height: int) -> str:
    """Which picture masks were drawn on, of an image that EXIF turns from this stored size.

    Returns:
        'upright' or 'stored' if a mask leaves the other frame; empty if the masks do not tell.
    """
    shapes = list(shapes)
    upright = any(_reaches_beyond(shape, width, height) for shape in shapes)
    stored = any(_reaches_beyond(shape, height, width) for shape in shapes)
    return '' if upright == stored else 'upright' if upright else 'stored'


def _reaches_beyond(shape: Any, width: int, height: int) -> bool:
    """Whether a mask leaves a frame, or says that it is one of the frame turned."""
    if isinstance(shape, dict):
        return shape.get('size') == [width, height]
    points = np.reshape([value for part in usable_polygons(shape) or () for value in part], (-1, 2))
    return bool((points > np.add((width, height), BOX_TOLERANCE_PX)).any())


def measure(shape: Any, width: int, height: int) -> tuple[list[float], float]:
    """Box (x, y, width, height) and area in pixels of a mask, within the image."""
    rle = to_rle(shape, height, width)
    area = float(mask_api.area(rle))
    if isinstance(shape, list):
        points = np.concatenate([np.reshape(part, (-1, 2)) for part in shape])
        low, high = (np.clip(corner, 0, [width, height]) for corner in (points.min(0), points.max(0)))
        return np.concatenate([low, high - low]).round(2).tolist(), area
    return [float(v) for v in mask_api.toBbox(rle)], area
