"""JSON files too large for one Python object, read an element at a time."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

_skip_space = re.compile(r'[ \t\n\r]*').match
_UTF_16 = (b'\xff\xfe', b'\xfe\xff')
_BAR_STEP = 1 << 22  # bytes


class Member(NamedTuple):
    """A member of the object in the file, or one element of a member that is a list.

    Attributes:
        key: Of the member.
        value: Of the member or the element; `[]` for a list whose elements follow one by one.
        is_element: Whether it is an element.
        start: First byte in the file.
        end: Byte behind the last.
    """

    key: str
    value: Any
    is_element: bool
    start: int
    end: int


def scan(path: Path, lists: Collection[str], progress: bool = True) -> Iterator[Member]:
    """The members of the object in a JSON file, some of them element by element.

    The file's bytes are in memory meanwhile, but of the named lists one element only.

    Args:
        path: UTF-8, with or without its mark.
        lists: Keys of the members to take apart, if they are lists.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: With a short reason and the place: missing, not JSON, not an object, a key
            that comes twice.
    """
    text = _load(path)
    decode, keys = _decoder(text), set()
    start = _at(text, 3 if text.startswith('\xef\xbb\xbf') else 0)
    if text[start : start + 1] != '{':
        raise ValueError(f'holds {_named(decode(start)[0])}, not an object with members')
    pos = _at(text, start + 1)
    with tqdm(total=len(text), desc=path.name, unit='B', unit_scale=True, disable=None if progress else True) as bar:
        while text[pos : pos + 1] != '}':
            if keys:
                pos = _expect(text, pos, ',')
            key, pos = decode(pos)
            if not isinstance(key, str):
                raise _error(text, pos, 'a key that is no string')
            if key in keys:
                raise ValueError(f"the key '{key}' comes twice")
            keys.add(key)
            pos = _expect(text, _at(text, pos), ':')
            if key not in lists or text[pos : pos + 1] != '[':
                value, end = decode(pos)
                yield Member(key, value, False, pos, end)
                pos = _at(text, end)
                continue
            yield Member(key, [], False, pos, pos)
            first, pos = True, _at(text, pos + 1)
            while text[pos : pos + 1] != ']':
                if not first:
                    pos = _expect(text, pos, ',')
                first = False
                value, end = decode(pos)
                yield Member(key, value, True, pos, end)
                pos = _at(text, end)
                if pos - bar.n > _BAR_STEP:
                    bar.update(pos - bar.n)
            pos = _at(text, pos + 1)
        bar.update(len(text) - bar.n)
    if _at(text, pos + 1) != len(text):
        raise _error(text, pos + 1, 'more behind the end of the object')


class Slices:
    """Parts of a JSON file by their place; picklable, opens the file where it is used.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {'path': self.path, '_bytes': None}

    def value(self, start: int, end: int) -> Any:
        """The value at a place that `scan` gave."""
        if self._bytes is None:
            with self.path.open('rb') as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return json.loads(self._bytes[start:end])


def _load(path: Path) -> str:
    """The file's bytes as characters of the same number; text beyond ASCII is wrong still."""
    try:
        with path.open('rb') as file:
            mark = file.read(2)
            if mark in _UTF_16:
                raise ValueError('UTF-16 text; save it as UTF-8')
            if not mark:
                raise ValueError('empty file')
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return str(data, 'latin-1')
    except FileNotFoundError:
        raise ValueError('missing') from None
    except OSError as error:
        raise ValueError(f'unreadable ({error.strerror or error})') from None


def _decoder(text: str) -> Any:
    raw_decode = json.JSONDecoder().raw_decode
    is_ascii = text.isascii()

    def decode(pos: int) -> tuple[Any, int]:
        try:
            value, end = raw_decode(text, pos)
            # A byte of UTF-8 beyond ASCII is never a quote or a bracket, so the end is right.
            if not is_ascii and not (part := text[pos:end]).isascii():
                value = json.loads(part.encode('latin-1').decode())
        except json.JSONDecodeError as error:
            raise _error(text, error.pos, error.msg) from None
        except UnicodeDecodeError as error:
            raise ValueError(f'not UTF-8 text (byte {pos + error.start})') from None
        except RecursionError:
            raise ValueError('not usable JSON (nested too deeply)') from None
        return value, end

    return decode


def _at(text: str, pos: int) -> int:
    return _skip_space(text, pos).end()


def _expect(text: str, pos: int, sign: str) -> int:
    if text[pos : pos + 1] != sign:
        raise _error(text, pos, f"'{sign}' expected")
    return _at(text, pos + 1)


def _error(text: str, pos: int, what: str) -> ValueError:
    if pos >= len(text.rstrip()):
        what = 'it breaks off'
    line = text.count('\n', 0, pos) + 1
    return ValueError(f'not JSON ({what}, line {line}, column {pos - text.rfind(chr(10), 0, pos)})')


def _named(value: Any) -> str:
    kinds = {list: 'a list', str: 'a string', bool: 'true or false', type(None): 'null'}
    return kinds.get(type(value), 'a number')
