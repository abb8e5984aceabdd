"""Whether the masks of an annotation file are what they should be, all of them and quickly.

Polygons are measured as numbers, block by block; only the few that are thin, tiny or disagree with
their annotation are drawn.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from mmfinetune.data.check import kinds
from mmfinetune.data.check.findings import Marks
from mmfinetune.data.check.table import Table
from mmfinetune.utils import console
from mmfinetune.utils.errors import Problem
from mmfinetune.utils.masks import compress, run_lengths, to_rle

_BLOCK = 20_000  # annotations: their coordinates stay within the processor's cache
_CROSSING_PX = 16
_ENLARGED = 4
_LARGEST = 50_000  # px: a larger polygon is not drawn
# A file is said to hold boxes for masks if this share of its larger masks are their boxes.
_RECTANGLE_SHARE, _RECTANGLE_LEAST, _RECTANGLE_SIDE = 0.5, 10, 8
# Of annotations sorted by area, each is compared with so many that follow it.
_NEIGHBOURS = 64


@dataclass
class Masks:
    """Measures of all masks of a file, NaN where there is none that can be used.

    Attributes:
        shapes: The segmentations.
        extents: (A, 4) float64, x1, y1, x2, y2 of the mask, not cut at the image's border.
        areas: (A,) float64 pixels.
        borders: (A,) float64, length of the outline in pixels; 0 for RLE.
        rectangle: (A,) bool, the mask fills its extent.
    """

    shapes: list
    extents: np.ndarray
    areas: np.ndarray
    borders: np.ndarray
    rectangle: np.ndarray


def check_masks(table: Table, progress: bool = True) -> Masks:
    """Mark the annotations of a table whose masks, boxes or areas are wrong."""
    count = len(table.annotations)
    shapes = [entry.get('segmentation') for entry in table.annotations]
    masks = Masks(shapes, np.full((count, 4), np.nan), np.full(count, np.nan), np.zeros(count), np.zeros(count, bool))
    polygons, rles = _split_by_type(table, shapes)
    with console.bar(total=count, desc=f'masks of {table.name}', unit='mask', wanted=progress) as bar:
        for measure, rows in ((_measure_polygons, polygons), (_measure_rles, rles)):
            for start in range(0, len(rows), _BLOCK):
                block = rows[start : start + _BLOCK]
                measure(table, masks, block)
                bar.update(len(block))
    _compare(table, masks)
    _compare_areas(table, masks)
    _find_rectangles(table, masks)
    _find_duplicates(table, masks)
    return masks


def _split_by_type(table: Table, shapes: list[object]) -> tuple[np.ndarray, np.ndarray]:
    """Rows with polygons and rows with RLE; marks the others."""
    polygons, rles, missing, wrong = [], [], [], {}
    for i, shape in enumerate(shapes):
        if type(shape) is list and shape and type(shape[0]) is array:
            polygons.append(i)
        elif type(shape) is dict and shape:
            rles.append(i)
        elif shape is None or shape == [] or shape == {}:
            if table.annotations[i]:
                missing.append(i)
        elif type(shape) is list:
            wrong[i] = _why_no_polygons(shape)
        else:
            wrong[i] = f'segmentation is {type(shape).__name__}'
    table.marks.add('mask-missing', missing)
    table.marks.add('mask-type', list(wrong), wrong)
    rows = np.array(polygons, np.int64)
    table.marks.add('crowd-polygon', rows[table.crowd[rows]])
    return rows, np.array(rles, np.int64)


def _why_no_polygons(shape: list) -> str:
    if all(type(v) in (int, float) for v in shape):
        return 'one flat list of numbers, not a list of polygons'
    for part in shape:
        if not isinstance(part, list):
            return f'a polygon is {type(part).__name__}'
        for value in part:
            if type(value) not in (int, float, bool):
                return f'a coordinate is {type(value).__name__}'
    return 'a number too large'


@dataclass
class _Rings:
    """The polygons of a block of annotations, all points in one array.

    Attributes:
        owner: (P,) int64 row of the annotation of each polygon; those of one follow each other.
        points: (N, 2) float64 x, y.
        counts: (P,) int64 points of each polygon.
        starts: (P,) int64 position of each polygon's first point.
        low, high: (P, 2) corners of each polygon's extent.
        areas: (P,) float64 enclosed pixels.
        borders: (P,) float64 length of the outline.
    """

    owner: np.ndarray
    points: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        points, counts = self.points, self.counts
        ends = np.cumsum(counts)
        self.starts = ends - counts
        self.low, self.high = (f.reduceat(points, self.starts) for f in (np.minimum, np.maximum))
        # Relative to a corner, since products of large coordinates would cancel.
        x, y = (points - np.repeat(self.low, counts, axis=0)).T
        following = np.arange(1, len(points) + 1)
        following[ends - 1] = self.starts
        dx, dy = x[following] - x, y[following] - y
        self.areas = np.abs(np.add.reduceat(x * dy - y * dx, self.starts) / 2)
        self.borders = np.add.reduceat(np.hypot(dx, dy), self.starts)


def _measure_polygons(table: Table, masks: Masks, rows: np.ndarray) -> None:
    rings = _usable_rings(table.marks, masks.shapes, rows)
    if rings is None:
        return
    far = _find_outside(table, rings)
    _find_crossings(table.marks, rings)
    first = np.flatnonzero(np.diff(rings.owner, prepend=-1))
    which = rings.owner[first]
    masks.extents[which, :2] = np.minimum.reduceat(rings.low, first)
    masks.extents[which, 2:] = np.maximum.reduceat(rings.high, first)
    masks.areas[which] = np.add.reduceat(rings.areas, first)
    masks.borders[which] = np.add.reduceat(rings.borders, first)
    sides = masks.extents[which, 2:] - masks.extents[which, :2]
    alone = np.diff(first, append=len(rings.owner)) == 1
    masks.rectangle[which] = alone & (masks.areas[which] >= 0.99 * sides.prod(1)) & (sides.min(1) >= _RECTANGLE_SIDE)
    # What is thinner than a pixel may miss all centres of pixels.
    thin = which[masks.areas[which] <= masks.borders[which] / 2 + 2]
    for i in thin[table.sizes_of(thin)[0] > 0].tolist():
        if i not in far:
            masks.areas[i] = mask_api.area(_draw(table, masks.shapes[i], i))


def _usable_rings(marks: Marks, shapes: list, rows: np.ndarray) -> _Rings | None:
    """The polygons that can be measured; marks the others."""
    parts = list(itertools.chain.from_iterable(shapes[i] for i in rows))
    owner = np.repeat(rows, [len(shapes[i]) for i in rows])
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    flat = np.frombuffer(b''.join(parts), np.float64)
    starts = np.cumsum(lengths) - lengths
    odd, short = lengths % 2 == 1, lengths < 6
    bad_number = np.zeros(len(parts), bool)
    wild = np.flatnonzero(~(np.abs(flat) < 1e9))
    bad_number[np.searchsorted(starts, wild, 'right') - 1] = True
    marks.add('polygon-points', owner[short & ~odd], lambda i: f'{min(map(len, shapes[i])) // 2} points')
    marks.add('polygon-odd', owner[odd])
    marks.add('polygon-number', owner[bad_number])
    good = ~(odd | short | bad_number)
    if not good.any():
        return None
    return _Rings(owner[good], flat[np.repeat(good, lengths)].reshape(-1, 2), lengths[good] // 2)


def _find_outside(table: Table, rings: _Rings) -> set[int]:
    """Mark polygons that leave the image; the rows of those that are far away."""
    size = np.stack(table.sizes_of(rings.owner), 1)
    beyond = np.maximum(-rings.low, rings.high - size).max(1)
    far = (size[:, 0] > 0) & (beyond > size.max(1))
    over = (size[:, 0] > 0) & ~far & (beyond > kinds.BOX_TOLERANCE_PX)

    def word(i: int) -> str:
        at = np.flatnonzero(rings.owner == i)
        (x1, y1), (x2, y2) = rings.low[at].min(0), rings.high[at].max(0)
        width, height = size[at[0]]
        return f'from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) in {width}x{height}'

    # Worded now, since the block is gone when the report is written.
    for code, found in (('polygon-far', far), ('polygon-over-edge', over)):
        which = np.unique(rings.owner[found])
        table.marks.add(code, which, {int(i): word(i) for i in which[:100]})
    return set(rings.owner[far].tolist())


def _find_crossings(marks: Marks, rings: _Rings) -> None:
    """Mark polygons of which a good part is filled the wrong way.

    Real outlines touch or cross themselves by a pixel here and there, which does no harm. What
    counts is by how much the area as drawn (even-odd) differs from the area as traversed.
    """
    import shapely

    points, starts, counts = rings.points, rings.starts, rings.counts
    closed = (points[starts] == points[starts + counts - 1]).all(1)
    # A triangle cannot cross itself.
    judged = (counts - closed >= 4) & ((rings.high - rings.low).max(1) < _LARGEST)
    chosen = np.flatnonzero(judged)
    if not len(chosen):
        return
    of_point = np.repeat(np.arange(len(chosen)), counts[chosen])
    shapes = shapely.polygons(shapely.linearrings(points[np.repeat(judged, counts)], indices=of_point))
    suspects = chosen[~shapely.is_valid(shapes)]
    areas = rings.areas[suspects]
    drawn = np.array([_drawn_area(points[starts[k] : starts[k] + counts[k]]) for k in suspects])
    wrong, total = np.abs(drawn - areas), np.maximum(drawn, areas)
    # An outline drawn is off by up to half a pixel of the enlarged picture.
    off = np.maximum(_CROSSING_PX, rings.borders[suspects] / 2 / _ENLARGED)
    bad = (wrong >= kinds.CROSSING_SHARE * total) & (wrong >= off)
    rows = rings.owner[suspects[bad]].tolist()
    wrong, total = wrong[bad], total[bad]
    details = {i: f'{w:.0f} of {t:.0f} px' for i, w, t in zip(rows, wrong, total, strict=True)}
    marks.add('polygon-crossing', rows, details, dict(zip(rows, wrong / total, strict=True)))


def _drawn_area(points: np.ndarray) -> float:
    """The area of a polygon (P, 2) as pycocotools fills it, in an enlarged picture of its own.

    GEOS could repair the polygon and measure it, but takes hours where thousands of lines cross.
    """
    low = points.min(0)
    enlarged = _ENLARGED if (points.max(0) - low).max() < 10_000 else 1
    points = (points - low) * enlarged
    width, height = np.ceil(points.max(0)).astype(int).tolist()
    rle = mask_api.frPyObjects([points.ravel()], max(height, 1), max(width, 1))[0]
    return float(mask_api.area(rle)) / enlarged**2


def _draw(table: Table, shape: list | dict, row: int) -> dict:
    """The RLE of an annotation's RLE or of its polygons that can be drawn."""
    image = table.image_rows[row]
    height, width = int(table.heights[image]), int(table.widths[image])
    if isinstance(shape, list):
        parts = [np.asarray(p) for p in shape if len(p) >= 6 and len(p) % 2 == 0]
        # One point outside draws nothing.
        shape = [p for p in parts if (np.abs(p) < 4 * max(height, width)).all()] or [np.full(6, -1.0)]
    return to_rle(shape, height, width)


