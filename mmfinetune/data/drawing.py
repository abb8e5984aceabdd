"""Instances drawn onto images, and pictures put together. RGB uint8 arrays in and out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from mmfinetune.utils import fonts

Colour = tuple[int, int, int]

# Smaller pictures are enlarged to this long side, since text on them would cover the objects.
_SMALLEST = 480
_INK: Colour = (32, 32, 32)
# What linear RGB becomes without one kind of cones; Machado, Oliveira and Fernandes, IEEE TVCG 15, 2009.
_COLOUR_BLIND = {
    'deuteranopia': np.array(
        [(0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)]
    ),
    'protanopia': np.array(
        [(0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)]
    ),
}


def palette(count: int) -> list[Colour]:
    """Colours that are told apart easily, also by colour-blind readers; the first ones do not depend on `count`.

    Each is the one farthest in CIELAB from all before it, as Glasbey et al. choose them (Colour displays for categorical
    images, Color Research & Application 32, 2007), by the nearest of three views: with normal vision, deuteranopia and
    protanopia. The first 8 are at least 29 apart with either, the first 20 at least 13.
    """
    order = _colour_order()
    return [order[i % len(order)] for i in range(count)]


@functools.cache
def _colour_order() -> list[Colour]:
    steps = np.linspace(0, 1, 12, dtype=np.float32)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing='ij'), -1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(grid, cv2.COLOR_RGB2LAB)[:, 0]
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    # Not pale or dark, to show on photographs and carry black or white text; nor glaring.
    usable = (lab[:, 0] > 38) & (lab[:, 0] < 88) & (chroma > 35) & (chroma < 95)
    rgb = (grid[usable, 0] * 255).round().astype(int)
    # Normal vision counts less: alone it would leave next to nothing for the others.
    views = np.stack([0.6 * lab[usable], *(_seen_with(weakness, grid[usable]) for weakness in _COLOUR_BLIND.values())])
    chosen = int(np.argmin(np.abs(rgb - (0, 116, 232)).sum(1)))
    order, nearest = [], np.full(len(rgb), np.inf)
    for _ in range(len(rgb)):
        order.append(_colour(rgb[chosen]))
        nearest = np.minimum(nearest, np.linalg.norm(views - views[:, chosen, None], axis=2).min(0))
        nearest[chosen] = -1
        chosen = int(np.argmax(nearest))
    return order


def _seen_with(weakness: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """CIELAB (N, 3) of what colours, (N, 1, 3) RGB from 0 to 1, look like with a colour vision deficiency."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = (linear @ weakness.T).clip(0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    return cv2.cvtColor(encoded.astype(np.float32), cv2.COLOR_RGB2LAB)[:, 0]


def draw_instances(
    image: np.ndarray,
    *,
    boxes: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    labels: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    names: Sequence[str] = (),
    alpha: float = 0.45,
) -> np.ndarray:
    """Draw masks, boxes and a chip ``class 0.93`` for each instance.

    Args:
        image: (H, W, 3) RGB uint8; stays as it is.
        boxes: (N, 4) left, top, right, bottom in pixels of the image.
        masks: (N, H, W) bool.
        labels: N class numbers, which choose the colours; by default each instance has its own.
        scores: N numbers for the chips.
        names: Class names; a class without one is written as its number.
        alpha: Opacity of the masks.

    Returns:
        (H', W', 3); larger than the image where its long side is under 480 px.
    """
    canvas, scale = _enlarged(image)
    boxes = None if boxes is None else np.asarray(boxes, float).reshape(-1, 4) * scale
    count = next((len(v) for v in (boxes, masks, labels, scores) if v is not None), 0)
    if not count:
        return canvas
    colours = palette(max(int(max(labels)) + 1, 1) if labels is not None else count)
    chosen = [colours[int(k)] for k in (labels if labels is not None else range(count))]
    size = _font_size(canvas)
    places = np.zeros((count, 4)) if boxes is None else boxes.copy()
    contours: list = [()] * count
    if masks is not None:
        extents = [_extent(mask) for mask in masks]
        # The largest first, so that what lies within it stays in sight.
        for i in np.argsort(-_areas(extents), kind='stable'):
            contours[i] = _fill(canvas, masks[i], extents[i], scale, chosen[i], alpha)
            if boxes is None:
                places[i] = np.multiply(extents[i], scale)
    for i in np.argsort(-_areas(places), kind='stable'):
        cv2.drawContours(canvas, contours[i], -1, chosen[i], max(2, round(size / 9)), cv2.LINE_AA)
        if boxes is not None:
            _rectangle(canvas, boxes[i], chosen[i], max(1, round(size / 14)))
    texts = _texts(labels, scores, names)
    if not any(texts):
        return canvas
    order = range(count) if scores is None else np.argsort(-np.asarray(scores), kind='stable')
    return _with_chips(canvas, [(texts[i], places[i], chosen[i]) for i in order], size)


