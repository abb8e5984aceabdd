"""Deterministic changes of bytes, texts and trees of plain values."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

Rng = random.Random


def _nested(levels: int, kind: type = list) -> Any:
    value: Any = kind()
    for _ in range(levels):
        value = [value] if kind is list else {'a': value}
    return value


def _laughs(levels: int) -> list:
    """Ten billion parts from a hundred; a tree that only a pickle can hold."""
    value: list = []
    for _ in range(levels):
        value = [value] * 10
    return value


SHARED = _laughs(10)
# Values that no file of the kind has, or that stand at the edge of what one may have.
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 91, 255, 256, 1.5, 1e-9, -0.0, 1e308, math.nan, math.inf, -math.inf, 1 << 31, 1 << 53,
    1 << 63, 1 << 64, -(1 << 63), 10**400, '', ' ', 'a', '1', '1.0', '-1', '0' * 400, 'nan', '1e999', 'cat', 'ä' * 300, '\ud800', '\0', '\n',
    '\x1b[31m', '../../secret.png', '/etc/passwd', '..', '.', '/', '~', 'C:\\x\\a.jpg', 'a' * 5000, '/'.join('a' * 900), 'http://[::1', '{0}', '%s', '{{',
    '__class__', 'type', '_delete_', [], {}, [[]], [None], [0], [1, 2, 3, 4], {'a': 1}, {'type': 'Nothing'}, {'': {}}, [[[]]],
    _nested(90), _nested(900), _nested(900, dict), [0] * 20_000, list(range(7)), 'x' * 100_000,
)  # fmt: skip
TEXTS = (
    '', '\0', '\ufeff', '\ud800'.encode('utf-8', 'surrogatepass').decode('utf-8', 'replace'), '"', "'", '{', '}', '[', ']', '(', ')', ':', ',', '&a ', '*a ',
    '<<: *a', '!!int ', '!!python/object:os.system ', '- ' * 60, '[' * 60, '{' * 60, '\n', '\r\n', '\t', ' ' * 40, '#', '%', '|', '>', '~', 'nan', '.inf',
    '0x' + 'f' * 5000, '9' * 5000, '1e999', '-', '--', '<', '<!DOCTYPE a [<!ENTITY b "c">]>', '&b;', '&#0;', '</annotation>', '<object>' * 99, '\\ud800', '\\u0000', 'null', 'true',
)  # fmt: skip


def tree(rng: Rng, value: Any, odd: Callable[[Rng], Any] | None = None) -> Any:
    """A copy with one to three changes at random places."""
    value = copied(value)
    odd = odd or (lambda rng: copied(rng.choice(ODD)))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _change(rng, value, odd)
    return value


def _change(rng: Rng, top: Any, odd: Callable[[Rng], Any]) -> Any:
    holders = [node for node in _nodes(top) if isinstance(node, (dict, list)) and node]
    if not holders or rng.random() < 0.01:
        return odd(rng)
    holder = rng.choice(holders[: 1 + rng.randrange(len(holders))])
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    key: Any = rng.choice(keys)
    what = rng.randrange(8)
    if what < 4:
        holder[key] = odd(rng)
    elif what == 4:
        del holder[key]
    elif what == 5:
        holder[key] = copied(rng.choice(_nodes(top)))
    elif what == 6 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copied(rng.choice(holder)))
    elif what == 6:
        other = odd(rng)
        holder[other if isinstance(other, str) else f'{key}x'] = holder.pop(key)
    else:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {'a': holder[key]}
    return top


def copied(value: Any, levels: int = 12) -> Any:
    """The value with dicts and lists of its own, but for the deepest."""
    if isinstance(value, dict) and levels:
        return {key: copied(part, levels - 1) for key, part in value.items()}
    if isinstance(value, list) and levels and value is not SHARED:
        return [copied(part, levels - 1) for part in value]
    return value


def _nodes(top: Any) -> list[Any]:
    """The first three thousand parts that `copied` has copied, the upper ones first."""
    nodes, level = [top], [top]
    for _ in range(11):
        parts = [
            node.values() if isinstance(node, dict) else node
            for node in level
            if isinstance(node, (dict, list)) and node is not SHARED
        ]
        level = [part for some in parts for part in some][:3000]
        nodes += level
    return nodes[:3000]


def data(rng: Rng, content: bytes) -> bytes:
    """Bytes with one to five changes: bits, runs, numbers, cuts, copies."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        place = rng.randrange(len(changed) + 1)
        end = min(len(changed), place + rng.choice((1, 1, 2, 4, 8, 100)))
        what = rng.randrange(7)
        if what == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[place:end] = rng.randbytes(end - place)
        elif what == 2:
            changed[place:end] = b''
        elif what == 3:
            changed[place:place] = rng.randbytes(rng.choice((1, 4, 9)))
        elif what == 4:
            changed[place : place + 4] = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)).to_bytes(4, 'little')
        elif what == 5:
            changed[place:place] = changed[rng.randrange(len(changed) + 1) :][: rng.randrange(200)]
        elif rng.random() < 0.2:
            del changed[place:]
    return bytes(changed)


def text(rng: Rng, content: str) -> str:
    """Text with one to four changes by words of its format."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(content) + 1)
        end = min(len(content), place + rng.choice((0, 0, 1, 3, 20)))
        content = content[:place] + rng.choice(TEXTS) + content[end:]
    return content