def _measure_rles(table: Table, masks: Masks, rows: np.ndarray) -> None:
    encoded: dict[int, dict[str, Any]] = {}
    wrong_size, wrong_counts = {}, {}
    for i, w, h in zip(rows.tolist(), *(side.tolist() for side in table.sizes_of(rows)), strict=True):
        size = masks.shapes[i].get('size')
        if not (isinstance(size, list) and len(size) == 2 and all(type(v) is int and 0 < v < 1 << 31 for v in size)):
            wrong_size[i] = f'size {size!r}'
        elif w and size != [h, w]:
            wrong_size[i] = f'size {size}, the image is {[h, w]}'
        else:
            try:
                encoded[i] = {'size': size, 'counts': compress(masks.shapes[i].get('counts'), size)}
            except Problem as problem:
                wrong_counts[i] = str(problem)
    if encoded:
        which, rles = np.array(list(encoded)), list(encoded.values())
        totals, areas = run_lengths([rle['counts'] for rle in rles])
        whole = np.array([rle['size'] for rle in rles]).prod(1)
        good = totals == whole
        for k in np.flatnonzero(~good).tolist():
            sums = f'the runs sum to {totals[k]}, not {whole[k]}'
            wrong_counts[int(which[k])] = sums if totals[k] >= 0 else 'the run lengths are not valid'
        if good.any():
            boxes = mask_api.toBbox([rle for rle, is_good in zip(rles, good, strict=True) if is_good])
            which, areas, sides = which[good], areas[good], boxes[:, 2:]
            masks.areas[which] = areas
            masks.extents[which] = np.concatenate([boxes[:, :2], boxes[:, :2] + sides], 1)
            masks.rectangle[which] = (areas == sides.prod(1)) & (sides.min(1) >= _RECTANGLE_SIDE)
    table.marks.add('rle-size', list(wrong_size), wrong_size)
    table.marks.add('rle-counts', list(wrong_counts), wrong_counts)


