"""All that a check of a data set can find (``kinds.yaml``), and the tolerances."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

SEVERITIES = ('error', 'warning', 'note')

BOX_TOLERANCE_PX, BOX_TOLERANCE_SHARE = 2.0, 0.02
AREA_TOLERANCE = 0.10
CROSSING_SHARE = 0.05
# Masks are of another picture if in so many images they reach farther than so many times the size.
BEYOND, BEYOND_LEAST, BEYOND_SHARE = 1.1, 3, 0.8
TINY_PX = 10
DUPLICATE_IOU = 0.95
RARE = 10
IMBALANCE = 100


class Kind(NamedTuple):
    """Severity, title (follows a count of `unit`) and hint of all findings of one code.

    An error stops training, or training and evaluation go silently wrong with it. A warning costs
    accuracy or makes a number untrue. A note is good to know.
    """

    severity: str
    unit: str
    title: str
    hint: str


_TOLERANCES = {name: value for name, value in globals().items() if name.isupper() and isinstance(value, (int, float))}
_ROWS = yaml.load(
    Path(__file__).with_name('kinds.yaml').read_text(encoding='utf-8'), getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
)
KINDS = {code: Kind(*(text.format(**_TOLERANCES) for text in row.values())) for code, row in _ROWS.items()}
