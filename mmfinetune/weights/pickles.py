"""How much the instructions of a pickle make, counted before any of them is carried out."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmfinetune.utils.errors import UserError

# What refers to one part many times grows beyond its file, and twice with each level. Files of weights hardly do.
_GROWTH, _ALWAYS = 16, 1 << 26
_GETS = frozenset({'GET', 'BINGET', 'LONG_BINGET'})
_PUTS = frozenset({'PUT', 'BINPUT', 'LONG_BINPUT'})
_FILLS = frozenset({'APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD'})
# A file by torch before 1.6 begins with this number, the first of five pickles one after the other.
TORCH_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
_OLD_PARTS = 5


def room(path: Path) -> int:
    """The most bytes that the content of a weights file may take."""
    return _ALWAYS + _GROWTH * path.stat().st_size


def require_bounded(path: Path) -> None:
    """Refuse a weights file whose shared or packed parts unfold to far more than its size.

    Hashing a tuple of tuples that are the same takes time that doubles with each level, and no signal ends it.

    Raises:
        UserError: It would take more than `room`.
        pickle.UnpicklingError, zipfile.BadZipFile: It is damaged.
    """
    limit = room(path)
    with path.open('rb') as file:
        start = file.read(len(TORCH_MAGIC))
        file.seek(0)
        if not start.startswith(b'PK\x03\x04'):
            asked = 0
            for _ in range(_OLD_PARTS if start == TORCH_MAGIC else 1):
                asked += _cost(file, limit) if asked <= limit else 0
        else:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                asked = sum(member.file_size for member in members)
                if not any(member.CRC for member in members):
                    for member in members:
                        member.CRC = None  # type: ignore[assignment]  # so that zipfile does not compare it
                for member in members if asked <= limit else ():
                    if member.filename.endswith('.pkl'):
                        with archive.open(member) as pickled:
                            asked += _cost(pickled, limit)
    require_room(asked, path)


def require_room(asked: int, path: Path) -> None:
    """Raise a UserError if the content of a file asks for more bytes than `room`."""
    if asked > room(path):
        raise UserError('weights-memory', path=path, asked=asked / 1e9, size=path.stat().st_size / 1e9)


def _cost(file: IO[bytes], limit: int) -> int:
    """Bytes and objects that a pickle makes, each object as often as it is referred to; counting ends beyond the limit.

    Raises:
        pickle.UnpicklingError: It is damaged.
    """
    # An object is its cost in a list, since lists and dicts get their contents after others may refer to them.
    stack: list[list[int] | None] = []
    memo: dict[Any, list[int]] = {}
    spent = 0
    try:
        for opcode, arg, _ in pickletools.genops(file):
            if opcode.name in _GETS:
                stack.append(memo[arg])
            elif opcode.name in _PUTS or opcode.name == 'MEMOIZE':
                memo[len(memo) if arg is None else arg] = _top(stack)
            elif opcode.name == 'MARK':
                stack.append(None)
            elif opcode.name == 'POP':
                stack.pop()  # a mark too
            else:
                own = 1 + len(arg) if isinstance(arg, (str, bytes, bytearray)) else 1
                taken = list(_taken(stack, opcode))
                added = own + sum(part[0] for part in taken)
                if opcode.name in _FILLS:
                    added -= taken[-1][0]  # the object itself
                    taken[-1][0] += added
                    stack.append(taken[-1])
                else:
                    stack += [[added] for _ in opcode.stack_after]
                spent += added
                if spent > limit:
                    break
    except (ValueError, IndexError, KeyError) as error:
        raise pickle.UnpicklingError(f'damaged: {error}') from None
    return spent


def _top(stack: list[list[int] | None]) -> list[int]:
    if stack[-1] is None:
        raise IndexError('a mark')
    return stack[-1]


def _taken(stack: list[list[int] | None], opcode: pickletools.OpcodeInfo) -> Iterator[list[int]]:
    """Take what an instruction takes from the stack, the last first."""
    count = len(opcode.stack_before)
    if pickletools.stackslice in opcode.stack_before:
        while (part := stack.pop()) is not None:
            yield part
        count -= 2  # the mark and what follows it
    for _ in range(count):
        yield _top(stack)
        stack.pop()
