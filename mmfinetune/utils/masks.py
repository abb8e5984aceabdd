"""Segmentations: masks to run-length codes (RLE), and the checks that pycocotools leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from mmfinetune.utils.errors import Problem

_LONGEST_RUN = (1 << 32) - 1  # pycocotools keeps a run in 32 bits


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """A boolean or 0/1 mask (height, width) as COCO RLE `{'size': [height, width], 'counts': str}`."""
    return as_json(mask_api.encode(np.asfortranarray(mask, dtype=np.uint8)))


def masks_to_rles(indices: np.ndarray, values: Iterable[int]) -> list[dict[str, Any]]:
    """The pixels of each value in an index image as compressed COCO RLE.

    Args:
        indices: Integer array (height, width).
        values: Values to encode; one that does not occur gives an empty mask.
    """
    height, width = indices.shape
    # All runs of the image at once, since comparing it with each value costs the whole image.
    columns = indices.ravel(order='F')
    starts = np.concatenate(([0], np.flatnonzero(columns[1:] != columns[:-1]) + 1))
    ends = np.append(starts[1:], columns.size)
    held = columns[starts]
    order = np.argsort(held, kind='stable')
    held = held[order]
    rles = []
    for value in values:
        own = order[np.searchsorted(held, value) : np.searchsorted(held, value, side='right')]
        # Background and object in turns, from the first pixel to the last.
        edges = np.stack((starts[own], ends[own]), axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=columns.size).tolist()
        if not counts[-1] and len(counts) > 1:
            counts.pop()
        rles.append(to_rle({'size': [height, width], 'counts': counts}, height, width))
    return rles


def to_rle(shape: list | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The compressed RLE of a segmentation that is known to be valid, see `check_rle` and `check_polygon`.

    Args:
        shape: Polygons of three points or more, or an RLE with counts of either kind.
        height, width: Size of the image in pixels.
    """
    if isinstance(shape, list):
        return as_json(mask_api.merge(mask_api.frPyObjects(shape, height, width)))
    if isinstance(shape['counts'], list):
        return as_json(mask_api.frPyObjects(shape, height, width))
    return {'size': [height, width], 'counts': shape['counts']}


def as_json(rle: dict[str, Any]) -> dict[str, Any]:
    """An RLE of pycocotools with its counts, bytes there, as a string."""
    return {'size': [int(side) for side in rle['size']], 'counts': rle['counts'].decode()}


def check_polygon(points: Any, height: int, width: int) -> None:
    """Refuse a polygon that cannot be meant that way.

    One of fewer than three points, or outside the image by less than the image's longer side, is
    fine: it covers few pixels or none, and is clipped.

    Args:
        points: A flat list x, y, x, y, ... in pixels.
        height, width: Size of the image in pixels.

    Raises:
        Problem: What is wrong.
    """
    if not isinstance(points, (list, tuple)):
        raise Problem('shape-polygon-type', type=type(points).__name__)
    for value in points:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Problem('shape-polygon-number', value=_short(value))
    if len(points) % 2:
        raise Problem('shape-polygon-odd', count=len(points))
    # Rasterising costs the length of the outline, without limit.
    reach = max(width, height)
    far = next((value for value in points if not -reach <= value <= 2 * reach), None)
    if far is None:
        return
    if far in (math.inf, -math.inf) or far != far:
        raise Problem('shape-polygon-nan')
    raise Problem('shape-polygon-far', value=_short(far), width=width, height=height)


def check_rle(rle: Any, height: int, width: int) -> dict[str, Any]:
    """A COCO RLE, compressed, if it is valid.

    pycocotools does not check these, and a bad one makes it write past its memory.

    Args:
        rle: `{'size': [height, width], 'counts': str or list of ints}`.
        height, width: Size of the image in pixels.

    Raises:
        Problem: What is wrong.
    """
    if not isinstance(rle, dict) or not {'size', 'counts'} <= rle.keys():
        raise Problem('shape-rle-keys')
    if rle['size'] != [height, width]:
        raise Problem('shape-rle-size', size=_short(rle['size']), height=height, width=width)
    counts = compress(rle['counts'], [height, width])
    pixels = int(run_lengths([counts])[0][0])
    if pixels < 0:
        raise Problem('shape-rle-damaged')
    _check_pixels(pixels, height, width)
    return {'size': [height, width], 'counts': counts.decode()}


def compress(counts: Any, size: list[int]) -> bytes:
    """The compressed counts of an RLE; a string is not decoded, so `run_lengths` has the last word.

    Args:
        counts: A string or a list of run lengths.
        size: Height and width.

    Raises:
        Problem: What is wrong.
    """
    if isinstance(counts, str) and counts:
        if not counts.isascii():
            raise Problem('shape-rle-ascii')
        return counts.encode()
    if counts == '' or counts == []:
        raise Problem('shape-rle-empty')
    if not isinstance(counts, list) or not all(type(run) is int for run in counts):
        raise Problem('shape-rle-type')
    if not all(0 <= run <= _LONGEST_RUN for run in counts):
        raise Problem('shape-rle-run')
    _check_pixels(sum(counts), *size)
    return mask_api.frPyObjects({'size': size, 'counts': counts}, *size)['counts']


def _check_pixels(pixels: int, height: int, width: int) -> None:
    if pixels != height * width:
        raise Problem('shape-rle-pixels', pixels=pixels, wanted=height * width)


def run_lengths(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Decode compressed RLE strings without the C code, which trusts them.

    The code is that of `rleFrString` in pycocotools' maskApi.c: 5 bits a character, bit 5 for
    "more follow", bit 4 of the last for the sign; from the fourth run on the difference to the
    run before the last.

    Args:
        strings: None of them empty.

    Returns:
        (N,) int64 sums of all runs, -1 where a string is not a valid code; (N,) sums of the runs
        that are object.
    """
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    code = np.frombuffer(b''.join(strings), np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(strings)), lengths)
    bad = np.zeros(len(strings), bool)
    bad[owner[(code < 0) | (code > 63)]] = True
    last = (code & 32) == 0
    string_ends = np.cumsum(lengths) - 1
    bad[~last[string_ends]] = True
    last[string_ends] = True
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    bad[owner[ends[digits > 8]]] = True
    place = np.minimum(np.arange(len(code)) - np.repeat(starts, digits), 8)
    values = np.add.reduceat((code & 31) << (5 * place), starts)
    negative = (code[ends] & 16) != 0
    values -= np.where(negative, 1 << (5 * np.minimum(digits, 8)), 0)

    of_run = owner[ends]
    first = np.searchsorted(of_run, np.arange(len(strings)))
    index = np.arange(len(of_run)) - first[of_run]
    # Three chains of differences in each string: run 0, the other even runs, the odd runs.
    chain = np.where(index == 0, 0, 1 + index % 2)
    order = np.lexsort((index, chain, of_run))
    key = (of_run * 3 + chain)[order]
    sums = np.cumsum(values[order])
    heads = np.flatnonzero(np.diff(key, prepend=-1))
    before = np.concatenate([[0], sums[heads[1:] - 1]])
    runs = np.empty_like(sums)
    runs[order] = sums - np.repeat(before, np.diff(heads, append=len(key)))
    bad[of_run[(runs < 0) | (runs > _LONGEST_RUN)]] = True
    runs = np.clip(runs, 0, _LONGEST_RUN)
    totals = np.add.reduceat(runs, first)
    return np.where(bad, -1, totals), np.add.reduceat(np.where(index % 2, runs, 0), first)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + '...'
