"""What a check of a data set has found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmfinetune.data.check.kinds import KINDS, SEVERITIES, Kind
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.text import plural


@dataclass
class Example:
    """One place of a finding.

    Attributes:
        file: Image by the name in the annotation file; empty if the place is not an image.
        annotation: Annotation id as it stands in the file, if it is about one.
        detail: What is wrong there.
        path: The image file, for pictures.
        other: The image file that it is compared with.
        shape: Segmentation of the annotation, for pictures.
        box: Its box, for pictures.
    """

    file: str = ''
    annotation: object = None
    detail: str = ''
    path: str = ''
    other: str = ''
    shape: Any = None
    box: Any = None

    def __str__(self) -> str:
        place = self.file + (f' #{self.annotation}' if self.annotation is not None else '')
        text = ': '.join(part for part in (place.strip(), self.detail) if part)
        # Text of a file, for a terminal: no control characters and lone surrogates.
        return ''.join(c if c.isprintable() else '\N{REPLACEMENT CHARACTER}' for c in text)


@dataclass
class Finding:
    """All places of one kind in one split (or between two: ``train/val``)."""

    code: str
    split: str
    count: int
    examples: list[Example] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        return KINDS[self.code]

    @property
    def severity(self) -> str:
        return self.kind.severity

    def line(self, examples: int = 3) -> str:
        unit = self.kind.unit
        singular = {'categories': 'category', 'classes': 'class', 'entries': 'entry'}.get(unit, unit[:-1])
        line = f'{self.split}: {plural(self.count, singular, unit)} {self.kind.title} [{self.code}]'
        if shown := [str(e) for e in self.examples[:examples]]:
            line += f': {"; ".join(shown)}' + (', …' if self.count > len(shown) else '')
        return line

    def message(self) -> Message:
        return Message(self.code, '{line}. Hint: {hint}', line=self.line(), hint=self.kind.hint)

    def as_dict(self) -> dict:
        places = [{'image': e.file or None, 'annotation': e.annotation, 'detail': e.detail} for e in self.examples]
        kind = self.kind._asdict()
        return {'code': self.code, 'split': self.split, 'count': self.count, **kind, 'examples': places}


@dataclass
class SplitStats:
    """Numbers of one split for the report.

    Attributes:
        per_class: Objects that are not crowd regions, by class, in the order of the file.
        per_image: Images by their number of objects: label of the bin and count, like the others.
        mask_sides: Masks by the square root of their area.
        sizes: The most frequent image sizes.
        aspects: Images by width / height.
    """

    name: str
    path: str
    image_root: str
    images: int = 0
    annotations: int = 0
    crowd: int = 0
    per_class: dict[str, int] = field(default_factory=dict)
    per_image: dict[str, int] = field(default_factory=dict)
    mask_sides: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    aspects: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """The result of `run.check`."""

    splits: list[SplitStats]
    findings: list[Finding]
    images_read: bool = True
    seconds: float = 0.0
    cached: bool = False

    def of(self, severity: str) -> list[Finding]:
        return [f for f in self.findings if f.severity == severity]

    @property
    def good(self) -> bool:
        return not self.of('error')

    def codes(self) -> set[str]:
        return {f.code for f in self.findings}

    def require_good(self) -> None:
        """Raise a UserError with all errors, one line each, if there are any."""
        if problems := [f.message() for f in self.of('error')]:
            paths = ' '.join(dict.fromkeys(s.path for s in self.splits))
            raise UserError('check-errors', problems=problems, count=len(problems), paths=paths)

    def lines(self, limit: int = 10) -> list[str]:
        """Errors, then warnings, one line each, at most `limit`; notes are only counted."""
        listed = self.of('error') + self.of('warning')
        lines = [f'{f.severity}: {f.line(2)}' for f in listed[:limit]]
        if len(listed) > limit:
            lines.append(f'… and {len(listed) - limit} more kinds of errors and warnings')
        return lines

    def as_dict(self) -> dict:
        return {
            'good': self.good,
            'seconds': round(self.seconds, 2),
            'cached': self.cached,
            'images_read': self.images_read,
            'counts': {s: len(self.of(s)) for s in SEVERITIES},
            'splits': [dataclasses.asdict(s) for s in self.splits],
            'findings': [f.as_dict() for f in self.findings],
        }

    @classmethod
    def from_cache(cls, data: dict) -> Report:
        """The inverse of `dataclasses.asdict`; KeyError or TypeError if the data is not a report."""
        findings = [Finding(**{**f, 'examples': [Example(**e) for e in f['examples']]}) for f in data['findings']]
        if any(f.code not in KINDS for f in findings):
            raise KeyError('a finding of another version')
        splits = [SplitStats(**s) for s in data['splits']]
        return cls(**{**data, 'splits': splits, 'findings': findings, 'cached': True})


class Marks:
    """Entries of one annotation file by what is wrong with them.

    `rows` holds, for each code, the positions in the file's list that the kind's unit names: all
    of them, since a repair needs all. Details are worded for the few that are shown.
    """

    def __init__(self) -> None:
        self.rows: dict[str, np.ndarray] = {}
        self._scores: dict[str, dict[int, float]] = {}
        self._details: dict[str, list[dict[int, str] | Callable[[int], str] | str]] = {}

    def add(
        self,
        code: str,
        rows: Sequence[int] | np.ndarray,
        detail: dict[int, str] | Callable[[int], str] | str = '',
        scores: Mapping[int, float] | np.ndarray | None = None,
    ) -> None:
        """Add entries, with words for a row and how bad it is, if any; the worst are shown."""
        assert code in KINDS, code
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return
        if scores is not None:
            self._scores.setdefault(code, {}).update((int(r), float(scores[r])) for r in rows)
        self.rows[code] = np.union1d(self.rows[code], rows) if code in self.rows else rows
        self._details.setdefault(code, []).append(detail)

    def worst(self, code: str, count: int) -> list[int]:
        """The rows to show: the worst, or the first if all are alike."""
        scores = self._scores.get(code, {})
        return sorted(self.rows[code].tolist(), key=lambda r: -scores.get(r, 0))[:count]

    def detail(self, code: str, row: int) -> str:
        """The first words that were given for a row."""
        for detail in self._details[code]:
            found = detail.get(row, '') if isinstance(detail, dict) else detail
            if callable(found):
                found = found(row)
            if found:
                return found
        return ''

    def marked(self, *codes: str) -> set[int]:
        return {int(r) for code in codes for r in self.rows.get(code, ())}