def draw_proposals(image: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Draw boxes coloured by their scores, the best on top; see `with_colour_bar` for the scale.

    Args:
        image: (H, W, 3) RGB uint8.
        boxes: (N, 4) left, top, right, bottom in pixels.
        scores: N numbers from 0 to 1.
    """
    canvas, scale = _enlarged(image)
    # Grey and fainter than the boxes, whose colours are what the picture is about.
    grey = cv2.cvtColor(canvas, cv2.COLOR_RGB2GRAY)
    canvas = cv2.cvtColor((grey * 0.6).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    width = max(1, round(_font_size(canvas) / 12))
    boxes, scores = np.asarray(boxes, float).reshape(-1, 4) * scale, np.asarray(scores, float)
    for i in np.argsort(scores, kind='stable'):
        _rectangle(canvas, boxes[i], _heat(scores[i]), width)
    return canvas


def with_colour_bar(picture: np.ndarray, label: str) -> np.ndarray:
    """Put the colour scale of `draw_proposals`, from 0 to 1, below a picture."""
    width = picture.shape[1]
    size = _font_size(picture)
    strip = np.full((round(2.2 * size), width, 3), 255, np.uint8)
    bar = min(width // 3, 16 * size)
    parts = [f'{label}  0', '1']
    font = fonts.font_for(size, ''.join(parts))
    lead = round(font.getlength(parts[0])) + size
    if bar > 0 and lead + bar + 2 * size <= width:
        colours = np.array([_heat(v) for v in np.linspace(0, 1, bar)], np.uint8)
        strip[size // 2 : -size // 2, lead : lead + bar] = colours
        starts = (size // 2, lead + bar + size // 2)
        strip = _write(
            strip, [(part, (x, strip.shape[0] // 2), 'lm') for part, x in zip(parts, starts, strict=True)], font
        )
    return np.concatenate([picture, strip])


def side_by_side(*panels: np.ndarray, titles: Sequence[str] = ()) -> np.ndarray:
    """Panels in a row, brought to one height, with a white gap and titles above.

    Args:
        *panels: (H, W, 3) RGB uint8.
        titles: One for each panel, or none at all.
    """
    if titles and len(titles) != len(panels):
        raise ValueError(f'{len(panels)} panels, but {len(titles)} titles')
    height = max(p.shape[0] for p in panels)
    panels = tuple(_resized(p, max(1, round(p.shape[1] * height / p.shape[0])), height) for p in panels)
    size = _font_size(panels[0])
    if titles:
        panels = tuple(_titled(panel, title, size) for panel, title in zip(panels, titles, strict=True))
    return np.concatenate([*(_padded(panel, right=size) for panel in panels[:-1]), panels[-1]], 1)


def contact_sheet(
    pictures: Sequence[np.ndarray], columns: int = 4, width: int = 320, titles: Sequence[str] = ()
) -> np.ndarray:
    """Pictures in a grid.

    Args:
        pictures: (H, W, 3) RGB uint8, of any sizes; at least one.
        columns: Pictures in a row.
        width: Width of a picture; one that would be higher than 1.5 times this is made smaller.
        titles: One above each picture, or none at all.
    """
    if titles and len(titles) != len(pictures):
        raise ValueError(f'{len(pictures)} pictures, but {len(titles)} titles')
    columns, gap, size = min(columns, len(pictures)), max(4, width // 32), max(11, width // 26)
    rows = []
    for start in range(0, len(pictures), columns):
        cells = []
        for i in range(start, min(start + columns, len(pictures))):
            factor = min(width / pictures[i].shape[1], 1.5 * width / pictures[i].shape[0])
            small = _resized(pictures[i], *(max(1, round(n * factor)) for n in pictures[i].shape[1::-1]))
            left = (width - small.shape[1]) // 2
            small = _padded(small, left=left, right=width - small.shape[1] - left)
            cells.append(_titled(small, titles[i], size) if titles else small)
        height = max(c.shape[0] for c in cells)
        cells = [_padded(c, right=gap, bottom=height - c.shape[0] + gap) for c in cells]
        row = np.concatenate(cells, 1)
        rows.append(_padded(row, left=gap, right=columns * (width + gap) - row.shape[1]))
    return _padded(np.concatenate(rows), top=gap)


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, float]:
    """A copy to draw on and how much larger it is."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f'not an RGB uint8 image: {image.shape} {image.dtype}')
    height, width = image.shape[:2]
    scale = max(1.0, _SMALLEST / max(height, width))
    return np.array(_resized(image, max(1, round(width * scale)), max(1, round(height * scale))), order='C'), scale


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    how = cv2.INTER_AREA if width * height < image.shape[0] * image.shape[1] else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=how)


