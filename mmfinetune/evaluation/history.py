"""What is known of the epochs of a run, as a table."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping

from mmfinetune.utils.text import csv_text, is_number

_COLUMN_ORDER = ('epoch', 'iter', 'train/', 'val/', '', 'lr', 'train_seconds', 'val_seconds')


class History:
    """The results of a run by epoch, or by iteration where training is not counted in epochs.

    A row is a dict: ``iter``, ``epoch`` (absent where not counted), ``train/loss``,
    ``train/<term>``, ``val/loss``, ``val/<term>``, the metrics under their own names, ``lr`` (the
    base), ``lr/<group>``, ``train_seconds``, ``val_seconds``.

    Args:
        rows: Rows with ascending ``iter``.
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self.rows = [dict(row) for row in rows]

    @property
    def unit(self) -> str:
        """``epoch``, or ``iter`` if rows have no epoch."""
        return 'epoch' if all('epoch' in row for row in self.rows) else 'iter'

    def cut(self, iteration: int) -> None:
        """Drop the rows after an iteration."""
        self.rows = [row for row in self.rows if row['iter'] <= iteration]

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row in place of those of the same or a later iteration."""
        self.cut(int(row['iter']) - 1)
        self.rows.append(dict(row))

    def columns(self) -> list[str]:
        """Names of all values: steps, training, validation, metrics, learning rates, times."""

        def place(name: str) -> int:
            group = name if name in _COLUMN_ORDER else name.partition('/')[0]
            group = f'{group}/' if f'{group}/' in _COLUMN_ORDER else group
            return _COLUMN_ORDER.index(group if group in _COLUMN_ORDER else '')

        return sorted(dict.fromkeys(itertools.chain(('epoch', 'iter'), *self.rows)), key=place)

    def curve(self, name: str) -> dict[int, float]:
        """A value by epoch (or iteration)."""
        return {int(row[self.unit]): row[name] for row in self.rows if name in row and self.unit in row}

    def best(self, name: str, less: bool = False) -> tuple[int, float] | None:
        """The best value and its epoch (or iteration); see `best_of`."""
        return best_of(self.curve(name), less)

    def to_csv(self) -> str:
        """The table with all digits; an empty field where there is no value."""
        columns = self.columns()
        return csv_text([columns, *([row.get(name, '') for name in columns] for row in self.rows)])

    @classmethod
    def from_csv(cls, data: bytes) -> History:
        """Read what `to_csv` wrote.

        Raises:
            ValueError: It is something else, or was changed so that it cannot be understood.
        """
        try:
            header, *lines = csv.reader(io.StringIO(data.decode('utf-8-sig')), strict=True)
        except (csv.Error, ValueError) as error:
            raise ValueError(f'not a table: {error}') from error
        if not {'epoch', 'iter'} <= set(header) or len(set(header)) < len(header):
            raise ValueError('line 1: no columns epoch and iter, or a duplicated name')
        history = cls()
        for number, line in enumerate(lines, 2):
            if not line:
                continue
            if len(line) != len(header):
                raise ValueError(f'line {number}: {len(line)} fields, not {len(header)}')
            fields = {name: text for name, text in zip(header, line, strict=True) if text}
            try:
                row = {name: int(text) if name in ('epoch', 'iter') else float(text) for name, text in fields.items()}
            except ValueError as error:
                raise ValueError(f'line {number}: {error}') from error
            if not all(is_number(row[name]) for name in ('epoch', 'iter') if name in row):
                raise ValueError(f'line {number}: epoch or iter is too large')
            if row.get('iter', 0) <= (history.rows[-1]['iter'] if history.rows else 0):
                raise ValueError(f'line {number}: iter does not ascend')
            history.rows.append(row)
        return history


def best_of(curve: Mapping[int, float], less: bool = False) -> tuple[int, float] | None:
    """The first place of the best value of a curve, and the value; None without finite values."""
    finite = {x: value for x, value in curve.items() if math.isfinite(value)}
    return (min if less else max)(finite.items(), key=lambda item: item[1], default=None)
