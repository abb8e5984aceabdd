"""Any data set to COCO JSON and images: detect, read in parallel, check, write."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfinetune.data.check.kinds import BEYOND
from mmfinetune.data.check.scale import are_larger
from mmfinetune.data.formats import FORMATS, detect, reader_for, require_options
from mmfinetune.data.records import Item, Reader
from mmfinetune.data.to_coco import Converter, Result, absolute, relative_name
from mmfinetune.data.writer import IMAGES, REPORT, InPlace, Placing, Target, place_images
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import natural_key, reason_of, writing
from mmfinetune.utils.text import near, plural, printable, table

NO_SPLIT = 'all'  # name of the only annotation file of a data set without splits
_SHOWN_CLASSES, _SHOWN_LINES = 100, 20


class _LongList(UserError):
    # A data set is fixed file by file, so a list that is cut early is of little use.
    max_shown = 1000


@dataclass
class Counts:
    """What one split came to.

    Attributes:
        objects: Annotations that are not crowd regions.
        empty: Images without any annotation.
        per_class: Objects of each class, in label order.
    """

    images: int = 0
    objects: int = 0
    crowds: int = 0
    empty: int = 0
    per_class: dict[str, int] = field(default_factory=dict)


@dataclass
class Summary:
    """What a data set came to.

    Attributes:
        format: Format of the source.
        reason: Why it was taken for that.
        classes: In label order.
        splits: By name.
        dropped: Objects not written, by reason.
        left_out: Keys of the images with problems, each with its split.
        problems: Why they were left out.
        notes: What was fixed or left out otherwise.
        masked: Images with polygons.
        beyond: Those of them that polygons leave by far.
        placed: Images linked, copied or referred to; empty if nothing was written.
        files: The annotation files by split; empty if nothing was written.
    """

    format: str
    reason: str
    classes: list[str] = field(default_factory=list)
    splits: dict[str, Counts] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[Message] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)
    masked: int = 0
    beyond: int = 0
    placed: dict[str, int] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def count(self, result: Result) -> None:
        """Add one image."""
        name = result.item.split or NO_SPLIT
        counts = self.splits.setdefault(name, Counts(per_class=dict.fromkeys(self.classes, 0)))
        if result.problems:
            self.left_out[result.item.key] = name
            self.problems += result.problems
            return
        counts.images += 1
        self.masked += result.reach > 0
        self.beyond += result.reach > BEYOND
        counts.objects += len(result.labels)
        counts.crowds += result.crowds
        counts.empty += not result.annotations
        for label in result.labels:
            counts.per_class[self.classes[label]] += 1
        self.dropped += result.dropped
        self.notes += result.notes


def prepare(
    src: str | Path,
    out: str | Path,
    format: str = 'auto',
    placing: Placing = 'link',
    workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    **options: Any,
) -> Summary:
    """Write `out/annotations/instances_<split>.json` and `out/images/` from any data set.

    All is read and checked before anything appears in `out`; the files do not depend on `workers`.

    Args:
        src: Folder (or COCO JSON) to read; never changed.
        out: Folder to make, see `Target`.
        format: A key of `FORMATS`, or 'auto'.
        placing: How images come into `out`, see `place_images`. With 'in-place' `out` gets only the
            annotation files, with image names relative to the root of the data set.
        workers: Number of processes; all cores by default.
        skip_bad: Leave images with problems out instead of stopping.
        overwrite: Replace what an earlier call made.
        dry_run: Only read and check.
        progress: Whether to show progress bars.
        **options: For the reader; `classes` (names, an order and a subset) and `min_area` (pixels)
            hold for all formats.

    Raises:
        UserError: All problems of a kind in one error; `out` is then as it was.
    """
    src, in_place, workers = Path(src), placing == 'in-place', workers or os.cpu_count() or 1
    target = (InPlace if in_place else Target)(Path(out), src, overwrite)
    reader, summary, found = _open(src, format, {**options, 'progress': progress})
    items = _without_duplicates(reader, found, summary)
    converter = _converter(reader, summary.classes, items, in_place, options.get('min_area') or 0)
    with contextlib.nullcontext() if dry_run else target:
        names = []
        for result in converter.convert(items, workers, summary.format, progress):
            summary.count(result)
            if dry_run:
                continue
            writer = target.writer(result.item.split or NO_SPLIT)
            if not result.problems:
                writer.add(result.image_id, result.image, result.annotations)
                names.append(relative_name(result.item.image, converter.base))
        _require_good(summary, reader, src, len(found), skip_bad)
        if not dry_run:
            for name, writer in target.writers.items():
                writer.finish(_header(reader, name, src, converter.ids, summary, in_place))
            images = target.staging / IMAGES
            summary.placed = place_images(names, Path(converter.base), images, placing, workers, progress)
            with writing(target.out):
                target.commit(_report(summary, src, converter, placing, options))
            summary.files = {name: target.annotation_file(name) for name in target.writers}
    return summary


def _open(src: Path, name: str, options: dict[str, Any]) -> tuple[Reader, Summary, list[Item]]:
    """The reader of a data set, the summary to fill, and all images.

    Raises:
        UserError: The data set cannot be read or has no images, or the classes do not fit.
    """
    if not src.exists():
        raise UserError('prepare-source-missing', path=src)
    reason = 'as named'
    try:
        if name == 'auto':
            name, reason = detect(src)
        require_options(name, options)
        reader = reader_for(name).open(src, options)
        items = reader.items()
    except OSError as error:
        raise UserError('prepare-source-error', path=error.filename or src, reason=reason_of(error)) from error
    if not items and reader.problems:
        raise _LongList('prepare-nothing-left', problems=reader.problems, path=src, advice=reader.hint)
    if not items:
        raise UserError('prepare-no-images', path=src, format=name, layout=FORMATS[name].layout)
    summary = Summary(name, reason, _chosen_classes(reader, options.get('classes')))
    summary.problems, summary.notes = list(reader.problems), list(reader.notes)
    return reader, summary, items


def _without_duplicates(reader: Reader, items: Sequence[Item], summary: Summary) -> list[Item]:
    """Items of which no two have one image file; the others are problems of the summary."""
    first: dict[tuple, Item] = {}
    for item in items:
        split = item.split or NO_SPLIT
        other = first.setdefault((absolute(item.image), reader.overlapping and split), item)
        if other is not item:
            splits = ' and in '.join(dict.fromkeys((other.split or NO_SPLIT, split)))
            summary.problems.append(Message('prepare-image-twice', place=item.key, splits=splits, other=other.key))
            summary.left_out[item.key] = split
    return list(first.values())


def _chosen_classes(reader: Reader, wanted: Sequence[str] | None) -> list[str]:
    """The classes to write, in label order.

    Raises:
        UserError: A name is duplicated or unknown, or there is none.
    """
    names = list(wanted or reader.classes)
    problems = []
    for name, count in Counter(names).items():
        if count > 1:
            problems.append(Message('class-repeated', name=name, count=count))
        if printable(name) != name:
            problems.append(Message('class-encoding', name=name))
        if name not in reader.classes:
            problems.append(Message('class-unknown', name=name, near=near(name, reader.classes, '; ')))
    if problems:
        raise UserError('prepare-classes', problems=problems, path=reader.root, known=', '.join(reader.classes))
    if not names:
        raise UserError('prepare-no-classes', path=reader.root)
    return names


def _converter(reader: Reader, classes: list[str], items: Sequence[Item], in_place: bool, min_area: int) -> Converter:
    ids = [reader.category_ids.get(name, 0) for name in classes]
    # Tools disagree whether labels follow the ids or the order in the file, so both must agree.
    if ids != sorted(set(ids)) or ids[0] < 1:
        ids = list(range(1, len(classes) + 1))
    labels = {name: label for label, name in enumerate(classes)}
    root = absolute(reader.root)
    base = root if in_place else os.path.commonpath({absolute(item.image).parent for item in items})
    return Converter(reader, labels, ids, str(base), min_area)


def _require_good(summary: Summary, reader: Reader, src: Path, images: int, skip_bad: bool) -> None:
    if summary.problems and not skip_bad:
        facts: dict[str, Any] = dict(left_out=len(summary.left_out), images=images, advice=reader.hint)
        facts['found'] = plural(len(summary.problems), 'problem')
        raise _LongList('prepare-problems', problems=summary.problems, path=src, **facts)
    if are_larger(summary.beyond, summary.masked):
        raise UserError('prepare-labels-larger', path=src, beyond=summary.beyond, images=summary.masked)
    empty = [Message('prepare-split-empty', split=name) for name, s in summary.splits.items() if not s.images]
    if empty:
        raise _LongList('prepare-nothing-left', problems=empty + summary.problems, path=src, advice=reader.hint)
    if not any(split.objects for split in summary.splits.values()):
        lines = [Message('prepare-dropped', count=n, reason=r) for r, n in sorted(summary.dropped.items())]
        if crowds := sum(split.crowds for split in summary.splits.values()):
            raise UserError('prepare-only-crowds', problems=lines, path=src, crowds=crowds)
        raise UserError('prepare-no-objects', problems=lines, path=src, images=images)


def _header(reader: Reader, split: str, src: Path, ids: list[int], summary: Summary, in_place: bool) -> dict[str, Any]:
    own = reader.headers.get(None if split == NO_SPLIT else split, {})
    # No date and no path: the same data gives the same bytes.
    info = own.get('info') or {'description': f'{src.resolve().name}, {split} (prepared from {summary.format})'}
    if in_place:  # no report is written
        info = {**info, 'left_out': [key for key, of in summary.left_out.items() if of == split]}
    categories = []
    for category_id, name in zip(ids, summary.classes, strict=True):
        categories.append({'id': category_id, 'name': name})
        if group := reader.supercategories.get(name):
            categories[-1]['supercategory'] = group
    return {'info': info, 'licenses': own.get('licenses') or [], 'categories': categories}


def _report(summary: Summary, src: Path, converter: Converter, placing: str, options: dict[str, Any]) -> dict[str, Any]:
    splits = sorted(summary.splits.items(), key=lambda pair: natural_key(pair[0]))
    return {
        'format': summary.format,
        'source': str(src.resolve()),
        'images_from': converter.base,
        'images': placing,
        'options': {
            key: str(value) if isinstance(value, Path) else value
            for key, value in sorted(options.items())
            if value not in (None, False)
        },
        'category_ids': dict(zip(summary.classes, converter.ids, strict=True)),
        'splits': {name: vars(split) for name, split in splits},
        'dropped': dict(sorted(summary.dropped.items())),
        **{name: [printable(str(x)) for x in getattr(summary, name)] for name in ('left_out', 'problems', 'notes')},
    }


def format_summary(summary: Summary, lines: int | None = _SHOWN_LINES) -> str:
    """A table for the terminal: splits, classes, and what was left out.

    Args:
        summary: What to show.
        lines: The most lines of problems and of notes; None for all.
    """
    splits = sorted(summary.splits.items(), key=lambda pair: natural_key(pair[0]))
    rows = [(name, s.images, s.objects, s.crowds, s.empty) for name, s in splits]
    classes = [(name, *(s.per_class[name] for _, s in splits)) for name in summary.classes[:_SHOWN_CLASSES]]
    shown = [
        f'read as {summary.format}: {summary.reason}',
        table([('split', 'images', 'objects', 'crowds', 'empty'), *rows]),
        table([('class', *(name for name, _ in splits)), *classes]),
    ]
    if len(summary.classes) > _SHOWN_CLASSES:
        shown[-1] += f'\n… and {len(summary.classes) - _SHOWN_CLASSES} more classes'
    shown += [f'{count} objects dropped: {reason}' for reason, count in sorted(summary.dropped.items())]
    for title, found in (('left out', summary.problems), ('notes', summary.notes)):
        if found:
            block = [f'{title}:', *(f'  - {line}' for line in found[:lines])]
            if lines is not None and len(found) > lines:
                block.append(f'  … and {len(found) - lines} more, see {REPORT}')
            shown.append('\n'.join(block))
    if summary.placed:
        shown.append('images: ' + ', '.join(f'{count} {how}' for how, count in sorted(summary.placed.items())))
    return printable('\n\n'.join(shown))
