"""Whether the masks of an annotation file are what they should be, all of them and quickly.

Polygons are measured as numbers, block by block; only the few that are thin, tiny or at odds with
their annotation are drawn.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_api
from tqdm import tqdm

from mmfinetune.data.check.findings import Marks
from mmfinetune.data.check.kinds import (
    AREA_TOLERANCE,
    BOX_TOLERANCE_PX,
    BOX_TOLERANCE_SHARE,
    CROSSING_SHARE,
    DUPLICATE_IOU,
    TINY_PX,
)
from mmfinetune.data.check.table import Table
from mmfinetune.utils.errors import Problem
from mmfinetune.utils.masks import compress, run_lengths

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
        extents: (A, 4) float64, x1, y1, x2, y2 of the mask, not cut at the image's border.
        areas: (A,) float64 pixels.
        borders: (A,) float64, length of the outline in pixels; 0 for RLE.
        rectangle: (A,) bool, the mask fills its extent.
    """

    extents: np.ndarray
    areas: np.ndarray
    borders: np.ndarray
    rectangle: np.ndarray


def check_masks(table: Table, progress: bool = True) -> Masks:
    """Mark the annotations of a table whose masks, boxes or areas are wrong."""
    count = len(table.annotations)
    masks = Masks(np.full((count, 4), np.nan), np.full(count, np.nan), np.zeros(count), np.zeros(count, bool))
    shapes = [entry.get('segmentation') for entry in table.annotations]
    polygons, rles = _sort_out(table, shapes)
    # None leaves the bar out where the output is no terminal.
    with tqdm(
        total=count, desc=f'masks of {table.name}', unit='mask', disable=None if progress else True, leave=False
    ) as bar:
        for rows in _blocks(polygons):
            _measure_polygons(table, shapes, rows, masks)
            bar.update(len(rows))
        for rows in _blocks(rles):
            _measure_rles(table, shapes, rows, masks)
            bar.update(len(rows))
    _compare(table, shapes, masks)
    _find_rectangles(table, masks)
    _find_duplicates(table, shapes, masks)
    return masks


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))


def _sort_out(table: Table, shapes: list[object]) -> tuple[np.ndarray, np.ndarray]:
    """Rows with polygons and rows with RLE; marks the others."""
    polygons, rles, missing, wrong = [], [], [], {}
    for i, shape in enumerate(shapes):
        if type(shape) is list:
            if not shape:
                missing.append(i)
            elif type(shape[0]) is array:
                polygons.append(i)
            else:
                wrong[i] = _why_no_polygons(shape)
        elif type(shape) is dict:
            (rles if shape else missing).append(i)
        elif shape is None:
            if table.annotations[i]:
                missing.append(i)
        else:
            wrong[i] = f'segmentation is {type(shape).__name__}'
    table.marks.add('mask-missing', missing)
    table.marks.add('mask-type', list(wrong), wrong)
    polygons = np.array(polygons, np.int64)
    table.marks.add('crowd-polygon', polygons[table.crowd[polygons]])
    return polygons, np.array(rles, np.int64)


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