def _compare(table: Table, masks: Masks) -> None:
    """Mark masks without pixels and boxes that are not those of the mask."""
    marks, areas = table.marks, masks.areas
    measured = np.isfinite(areas)
    width, height = table.sizes_of(np.arange(len(areas)))
    x1, y1, x2, y2 = masks.extents.T
    away = (width > 0) & ((x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height))
    tiny = measured & ~away & (areas > 0) & (areas < kinds.TINY_PX)
    box = np.concatenate([table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]], 1)
    limit = np.where(width[:, None] > 0, np.stack([width, height] * 2, 1), np.inf)
    cut = np.clip(masks.extents, 0, limit)
    off = np.minimum(np.abs(box - masks.extents).max(1), np.abs(box - cut).max(1))
    wrong = off > np.maximum(kinds.BOX_TOLERANCE_PX, kinds.BOX_TOLERANCE_SHARE * table.boxes[:, 2:].max(1))
    # Without area there is an error already.
    wrong &= (table.boxes[:, 2:] > 0).all(1) & (areas > 0)

    def detail(i: int) -> str:
        both = table.boxes[i].round(2), (x1[i], y1[i], x2[i] - x1[i], y2[i] - y1[i])
        bbox, mask = (', '.join(f'{value:g}' for value in values) for values in both)
        return f'off by {off[i]:.1f} px: bbox [{bbox}], mask [{mask}]'

    marks.add('mask-empty', np.flatnonzero(measured & ((areas == 0) | away)))
    marks.add('mask-tiny', np.flatnonzero(tiny), lambda i: f'{areas[i]:.0f} px')
    marks.add('box-mask', np.flatnonzero(wrong), detail, off)


