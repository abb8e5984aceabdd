"""Checks of whole data sets: annotation files, masks, image files, and one split against another.

The result is kept in a cache, so that a check before every training costs next to nothing.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data.check.cache import Cache
from mmfinetune.data.check.findings import Example, Finding, Report, SplitStats
from mmfinetune.data.check.images import ImageFacts, check_images, read_images, similar
from mmfinetune.data.check.kinds import IMBALANCE, KINDS, RARE, SEVERITIES
from mmfinetune.data.check.masks import Masks, check_masks
from mmfinetune.data.check.scale import check_scale
from mmfinetune.data.check.table import Table, read_table
from mmfinetune.data.layout import guess_image_root
from mmfinetune.utils.files import shown

Splits = Mapping[str, tuple[Path, Path | None]]

_SIDES = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_ASPECTS = (0, 0.5, 0.7, 0.9, 1.1, 1.4, 2)
_PER_IMAGE = (0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 31)
_SIZES_SHOWN = 8
_LARGEST_SHAPE = 20_000  # numbers of a polygon that is kept for its picture


@dataclass(frozen=True)
class Options:
    """How to check.

    Attributes:
        images: Whether to read the image files too.
        workers: Processes for them; all cores by default.
        max_examples: Places kept of each finding.
        cache: Whether to take the result of an earlier check of the same files.
        progress: Whether to show progress bars on a terminal.
        exif_masks: For a repair: masks of images that EXIF turns are drawn on the 'stored' or the 'upright' picture,
            where they do not tell themselves.
    """

    images: bool = True
    workers: int | None = None
    max_examples: int = 5
    cache: bool = True
    progress: bool = True
    exif_masks: str | None = None


def check(splits: Splits, classes: Sequence[str] | None = None, options: Options = Options()) -> Report:
    """Check the splits of a data set by themselves and against each other.

    Args:
        splits: Annotation file and image folder of each split. Without a folder the usual ones
            near the file are tried.
        classes: Class names of the config in label order; those of the first split by default.

    Returns:
        All that was found. Bad data never raises; see `Report.require_good`.
    """
    start = time.perf_counter()
    cache = Cache(splits, classes, (options.images, options.max_examples)) if options.cache else None
    report = cache.find() if cache else None
    if report is None:
        report, tables = examine(splits, classes, options)
        if cache:
            cache.keep(report, [t.image_path(i) for t in tables for i in range(len(t.files))] if options.images else [])
    report.seconds = time.perf_counter() - start
    return report


def examine(
    splits: Splits, classes: Sequence[str] | None = None, options: Options = Options(), keep: bool = False
) -> tuple[Report, list[Table]]:
    """`check` without the cache, and the tables that it read; they `keep` their annotations, most of the memory."""
    # Most configs test on the validation split.
    names = {place: ', '.join(n for n, p in splits.items() if p == place) for place in splits.values()}
    of_splits = [{n.partition('.')[0] for n, p in splits.items() if p == place} for place in names]
    tables: list[Table] = []
    stats: list[SplitStats] = []
    findings: list[Finding] = []
    facts: list[dict[Path, ImageFacts]] = []
    for (path, root), name in names.items():
        table = read_table(name, path, root or Path())
        if root is None:
            table.root = guess_image_root(path, table.files)
        masks = check_masks(table, options.progress)
        check_scale(table, masks)
        facts.append({})
        if options.images:
            paths = [table.root / name for name in table.files if name is not None]
            facts[-1] = read_images(paths, options.workers, options.progress)
            check_images(table, facts[-1])
        counts = _count(table)
        expected = classes or (tables[0].classes if tables else None)
        findings += _of_table(table, options.max_examples)
        findings += _of_classes(table, counts, expected, options.max_examples)
        stats.append(_statistics(table, masks, counts))
        if not keep:
            table.annotations = []
        tables.append(table)
    for table, of in zip(tables, of_splits, strict=True):
        findings += _trained_on(table, of, options.max_examples)
    for one, two in itertools.combinations(range(len(tables)), 2):
        # Two parts of a training split may well share images.
        if len(of_splits[one] | of_splits[two]) > 1:
            findings += _between(tables[one], tables[two], facts[one], facts[two], options.max_examples)
    # Errors first, then as the kinds are listed.
    codes = list(KINDS)
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), codes.index(f.code), f.split))
    return Report(stats, findings, options.images), tables


def _usable(table: Table) -> np.ndarray:
    """(A,) bool: the objects that training learns from (mmdet's CocoDataset.parse_data_info)."""
    usable = (table.image_rows >= 0) & (table.category_rows >= 0) & ~table.crowd
    usable &= (table.areas > 0) & (table.boxes[:, 2:] >= 1).all(1)
    for code in ('box-outside', 'mask-missing', 'mask-type', 'mask-empty'):
        usable[list(table.marks.marked(code))] = False
    return usable


def _count(table: Table) -> Counter[str]:
    """Usable objects by class name."""
    rows, numbers = np.unique(table.category_rows[_usable(table)], return_counts=True)
    counts: Counter[str] = Counter()
    for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
        name = table.categories[row].get('name')
        counts[name if isinstance(name, str) else repr(name)] += number
    return counts


def _of_table(table: Table, most: int) -> list[Finding]:
    """Findings from what is marked in a table."""
    findings: dict[str, Finding] = {}
    for code, detail in table.fatal:
        finding = findings.setdefault(code, Finding(code, table.name, 0))
        finding.count += 1
        finding.examples.append(Example(detail=f'{table.path}: {detail}'))
    if not table.images:
        return list(findings.values())
    marks = table.marks
    empty = np.ones(len(table.images), bool)
    empty[table.image_rows[table.image_rows >= 0]] = False
    # All of them are not a note but the error below.
    if not empty.all():
        marks.add('image-empty', np.flatnonzero(empty))
    if not _usable(table).any():
        crowds = f', {table.crowd.sum():,} of them crowd regions' if table.crowd.any() else ''
        example = Example(detail=f'{table.path}: {len(table.annotations):,} annotations{crowds}')
        findings['no-objects'] = Finding('no-objects', table.name, 1, [example])
    for code, rows in marks.rows.items():
        finding = findings[code] = Finding(code, table.name, len(rows))
        for row in marks.worst(code, most):
            example_of = {'images': _image_example, 'annotations': _annotation_example}.get(finding.kind.unit)
            example = example_of(table, row) if example_of else Example()
            objects: Any = np.flatnonzero(table.image_rows == row) if code.startswith('image-exif') else ()
            if len(objects):  # what is to be looked at
                example = _annotation_example(table, int(objects[0]))
            example.detail = marks.detail(code, row)
            finding.examples.append(example)
    return list(findings.values())


def _image_example(table: Table, row: int) -> Example:
    path = table.image_path(row)
    if path is None:
        return Example(f'image {table.images[row].get("id", f"at position {row}")!r}')
    return Example(str(table.files[row]), path=str(path))


def _annotation_example(table: Table, row: int) -> Example:
    entry = table.annotations[row]
    image = table.image_rows[row]
    example = _image_example(table, image) if image >= 0 else Example()
    key = entry.get('id', f'at position {row}')
    example.annotation = key if isinstance(key, (int, float, str)) else repr(key)
    shape = entry.get('segmentation')
    if isinstance(shape, list) and all(isinstance(p, array) for p in shape):
        if sum(map(len, shape)) <= _LARGEST_SHAPE:
            example.shape = [p.tolist() for p in shape]
    elif isinstance(shape, dict) and len(str(shape)) <= 8 * _LARGEST_SHAPE:
        example.shape = shape
    if not np.isnan(table.boxes[row]).any():
        example.box = table.boxes[row].tolist()
    return example


def _of_classes(table: Table, counts: Mapping[str, int], expected: Sequence[str] | None, most: int) -> list[Finding]:
    """Findings about class order, and classes with too few objects."""
    findings = []
    if expected and table.classes and list(expected) != table.classes:
        example = Example(detail=f'{table.path}: {_difference(table.classes, list(expected))}')
        findings.append(Finding('class-order', table.name, 1, [example]))
    if not counts:
        return findings
    few = sorted(table.classes, key=lambda c: counts[c])
    absent = [c for c in few if not counts[c]]
    chosen, name = {'class-unmeasured': absent}, table.name.lower()
    if 'train' in name or not ('val' in name or 'test' in name):
        limit = max(counts.values()) / IMBALANCE
        chosen = {
            'class-absent': absent,
            'class-rare': [c for c in few if 0 < counts[c] < RARE],
            'class-imbalance': [c for c in few if RARE <= counts[c] <= limit],
        }
    for code, names in chosen.items():
        if names:
            details = [f'{c} ({counts[c]:,})' if counts[c] else c for c in names[:most]]
            findings.append(Finding(code, table.name, len(names), [Example(detail=detail) for detail in details]))
    return findings


def _difference(found: list[str], expected: list[str]) -> str:
    """How two class lists differ: the first place, then names that only one has."""
    place = next((k for k, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    words = [] if place is None else [f'class {place + 1} is {found[place]!r}, expected is {expected[place]!r}']
    for verb, names in (
        ('has not', [n for n in expected if n not in found]),
        ('has beyond', [n for n in found if n not in expected]),
    ):
        if names:
            more = f', … ({len(names)})' if len(names) > 5 else ''
            words.append(f'{verb} {", ".join(map(repr, names[:5]))}{more}')
    return '; '.join(words)


def _trained_on(table: Table, of_splits: set[str], most: int) -> list[Finding]:
    """A finding if one file is both trained on and evaluated."""
    others = sorted(of_splits - {'train'})
    if 'train' not in of_splits or not others or not table.images:
        return []
    examples = [Example(str(name), detail='the same annotation file') for name in table.files[:most]]
    return [Finding('leak-content', f'train / {", ".join(others)}', len(table.images), examples)]


def _between(
    one: Table, two: Table, ours: dict[Path, ImageFacts], theirs: dict[Path, ImageFacts], most: int
) -> list[Finding]:
    """Findings about images that are in two splits."""
    if one.path.resolve() == two.path.resolve():
        return []
    name, found = f'{one.name} / {two.name}', []
    if not (ours and theirs):
        both = sorted({one.root / f for f in one.files if f} & {two.root / f for f in two.files if f})
        examples = [Example(p.name, detail='the same file', path=str(p)) for p in both[:most]]
        return [Finding('leak-content', name, len(both), examples)] if both else []
    by_digest = {fact.digest: path for path, fact in ours.items() if not fact.problem}
    whole = {path: fact for path, fact in theirs.items() if not fact.problem}
    same = [(by_digest[fact.digest], path) for path, fact in whole.items() if fact.digest in by_digest]
    for code, pairs, verb in (('leak-content', same, 'is'), ('leak-similar', similar(ours, theirs), 'looks like')):
        examples = []
        for first, second in pairs[:most]:
            detail = f'{verb} {shown(first, one.root)}'
            examples.append(Example(shown(second, two.root), detail=detail, path=str(second), other=str(first)))
        if pairs:
            found.append(Finding(code, name, len({second for _, second in pairs}), examples))
    return found


def _statistics(table: Table, masks: Masks, counts: Mapping[str, int]) -> SplitStats:
    known = table.image_rows[(table.image_rows >= 0) & ~table.crowd]
    per_image: Any = np.bincount(known, minlength=len(table.images)) if table.images else []
    sized = table.widths > 0
    widths, heights = table.widths[sized], table.heights[sized]
    sizes = Counter(zip(widths.tolist(), heights.tolist(), strict=True))
    frequent = {f'{w}x{h}': n for (w, h), n in sizes.most_common(_SIZES_SHOWN)}
    if len(sizes) > _SIZES_SHOWN:
        frequent[f'{len(sizes) - _SIZES_SHOWN} others'] = int(sized.sum()) - sum(frequent.values())
    areas = masks.areas[np.isfinite(masks.areas) & ~table.crowd]
    return SplitStats(
        table.name,
        str(table.path),
        str(table.root),
        len(table.images),
        len(table.annotations),
        int(table.crowd.sum()),
        {name: counts[name] for name in table.classes},
        _histogram(per_image, _PER_IMAGE, whole=True),
        _histogram(np.sqrt(areas), _SIDES),
        frequent,
        _histogram(widths / np.maximum(heights, 1), _ASPECTS),
    )


def _histogram(values: Sequence[float] | np.ndarray, edges: Sequence[float], whole: bool = False) -> dict[str, int]:
    """Counts by bin, of which the lower ends are given; a bin of whole numbers ends below the next one."""
    counts, _ = np.histogram(values, [*edges, np.inf])
    labels = []
    for low, high in itertools.pairwise(edges):
        last = high - 1 if whole else high
        labels.append(f'{low:g}' if low == last else f'{low:g}-{last:g}')
    return dict(zip([*labels, f'{edges[-1]:g}+'], counts.tolist(), strict=True))