def _measure_polygons(table: Table, shapes: list, rows: np.ndarray, masks: Masks) -> None:
    marks = table.marks
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
    if not good.all():
        flat = flat[np.repeat(good, lengths)]
        owner, lengths = owner[good], lengths[good]
    if not len(owner):
        return

    points = flat.reshape(-1, 2)
    counts = lengths // 2
    ends = np.cumsum(counts)
    starts = ends - counts
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    # Relative to a corner, since products of large coordinates would cancel.
    x, y = (points - np.repeat(low, counts, axis=0)).T
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = starts
    dx, dy = x[following] - x, y[following] - y
    signed = np.add.reduceat(x * dy - y * dx, starts) / 2
    areas = np.abs(signed)
    borders = np.add.reduceat(np.hypot(dx, dy), starts)

    width, height = table.sizes_of(owner)
    size = np.stack([width, height], 1)
    known = width > 0
    beyond = np.maximum(-low, high - size).max(1)
    far = known & (beyond > size.max(1))
    over = known & ~far & (beyond > BOX_TOLERANCE_PX)

    def word(i: int) -> str:
        at = np.flatnonzero(owner == i)
        (x1, y1), (x2, y2) = low[at].min(0), high[at].max(0)
        return f'from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}) in {width[at[0]]}x{height[at[0]]}'

    # Worded now, since the block is gone when the report is written.
    for code, found in (('polygon-far', far), ('polygon-over-edge', over)):
        which = np.unique(owner[found])
        marks.add(code, which, {int(i): word(i) for i in which[:100]})
    sane = (high - low).max(1) < _LARGEST
    _find_crossings(marks, owner, points, counts, starts, areas, borders, sane)

    first = np.flatnonzero(np.diff(owner, prepend=-1))
    which = owner[first]
    masks.extents[which, :2] = np.minimum.reduceat(low, first)
    masks.extents[which, 2:] = np.maximum.reduceat(high, first)
    masks.areas[which] = np.add.reduceat(areas, first)
    masks.borders[which] = np.add.reduceat(borders, first)
    sides = masks.extents[which, 2:] - masks.extents[which, :2]
    alone = np.diff(first, append=len(owner)) == 1
    masks.rectangle[which] = alone & (masks.areas[which] >= 0.99 * sides.prod(1)) & (sides.min(1) >= _RECTANGLE_SIDE)
    # What is thinner than a pixel may miss all centres of pixels.
    drawn = which[(masks.areas[which] <= masks.borders[which] / 2 + 2)]
    gone = set(owner[far].tolist())
    for i in drawn.tolist():
        if i not in gone and table.image_rows[i] >= 0 and table.widths[table.image_rows[i]]:
            masks.areas[i] = mask_api.area(_draw(table, shapes[i], i))


def _find_crossings(
    marks: Marks,
    owner: np.ndarray,
    points: np.ndarray,
    counts: np.ndarray,
    starts: np.ndarray,
    areas: np.ndarray,
    borders: np.ndarray,
    sane: np.ndarray,
) -> None:
    """Mark polygons of which a good part is filled the wrong way.

    Real outlines touch or cross themselves by a pixel here and there, which does no harm. What
    counts is by how much the area as drawn (even-odd) differs from the area as traversed.
    """
    import shapely

    closed = (points[starts] == points[starts + counts - 1]).all(1)
    # A triangle cannot cross itself.
    ring = (counts - closed >= 4) & sane
    chosen = np.flatnonzero(ring)
    if not len(chosen):
        return
    keep = np.repeat(ring, counts)
    of_point = np.repeat(np.arange(len(chosen)), counts[chosen])
    shapes = shapely.polygons(shapely.linearrings(points[keep], indices=of_point))
    invalid = np.flatnonzero(~shapely.is_valid(shapes))
    suspects = chosen[invalid]
    drawn = np.array([_drawn_area(points[starts[k] : starts[k] + counts[k]]) for k in suspects])
    wrong = np.abs(drawn - areas[suspects])
    total = np.maximum(drawn, areas[suspects])
    # An outline drawn is off by up to half a pixel of the enlarged picture.
    bad = (wrong >= CROSSING_SHARE * total) & (wrong >= np.maximum(_CROSSING_PX, borders[suspects] / 2 / _ENLARGED))
    rows = owner[chosen[invalid[bad]]].tolist()
    marks.add(
        'polygon-crossing',
        rows,
        {i: f'{w:.0f} of {t:.0f} px' for i, w, t in zip(rows, wrong[bad], total[bad], strict=True)},
        dict(zip(rows, wrong[bad] / total[bad], strict=True)),
    )


def _drawn_area(points: np.ndarray) -> float:
    """The area of a polygon (P, 2) as pycocotools fills it, in an enlarged picture of its own.

    GEOS could mend the polygon and measure it, but takes hours where thousands of lines cross.
    """
    low = points.min(0)
    enlarged = _ENLARGED if (points.max(0) - low).max() < 10_000 else 1
    points = (points - low) * enlarged
    width, height = np.ceil(points.max(0)).astype(int).tolist()
    rle = mask_api.frPyObjects([points.ravel()], max(height, 1), max(width, 1))[0]
    return float(mask_api.area(rle)) / enlarged**2


def _draw(table: Table, shape: list, row: int) -> dict:
    """The RLE of an annotation's polygons that can be drawn."""
    image = table.image_rows[row]
    height, width = int(table.heights[image]), int(table.widths[image])
    parts = [np.asarray(p) for p in shape if len(p) >= 6 and len(p) % 2 == 0]
    parts = [p for p in parts if (np.abs(p) < 4 * max(height, width)).all()]
    if not parts:
        return {
            'size': [height, width],
            'counts': mask_api.encode(np.zeros((height, width), np.uint8, order='F'))['counts'],
        }
    return mask_api.merge(mask_api.frPyObjects(parts, height, width))