def _compare_areas(table: Table, masks: Masks) -> None:
    # Pixels drawn and area enclosed differ by up to half the outline.
    free = np.maximum(kinds.AREA_TOLERANCE * masks.areas, masks.borders / 2 + 2)
    # COCO's own crowd regions have areas that are not those of their RLE; nothing uses them.
    suspects = np.flatnonzero((np.abs(table.areas - masks.areas) > free) & (masks.areas > 0) & ~table.crowd)
    wrong, ratio = {}, {}
    suspects = np.setdiff1d(suspects, list(table.marks.marked('polygon-far', 'mask-empty')))
    for i, width in zip(suspects.tolist(), table.sizes_of(suspects)[0].tolist(), strict=True):
        area, pixels = table.areas[i], masks.areas[i]
        # Parts that overlap, or leave the image, have fewer pixels than the sum of their areas.
        if type(masks.shapes[i]) is list and width:
            pixels = float(mask_api.area(_draw(table, masks.shapes[i], i)))
        if abs(area - pixels) > max(kinds.AREA_TOLERANCE * pixels, masks.borders[i] / 2 + 2):
            wrong[i] = f'area {area:g}, mask {pixels:.0f} px'
            box = table.boxes[i, 2] * table.boxes[i, 3]
            if abs(box - area) <= 0.01 * box:
                wrong[i] += ', area of the bbox'
            ratio[i] = abs(np.log(area / max(pixels, 1)))
    table.marks.add('area-mismatch', list(wrong), wrong, ratio)


