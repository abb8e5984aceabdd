"""An annotation file as columns: what is read of it, and which entries are wrong by themselves."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from mmfinetune.data import coco_json
from mmfinetune.data.check.findings import Marks
from mmfinetune.data.check.kinds import BOX_TOLERANCE_PX
from mmfinetune.data.coco_json import name_problem
from mmfinetune.utils.text import brief, is_text

BACKGROUND = ('background', '_background_', '__background__', '__ignore__')
_LARGEST_ID = 2**63 - 1
_MISSING = object()


@dataclass
class Table:
    """One annotation file.

    Rows are positions in the lists of the file. What cannot be used has a value that says so:
    -1 for rows and ids, 0 for sizes, NaN for boxes and areas, None for names.

    Attributes:
        name: Name of the split.
        path: The JSON file.
        root: Folder that the image names are relative to.
        images, annotations, categories: The lists; entries that are not objects are empty dicts.
        classes: Category names in the file's order, without repeated ones.
        files: (I,) image names or None.
        widths, heights: (I,) int64.
        category_rows: (A,) int64, positions in `categories` (the first of a repeated id).
        image_rows: (A,) int64, positions in `images`.
        boxes: (A, 4) float64, x, y, width, height.
        areas: (A,) float64.
        crowd: (A,) bool.
        marks: What is wrong with entries of the three lists.
        fatal: Code and detail of what is wrong with the file as a whole.
    """

    name: str
    path: Path
    root: Path
    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    classes: list[str] = field(default_factory=list)
    files: list[str | None] = field(default_factory=list)
    widths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    heights: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    category_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    image_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    marks: Marks = field(default_factory=Marks)
    fatal: list[tuple[str, str]] = field(default_factory=list)

    def image_path(self, row: int) -> Path | None:
        name = self.files[row]
        return None if name is None else self.root / name

    def sizes_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Width and height of the images of some annotations; 0 where unknown."""
        # Row -1 stands for an unknown image.
        images = self.image_rows[rows]
        return np.append(self.widths, 0)[images], np.append(self.heights, 0)[images]


def read_table(name: str, path: Path, root: Path) -> Table:
    """Read an annotation file and check its tables; masks and image files are not looked at.

    Never raises on bad input: what is wrong is in `Table.fatal` and `Table.marks`.
    """
    coco = coco_json.read(path, compact=True)
    table = Table(name, path, root, coco.images, coco.annotations, coco.categories)
    table.fatal = [(fault.code.removeprefix('coco-'), str(fault)) for fault in coco.faults]
    if any(code.startswith('section') for code, _ in table.fatal):
        table.images, table.annotations, table.categories = [], [], []
        return table
    categories = _check_categories(table)
    images = _check_images(table)
    _check_annotations(table, images, categories)
    return table


def _check_ids(table: Table, name: str, entries: list[dict]) -> dict[Any, int]:
    """Mark wrong ids; the rows by id, the first of repeated ones."""
    values = [entry.get('id', _MISSING) for entry in entries]
    places = reversed(range(len(values)))
    rows = {v: i for v, i in zip(reversed(values), places, strict=True) if not isinstance(v, (list, dict))}
    rows.pop(_MISSING, None)
    wrong = {
        # An entry that is not an object is reported already.
        'missing': [i for i, v in enumerate(values) if v is _MISSING and entries[i]],
        'type': [i for i, v in enumerate(values) if v is not _MISSING and type(v) is not int],
        'range': [i for i, v in enumerate(values) if type(v) is int and not 0 <= v <= _LARGEST_ID],
        'duplicate': [i for i, v in enumerate(values) if not isinstance(v, (list, dict)) and rows.get(v, i) != i],
    }

    def word(i: int) -> str:
        return f'position {i}' if values[i] is _MISSING else f'id {brief(values[i])}'

    for code, found in wrong.items():
        table.marks.add(f'{name}-id-{code}', found, word)
    return rows


def _check_categories(table: Table) -> dict[Any, int]:
    marks, rows = table.marks, _check_ids(table, 'category', table.categories)
    for i, entry in enumerate(table.categories):
        name = entry.get('name')
        if not isinstance(name, str) or not name.strip() or not is_text(name):
            if entry:
                marks.add('category-name', [i], {i: f'id {brief(entry.get("id"))}'})
        elif name in table.classes:
            marks.add('category-name-duplicate', [i], {i: f'{name!r}'})
        else:
            table.classes.append(name)
        if entry.get('id') == 0 and type(entry['id']) is int:
            marks.add('category-id-zero', [i], {i: f'{name!r}'})
        if isinstance(name, str) and name.strip().lower() in BACKGROUND:
            marks.add('background-class', [i], {i: f'{name!r}'})
    return rows


