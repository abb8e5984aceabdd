"""Run-length codes that may be damaged, read without trusting them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools import mask as mask_api


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask as compressed COCO RLE.

    Args:
        mask: Boolean or 0/1 array (height, width).

    Returns:
        `{'size': [height, width], 'counts': str}`.
    """
    rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {'size': [int(side) for side in rle['size']], 'counts': rle['counts'].decode()}


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
        rle = mask_api.frPyObjects({'size': [height, width], 'counts': counts}, height, width)
        rles.append({'size': [height, width], 'counts': rle['counts'].decode()})
    return rles


def polygon_problem(points: Any, width: int, height: int) -> str | None:
    """What is wrong with a polygon that cannot be meant so; None if nothing.

    One of fewer than three points, or outside the image by less than the image's longer side, is
    not wrong: it covers few pixels or none, and is clipped.

    Args:
        points: A flat list x, y, x, y, ... in pixels.
        width: Of the image.
        height: Of the image.
    """
    if not isinstance(points, (list, tuple)):
        return f'a polygon is {type(points).__name__}, not a list of numbers'
    for value in points:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f'a polygon holds {_short(value)}, not a number'
    if len(points) % 2:
        return f'a polygon has an odd number of coordinates ({len(points)})'
    # Rasterising costs the length of the outline, without limit.
    reach = max(width, height)
    far = next((value for value in points if not -reach <= value <= 2 * reach), None)
    if far is None:
        return None
    if far in (math.inf, -math.inf) or far != far:
        return 'a polygon holds NaN or infinity'
    return f'a polygon reaches {_short(far)}, far outside the {width}x{height} image'


def rle_problem(rle: Any, width: int, height: int) -> str | None:
    """What is wrong with a COCO RLE, compressed or not; None if nothing.

    pycocotools does not check these, and a bad one makes it write past its memory.

    Args:
        rle: `{'size': [height, width], 'counts': str or list of ints}`.
        width: Of the image.
        height: Of the image.
    """
    if not isinstance(rle, dict) or not {'size', 'counts'} <= rle.keys():
        return "an RLE without 'size' and 'counts'"
    if rle['size'] != [height, width]:
        return f'an RLE of size {_short(rle["size"])} (height, width), not [{height}, {width}]'
    counts = rle['counts']
    if isinstance(counts, str):
        try:
            runs = rle_runs(counts)
        except ValueError as error:
            return f'an RLE whose counts are {error}'
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        if any(not 0 <= run <= width * height for run in counts):
            return 'an RLE with a run that is negative or longer than the image'
        runs = np.array(counts, dtype=np.int64)
    else:
        return "an RLE whose 'counts' are neither a string nor a list of integers"
    if runs.size and runs.min() < 0:
        return 'an RLE with a negative run'
    if runs.sum() != width * height:
        return f'an RLE of {runs.sum()} pixels for {width * height} of the image'
    return None


def rle_runs(counts: str) -> np.ndarray:
    """The run lengths (int64) in a compressed RLE string.

    Each number is written in groups of 5 bits, low ones first, and from the fourth on as the
    difference from the one two before (`rleFrString` of pycocotools' maskApi.c).

    Raises:
        ValueError: It is no such string.
    """
    try:
        codes = np.frombuffer(counts.encode('ascii'), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError('not ASCII') from None
    if not codes.size:
        return codes
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError('no compressed RLE')
    is_last = (codes & 0x20) == 0
    if not is_last[-1]:
        raise ValueError('cut off')
    ends = np.flatnonzero(is_last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits, more than the 32 of a run
        raise ValueError('no compressed RLE')
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 0x1F) << shifts, starts)
    negative = (codes[ends] & 0x10) != 0
    runs[negative] -= np.int64(1) << (5 * lengths[negative])
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + '...'


def as_bytes(counts: object, size: list[int]) -> tuple[str, bytes]:
    """Compressed counts, or what is wrong with them."""
    if isinstance(counts, str):
        try:
            content = counts.encode('ascii')
        except UnicodeEncodeError:
            return 'counts are no RLE string', b''
        return ('', content) if content else ('counts are empty', b'')
    if not isinstance(counts, list):
        return f'counts are {type(counts).__name__}', b''
    if not counts or any(type(v) is not int or v < 0 for v in counts):
        return 'counts are not all integers of 0 or more', b''
    if sum(counts) != size[0] * size[1]:
        return f'the runs sum to {sum(counts)}, not {size[0] * size[1]}', b''
    return '', mask_api.frPyObjects({'size': size, 'counts': counts}, *size)['counts']


def run_lengths(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Decode compressed RLE strings without the C code, which trusts them.

    The code is that of `rleFrString` in pycocotools' maskApi.c: 5 bits a character, bit 5 for
    "more follow", bit 4 of the last for the sign; from the fourth run on the difference to the
    run before the last.

    Args:
        strings: None of them empty.

    Returns:
        (N,) int64 sums of all runs, -1 where a string is no valid code; (N,) sums of the runs
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
    last = last.copy()
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
    bad[of_run[(runs < 0) | (runs > 1 << 40)]] = True
    runs = np.clip(runs, 0, 1 << 40)
    totals = np.add.reduceat(runs, first)
    return np.where(bad, -1, totals), np.add.reduceat(np.where(index % 2, runs, 0), first)