def _find_rectangles(table: Table, masks: Masks) -> None:
    sides = masks.extents[:, 2:] - masks.extents[:, :2]
    judged = (sides.min(1) >= _RECTANGLE_SIDE) & ~table.crowd
    rectangles = np.flatnonzero(masks.rectangle & judged)
    if len(rectangles) >= max(_RECTANGLE_LEAST, _RECTANGLE_SHARE * judged.sum()):
        share = len(rectangles) / judged.sum()
        table.marks.add('rectangle-masks', rectangles, f'{share:.0%} of the masks of {_RECTANGLE_SIDE} px or more')


def _find_duplicates(table: Table, masks: Masks) -> None:
    """Mark the later of two objects of a class with almost the same mask."""
    usable = (masks.areas > 0) & (table.category_rows >= 0) & ~table.crowd
    usable &= table.sizes_of(np.arange(len(usable)))[0] > 0
    usable[list(table.marks.marked('polygon-far', 'mask-empty'))] = False
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort((masks.areas[rows], table.category_rows[rows], table.image_rows[rows]))]
    shapes, duplicate = masks.shapes, {}
    for first, second in _near(table, masks, rows):
        if second in duplicate:
            continue
        # Most duplicates are copies, which need not be drawn.
        iou = 1.0
        if shapes[first] != shapes[second]:
            drawn = [[_draw(table, shapes[row], row)] for row in (second, first)]
            iou = float(mask_api.iou(*drawn, [0])[0, 0])
        if iou > kinds.DUPLICATE_IOU:
            duplicate[second] = f'IoU {iou:.3f} with #{table.annotations[first].get("id")}'
    table.marks.add('object-duplicate', list(duplicate), duplicate)


def _near(table: Table, masks: Masks, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of one class in one image with about the same area and extent; rows are ordered by all these."""
    group = table.image_rows[rows] * (len(table.categories) + 1) + table.category_rows[rows]
    areas, extents = masks.areas[rows], masks.extents[rows]
    boxes = extents[:, 2:] - extents[:, :2]
    at: np.ndarray = np.arange(len(rows))
    for step in range(1, _NEIGHBOURS + 1):
        at = at[at + step < len(rows)]
        # An outline measured and a mask drawn differ a little, so twice the tolerance.
        at = at[
            (group[at] == group[at + step]) & (areas[at] >= (1 - 2 * (1 - kinds.DUPLICATE_IOU)) * areas[at + step] - 2)
        ]
        if not len(at):
            return
        shift = np.abs(extents[at] - extents[at + step]).max(1)
        # Masks of that IoU may differ by a thin spike, so boxes are judged by a larger measure.
        alike = shift <= np.maximum(2, 0.25 * np.maximum(boxes[at], boxes[at + step]).max(1))
        for k in at[alike].tolist():
            first, second = sorted((int(rows[k]), int(rows[k + step])))
            yield first, second
