"""Tables and times as text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, also to be read as it is; empty without a row under the header.

    Args:
        rows: Header and rows of cells.
        left: Number of columns whose text begins on the left.
    """
    if len(rows) < 2:
        return ''
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ['-' * width if i < left else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    lines = [
        [
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (lines[0], rule, *lines[1:]))


def cell(text: str) -> str:
    """Text of any kind in a cell of a Markdown table."""
    return ' '.join(text.split()).replace('|', '\\|').replace('<', '\\<')


def duration(seconds: float) -> str:
    """``h:mm:ss``; short ones as ``2.5 s``."""
    whole = round(seconds)
    if whole < 60:
        return f'{seconds:.1f} s'
    return f'{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}'