def _measure_rles(table: Table, shapes: list, rows: np.ndarray, masks: Masks) -> None:
    marks = table.marks
    width, height = table.sizes_of(rows)
    usable, encoded, wrong_size, wrong_counts = [], [], {}, {}
    for i, w, h in zip(rows.tolist(), width.tolist(), height.tolist(), strict=True):
        size, counts = shapes[i].get('size'), shapes[i].get('counts')
        if not (isinstance(size, list) and len(size) == 2 and all(type(v) is int and 0 < v < 1 << 31 for v in size)):
            wrong_size[i] = f'size {size!r}'
        elif w and size != [h, w]:
            wrong_size[i] = f'size {size}, the image is {[h, w]}'
        else:
            try:
                encoded.append({'size': size, 'counts': compress(counts, size)})
                usable.append(i)
            except Problem as problem:
                wrong_counts[i] = str(problem)
    if usable:
        totals, areas = run_lengths([rle['counts'] for rle in encoded])
        whole = [h * w for h, w in (rle['size'] for rle in encoded)]
        good = []
        for k, (i, total) in enumerate(zip(usable, totals.tolist(), strict=True)):
            if total < 0:
                wrong_counts[i] = 'no valid run lengths'
            elif total != whole[k]:
                wrong_counts[i] = f'the runs sum to {total}, not {whole[k]}'
            else:
                good.append(k)
        if good:
            which = np.array(usable, np.int64)[good]
            boxes = mask_api.toBbox([encoded[k] for k in good])
            masks.areas[which] = areas[good]
            masks.extents[which] = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
            masks.rectangle[which] = (areas[good] == boxes[:, 2] * boxes[:, 3]) & (
                boxes[:, 2:].min(1) >= _RECTANGLE_SIDE
            )
    marks.add('rle-size', list(wrong_size), wrong_size)
    marks.add('rle-counts', list(wrong_counts), wrong_counts)


def _compare(table: Table, shapes: list, masks: Masks) -> None:
    """Mark masks without pixels and boxes and areas that are not those of the mask."""
    marks, areas = table.marks, masks.areas
    measured = np.isfinite(areas)
    with np.errstate(invalid='ignore'):
        width, height = table.sizes_of(np.arange(len(areas)))
        x1, y1, x2, y2 = masks.extents.T
        away = (width > 0) & ((x2 <= 0) | (y2 <= 0) | (x1 >= width) | (y1 >= height))
        marks.add('mask-empty', np.flatnonzero(measured & ((areas == 0) | away)))
        marks.add(
            'mask-tiny',
            np.flatnonzero(measured & ~away & (areas > 0) & (areas < TINY_PX)),
            lambda i: f'{areas[i]:.0f} px',
        )

        box = np.concatenate([table.boxes[:, :2], table.boxes[:, :2] + table.boxes[:, 2:]], 1)
        limit = np.where(width[:, None] > 0, np.stack([width, height] * 2, 1), np.inf)
        cut = np.clip(masks.extents, 0, limit)
        off = np.minimum(np.abs(box - masks.extents).max(1), np.abs(box - cut).max(1))
        longer = np.maximum(table.boxes[:, 2], table.boxes[:, 3])
        wrong = off > np.maximum(BOX_TOLERANCE_PX, BOX_TOLERANCE_SHARE * longer)
    # Without area there is an error already.
    wrong &= (table.boxes[:, 2] > 0) & (table.boxes[:, 3] > 0) & (areas > 0)
    marks.add(
        'box-mask',
        np.flatnonzero(wrong),
        lambda i: (
            f'off by {off[i]:.1f} px: bbox '
            f'[{", ".join(f"{v:g}" for v in table.boxes[i].round(2))}], mask '
            f'[{x1[i]:g}, {y1[i]:g}, {x2[i] - x1[i]:g}, {y2[i] - y1[i]:g}]'
        ),
        off,
    )
    _compare_areas(table, shapes, masks)