def _check_images(table: Table) -> dict[Any, int]:
    marks, rows = table.marks, _check_ids(table, 'image', table.images)
    seen: dict[str, int] = {}
    for i, entry in enumerate(table.images):
        name: Any = entry.get('file_name')
        reason = name_problem(name)
        if reason:
            if entry:
                marks.add('file-name', [i], {i: reason})
            table.files.append(None)
            continue
        table.files.append(name)
        if name in seen:
            ids = (brief(table.images[k].get('id')) for k in (seen[name], i))
            marks.add('image-listed-twice', [i], {i: f'ids {" and ".join(ids)}'})
        seen.setdefault(name, i)
        if name[0] in '/\\' or '..' in name or name[1:2] == ':':
            path = PureWindowsPath(name)
            if path.is_absolute() or path.root or '..' in path.parts:
                marks.add('file-name-outside', [i], {i: name})
    sizes = []
    for key in ('width', 'height'):
        values = [entry.get(key) for entry in table.images]
        wrong = [i for i, v in enumerate(values) if type(v) is not int or not 0 < v < 1 << 31]
        for i in wrong:
            if table.images[i]:
                marks.add('image-size-invalid', [i], {i: f'{key} {brief(values[i])}'})
            values[i] = 0
        sizes.append(np.array(values, np.int64))
    usable = np.minimum(*sizes) > 0
    table.widths, table.heights = (np.where(usable, size, 0) for size in sizes)
    return rows


def _check_annotations(table: Table, images: dict[Any, int], categories: dict[Any, int]) -> None:
    marks, entries = table.marks, table.annotations
    _check_ids(table, 'annotation', entries)
    zero = [i for i, entry in enumerate(entries) if entry.get('id', 1) == 0 and entry['id'] is not False]
    marks.add('annotation-id-zero', zero)
    table.image_rows = _linked_rows(table, 'image', images)
    table.category_rows = _linked_rows(table, 'category', categories)
    marks.add('iscrowd-missing', [i for i, entry in enumerate(entries) if entry and 'iscrowd' not in entry])
    crowd = [entry.get('iscrowd', 0) for entry in entries]
    wrong = [i for i, value in enumerate(crowd) if type(value) is not int or value not in (0, 1)]
    marks.add('iscrowd-value', wrong, lambda i: f'iscrowd {brief(crowd[i])}')
    table.crowd = np.array(list(map(bool, crowd)), bool)
    table.areas = _check_areas(marks, entries)
    table.boxes = _check_boxes(table)


def _linked_rows(table: Table, section: str, rows_by_id: dict[Any, int]) -> np.ndarray:
    values = [entry.get(f'{section}_id') for entry in table.annotations]
    rows = np.array([-1 if isinstance(v, (list, dict)) else rows_by_id.get(v, -1) for v in values], np.int64)
    unknown = [i for i in np.flatnonzero(rows < 0).tolist() if table.annotations[i]]
    table.marks.add(f'{section}-id-unknown', unknown, lambda i: f'{section}_id {brief(values[i])}')
    return rows


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # False for NaN too


def _check_areas(marks: Marks, entries: list[dict]) -> np.ndarray:
    values = [entry.get('area') for entry in entries]
    areas = np.array([v if _is_number(v) else np.nan for v in values], np.float64)
    invalid = [i for i in np.flatnonzero(np.isnan(areas)) if entries[i]]
    marks.add('area-invalid', invalid, lambda i: f'area {brief(values[i])}' if 'area' in entries[i] else 'no area')
    marks.add('area-zero', np.flatnonzero(areas <= 0), lambda i: f'area {areas[i]:g}')
    return np.where(areas > 0, areas, np.nan)


def _check_boxes(table: Table) -> np.ndarray:
    """The boxes (A, 4); marks those that are not boxes, have no area, or are not in the image."""
    entries, marks = table.annotations, table.marks
    values = [entry.get('bbox') for entry in entries]
    boxes = _as_array(values)
    invalid = [i for i in np.flatnonzero(np.isnan(boxes[:, 0])) if entries[i]]
    marks.add('box-invalid', invalid, lambda i: f'bbox {brief(values[i])}' if 'bbox' in entries[i] else 'no bbox')
    x, y, w, h = boxes.T
    degenerate = (w <= 0) | (h <= 0)
    tiny = ~degenerate & ((w < 1) | (h < 1))
    width, height = table.sizes_of(np.arange(len(entries)))
    # Where the image is not known nothing can be said.
    checked = (width > 0) & ~degenerate
    outside = checked & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    over = checked & ~outside & (np.maximum.reduce([-x, -y, x + w - width, y + h - height]) > BOX_TOLERANCE_PX)

    def detail(i: int) -> str:
        text = f'bbox {brief([round(float(v), 2) for v in boxes[i]])}'
        return f'{text} in {width[i]}x{height[i]}' if width[i] else text

    wrong = {'box-degenerate': degenerate, 'box-tiny': tiny, 'box-outside': outside, 'box-over-edge': over}
    for code, found in wrong.items():
        marks.add(code, np.flatnonzero(found), detail)
    return boxes


def _as_array(values: Sequence[Any]) -> np.ndarray:
    """Boxes (N, 4), NaN for those that are not four finite numbers."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        # All at once, as nearly all files allow; NumPy would take texts and truth values for numbers.
        if set(map(type, itertools.chain.from_iterable(values))) <= {int, float}:
            boxes = np.array(values, np.float64).reshape(len(values), 4)
            if (np.abs(boxes) < 1e300).all():
                return boxes
    boxes = np.full((len(values), 4), np.nan)
    for i, value in enumerate(values):
        if isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)):
            boxes[i] = value
    return boxes