def _padded(image: np.ndarray, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> np.ndarray:
    return np.pad(image, ((top, bottom), (left, right), (0, 0)), constant_values=255)


def _font_size(image: np.ndarray) -> int:
    """Pixels; a share of the picture, which is looked at as a whole."""
    return max(12, round(0.018 * float(np.sqrt(image.shape[0] * image.shape[1]))))


def _areas(boxes: Sequence[tuple] | np.ndarray) -> np.ndarray:
    left, top, right, bottom = np.asarray(boxes, float).T
    return (right - left).clip(0) * (bottom - top).clip(0)


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is set, the latter two exclusive; zeros if nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _fill(
    canvas: np.ndarray, mask: np.ndarray, extent: tuple[int, int, int, int], scale: float, colour: Colour, alpha: float
) -> Sequence:
    """Tint the pixels of a mask; its contours on the canvas."""
    left, top, right, bottom = extent
    if right <= left:
        return ()
    if scale == 1:
        inside = mask[top:bottom, left:right]
    else:
        # With a margin, so that the edge is interpolated against what lies around the mask.
        left, top = max(0, left - 1), max(0, top - 1)
        part = mask[top : bottom + 1, left : right + 1]
        right, bottom = round((left + part.shape[1]) * scale), round((top + part.shape[0]) * scale)
        left, top = round(left * scale), round(top * scale)
        size = max(1, min(right, canvas.shape[1]) - left), max(1, min(bottom, canvas.shape[0]) - top)
        inside = cv2.resize(part.astype(np.uint8) * 255, size) > 127
    region = canvas[top : top + inside.shape[0], left : left + inside.shape[1]]
    region[inside] = (region[inside] * (1 - alpha) + np.multiply(colour, alpha)).round()
    return cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top))[0]


def _rectangle(canvas: np.ndarray, box: np.ndarray, colour: Colour, width: int) -> None:
    height, length = canvas.shape[:2]
    # Within the picture, or the lines of a box that touches its edge would not be seen.
    inset = width // 2
    x0, x1 = np.clip(np.round(box[[0, 2]]), inset, max(inset, length - 1 - inset)).astype(int)
    y0, y1 = np.clip(np.round(box[[1, 3]]), inset, max(inset, height - 1 - inset)).astype(int)
    cv2.rectangle(canvas, (int(x0), int(y0)), (int(x1), int(y1)), colour, width)