def _compare_areas(table: Table, shapes: list, masks: Masks) -> None:
    marks = table.marks
    skipped = marks.marked('polygon-far', 'mask-empty')
    # COCO's own crowd regions have areas that are not those of their RLE; nothing uses them.
    with np.errstate(invalid='ignore'):
        # Pixels drawn and area enclosed differ by up to half the outline.
        free = np.maximum(AREA_TOLERANCE * masks.areas, masks.borders / 2 + 2)
        suspects = np.flatnonzero((np.abs(table.areas - masks.areas) > free) & (masks.areas > 0) & ~table.crowd)
    wrong, ratio = {}, {}
    for i in suspects.tolist():
        if i in skipped:
            continue
        pixels = masks.areas[i]
        # Parts that overlap, or leave the image, have fewer pixels than the sum of their areas.
        if type(shapes[i]) is list and table.sizes_of(np.array([i]))[0][0]:
            pixels = float(mask_api.area(_draw(table, shapes[i], i)))
        if abs(table.areas[i] - pixels) > max(AREA_TOLERANCE * pixels, masks.borders[i] / 2 + 2):
            box = table.boxes[i, 2] * table.boxes[i, 3]
            wrong[i] = f'area {table.areas[i]:g}, mask {pixels:.0f} px' + (
                ', area of the bbox' if abs(box - table.areas[i]) <= 0.01 * box else ''
            )
            ratio[i] = abs(np.log(table.areas[i] / max(pixels, 1)))
    marks.add('area-mismatch', list(wrong), wrong, ratio)


def _find_rectangles(table: Table, masks: Masks) -> None:
    with np.errstate(invalid='ignore'):
        sides = masks.extents[:, 2:] - masks.extents[:, :2]
        judged = (sides.min(1) >= _RECTANGLE_SIDE) & ~table.crowd
    rectangles = np.flatnonzero(masks.rectangle & judged)
    if len(rectangles) >= max(_RECTANGLE_LEAST, _RECTANGLE_SHARE * judged.sum()):
        share = len(rectangles) / judged.sum()
        table.marks.add('rectangle-masks', rectangles, f'{share:.0%} of the masks of {_RECTANGLE_SIDE} px or more')


def _find_duplicates(table: Table, shapes: list, masks: Masks) -> None:
    """Mark the later of two objects of a class with almost the same mask."""
    out = table.marks.marked('polygon-far', 'mask-empty')
    usable = (masks.areas > 0) & (table.image_rows >= 0) & (table.category_rows >= 0) & ~table.crowd
    usable[list(out)] = False
    if len(table.widths):
        usable &= table.widths[table.image_rows] > 0
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort((masks.areas[rows], table.category_rows[rows], table.image_rows[rows]))]
    group = table.image_rows[rows] * (len(table.categories) + 1) + table.category_rows[rows]
    areas, extents = masks.areas[rows], masks.extents[rows]
    boxes = extents[:, 2:] - extents[:, :2]
    duplicate: dict[int, str] = {}
    at = np.arange(len(rows))
    for step in range(1, _NEIGHBOURS + 1):
        at = at[at + step < len(rows)]
        # An outline measured and a mask drawn differ a little, so twice the tolerance.
        near = (group[at] == group[at + step]) & (areas[at] >= (1 - 2 * (1 - DUPLICATE_IOU)) * areas[at + step] - 2)
        at = at[near]
        if not len(at):
            break
        one, two = extents[at], extents[at + step]
        shift = np.abs(one - two).max(1)
        # Masks of that IoU may differ by a thin spike, so boxes are judged by a larger measure.
        alike = shift <= np.maximum(2, 0.25 * np.maximum(boxes[at], boxes[at + step]).max(1))
        for k in at[alike].tolist():
            first, second = sorted((int(rows[k]), int(rows[k + step])))
            if second in duplicate:
                continue
            # Most duplicates are copies, which need not be drawn.
            iou = (
                1.0
                if shapes[first] == shapes[second]
                else float(mask_api.iou([_rle(table, shapes, second)], [_rle(table, shapes, first)], [0])[0, 0])
            )
            if iou > DUPLICATE_IOU:
                other = table.annotations[first].get('id')
                duplicate[second] = f'IoU {iou:.3f} with #{other}'
    table.marks.add('object-duplicate', list(duplicate), duplicate)


def _rle(table: Table, shapes: list, row: int) -> dict:
    shape = shapes[row]
    if isinstance(shape, list):
        return _draw(table, shape, row)
    if isinstance(shape['counts'], list):
        return mask_api.frPyObjects(shape, *shape['size'])
    return {'size': shape['size'], 'counts': shape['counts'].encode()}
