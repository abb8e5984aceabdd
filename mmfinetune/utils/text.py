"""Tables, counts, times and suggestions as text."""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard


def table(rows: Iterable[Sequence[Any]], left: int = 1, markdown: bool = False) -> str:
    """Aligned columns, without a newline at the end; empty if there is no row under the header.

    Args:
        rows: Header and rows of cells; integers get thousands separators.
        left: Number of columns that are aligned left; the others are aligned right.
        markdown: Make a Markdown table (which is also readable as it is); cells are escaped.
    """
    shown = [[f'{c:,}' if isinstance(c, int) else str(c) for c in row] for row in rows]
    if len(shown) < 2:
        return ''
    if markdown:
        shown = [[cell(text) for text in row] for row in shown]
    least = 3 if markdown else 0
    widths = [max(least, *map(len, column)) for column in zip(*shown, strict=True)]
    if markdown:
        shown.insert(1, ['-' * w if i < left else '-' * (w - 1) + ':' for i, w in enumerate(widths)])
    lines = []
    for row in shown:
        sides = ['<'] * left + ['>'] * (len(row) - left)
        cells = [f'{text:{side}{width}}' for text, side, width in zip(row, sides, widths, strict=False)]
        lines.append(f'| {" | ".join(cells)} |' if markdown else '  '.join(cells).rstrip())
    return '\n'.join(lines)


def block(rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """A Markdown `table` with its last newline."""
    return f'{text}\n' if (text := table(rows, left, markdown=True)) else ''


def cell(text: str) -> str:
    """Text of any kind on one line of Markdown or in a cell of a table; a second call changes nothing."""
    return re.sub(r'(?<!\\)([|<])', r'\\\1', ' '.join(text.split()))


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV with all digits."""
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows(rows)
    return out.getvalue()


def plural(count: int, noun: str, many: str = '') -> str:
    """A count with its noun: ``1 error``, ``1,234 errors``.

    Args:
        many: The plural, where it is not the singular and an s.
    """
    return f'{count:,} {noun if count == 1 else many or noun + "s"}'


def near(word: str, words: Iterable[str], before: str = '', cutoff: float = 0.6, most: int = 1) -> str:
    """``did you mean x?`` for the words most like a mistyped one; empty if none is like it.

    Args:
        before: Put in front of a suggestion, e.g. ``'; '``.
        cutoff: Least likeness, from 0 to 1.
        most: The most words to suggest.
    """
    found = difflib.get_close_matches(word, list(words), most, cutoff)
    return f'{before}did you mean {" or ".join(found)}?' if found else ''


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold; JSON's integers have no limit, and True is none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def duration(seconds: float) -> str:
    """``h:mm:ss``; short ones as ``2.5 s``, and a number that no time is as it is."""
    if not math.isfinite(seconds):
        return f'{seconds} s'
    whole = round(seconds)
    if whole < 60:
        return f'{seconds:.1f} s'
    return f'{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}'


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold (file names and JSON may have it) written out."""
    return text.encode(errors='backslashreplace').decode()


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: a lone surrogate, which JSON and pickles may have, can be in no file name and no file."""
    return not any('\ud800' <= c <= '\udfff' for c in text)


class _Brief(reprlib.Repr):
    """Ends in bounded time for whatever a foreign file may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 20

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        # Python does not write integers of thousands of digits.
        return repr(x) if abs(x) < 1 << 256 else f'an integer of {x.bit_length()} bits'


_BRIEF = _Brief()


def brief(value: object) -> str:
    """A value as Python writes it, cut to 40 characters."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 40 else text[:37] + '…'