def _heat(value: float) -> Colour:
    """The colour of a number from 0 to 1: violet, red, yellow."""
    return _heat_colours()[round(170 * min(1.0, max(0.0, value)))]


@functools.cache
def _heat_colours() -> list[Colour]:
    # The lowest third of the map is too dark to be seen on a photograph.
    levels = np.arange(85, 256, dtype=np.uint8)[:, None]
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_PLASMA)[:, 0, ::-1]
    return [_colour(colour) for colour in colours]


def _colour(values: Sequence[int] | np.ndarray) -> Colour:
    red, green, blue = values
    return int(red), int(green), int(blue)


def _texts(labels: Sequence[int] | None, scores: Sequence[float] | None, names: Sequence[str]) -> list[str]:
    columns = []
    if labels is not None:
        columns.append([names[k] if 0 <= k < len(names) else str(k) for k in map(int, labels)])
    if scores is not None:
        columns.append([f'{score:.2f}' for score in scores])
    return [' '.join(parts) for parts in zip(*columns, strict=True)]


def _with_chips(canvas: np.ndarray, items: list[tuple[str, np.ndarray, Colour]], size: int) -> np.ndarray:
    """Write texts on coloured ground next to boxes, the first where it is best seen."""
    height, width = canvas.shape[:2]
    pad = max(2, size // 4)
    chips = []
    taken: np.ndarray = np.zeros((0, 4))
    for text, box, colour in items:
        text, font = fonts.fitted(text, size, width - 2 * pad)
        if not text:
            continue
        wide, high = round(font.getlength(text)) + 2 * pad, sum(font.getmetrics()) + 2
        place = _free_place(box, (wide, high), (width, height), taken)
        taken = np.concatenate([taken, [place]])
        chips.append((text, font, place, colour))
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for text, font, (x0, y0, x1, y1), colour in reversed(chips):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
        draw.text((x0 + pad, y0 + 1), text, font=font, fill=_ink_on(colour), anchor='la')
    return np.array(picture)


def _free_place(
    box: np.ndarray, size: tuple[int, int], limits: tuple[int, int], taken: np.ndarray
) -> tuple[int, int, int, int]:
    """Where a chip hides the least: at a corner of its box, outside rather than inside."""
    (wide, high), (x0, y0, x1, y1) = size, box
    spots = [(x, y) for y in (y0 - high, y1, y0, y1 - high) for x in (x0, x1 - wide)]
    spots += [(x, y0 + step * high) for step in (1, -2, 2, -3, 3) for x in (x0, x1 - wide)]
    corners = np.clip(np.round(spots), 0, np.maximum(np.subtract(limits, size), 0)).astype(int)
    places = np.concatenate([corners, corners + size], 1)
    others = np.concatenate([taken, [box]])
    low = np.maximum(places[:, None, :2], others[None, :, :2])
    *hidden, own = (np.minimum(places[:, None, 2:], others[None, :, 2:]) - low).clip(0).prod(2).T
    # A corner of a large object may be hidden, but not much of a small one.
    cost = sum(hidden) + np.where(own > _areas(box) / 4, own, 0)
    left, top, right, bottom = places[int(np.argmin(cost))].tolist()
    return left, top, right, bottom


def _ink_on(colour: Colour) -> Colour:
    """White where its contrast (WCAG 2.2) will do, since black on a strong colour looks dull."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (255, 255, 255) if 1.05 / (luminance + 0.05) > 3.2 else (0, 0, 0)


def _titled(panel: np.ndarray, title: str, size: int) -> np.ndarray:
    head = np.full((2 * size, panel.shape[1], 3), 255, np.uint8)
    text, font = fonts.fitted(title, size, panel.shape[1])
    return np.concatenate([_write(head, [(text, (panel.shape[1] // 2, size), 'mm')], font), panel])


def _write(image: np.ndarray, texts: Sequence[tuple[str, tuple[int, int], str]], font: Any) -> np.ndarray:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for text, place, anchor in texts:
        draw.text(place, text, font=font, fill=_INK, anchor=anchor)
    return np.array(picture)
