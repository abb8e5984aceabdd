"""Run-length codes that may be damaged, read without trusting them."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_api


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
