"""Any data set to COCO JSON and images: recognise, read in parallel, check, write."""

from __future__ import annotations

import difflib
import importlib
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfinetune.data.records import Item, Source
from mmfinetune.data.to_coco import Done, Task, absolute, read_all, relative_name
from mmfinetune.data.writer import ANNOTATIONS, IMAGES, REPORT, Placing, SplitWriter, Target, place_images
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import natural_key

NO_SPLIT = 'all'  # name of the only annotation file of a data set without splits
_SHOWN_CLASSES, _SHOWN_LINES = 100, 20


@dataclass(frozen=True)
class Kind:
    """Where the reader of a kind is, and what the kind looks like.

    Attributes:
        module: In this package.
        reader: Class in the module.
        layout: What `recognise` looks for.
    """

    module: str
    reader: str
    layout: str


SOURCES = {
    'coco2017': Kind(
        'coco', 'Coco2017Source', 'annotations/instances_{train,val}2017.json beside train2017/ and val2017/'
    ),
    'coco': Kind(
        'coco',
        'CocoSource',
        'COCO JSON (images, annotations, categories) in the folder, in annotations/ or in '
        'train/, val/, test/; or one such file',
    ),
    'voc': Kind('voc', 'VocSource', 'a PASCAL VOC devkit: JPEGImages/, SegmentationObject/, SegmentationClass/'),
    'sbd': Kind('sbd', 'SbdSource', 'SBD: dataset/inst/*.mat and dataset/img/*.jpg'),
    'cityscapes': Kind('cityscapes', 'CityscapesSource', 'leftImg8bit/ beside gtFine/ with *_gtFine_instanceIds.png'),
    'labelme': Kind('labelme', 'LabelmeSource', "LabelMe JSON files with 'shapes'"),
    'yolo': Kind('yolo', 'YoloSource', 'data.yaml, or images/ and labels/*.txt with classes.txt'),
    'mask-png': Kind('masks', 'MaskPngSource', 'images/ and masks/ with one PNG of object numbers for each image'),
    'binary-masks': Kind(
        'masks',
        'BinaryMasksSource',
        'a black-and-white mask PNG for each image and class: CLASS/name.jpg and '
        '.png, masks/CLASS/name.png or name_CLASS.png',
    ),
}
_FILES = {'.json': 'coco', '.yaml': 'yolo', '.yml': 'yolo'}  # kinds that one file may stand for


class _LongList(UserError):
    # A data set is mended file by file, so a list that is cut early is of little use.
    max_shown = 1000


@dataclass
class Split:
    """What one split came to.

    Attributes:
        images: Images written.
        objects: Annotations that are no crowd regions.
        crowds: Crowd regions.
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
        kind: Kind of the source.
        reason: Why it was taken for that.
        classes: In label order.
        splits: By name.
        dropped: Objects not written, by reason.
        left_out: Ids of the images with problems.
        problems: Why, one line each.
        notes: What was mended or left out otherwise, one line each.
        placed: Images linked, copied or referred to; empty if nothing was written.
    """

    kind: str
    reason: str
    classes: list[str]
    splits: dict[str, Split] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    placed: dict[str, int] = field(default_factory=dict)


def reader(kind: str) -> type[Source]:
    """The class that reads a kind of data set."""
    known = SOURCES[kind]
    return getattr(importlib.import_module(f'mmfinetune.data.formats.{known.module}'), known.reader)


def recognise(root: Path) -> tuple[str, str]:
    """The kind of a data set, and why.

    Raises:
        UserError: It looks like no kind or like several.
    """
    if root.is_file() and root.suffix.lower() in _FILES:
        return _FILES[root.suffix.lower()], f'a {root.suffix.lower()[1:].upper()} file'
    found = _reasons(root) if root.is_dir() else {}
    if len(found) == 1:
        return next(iter(found.items()))
    if found:
        raise UserError(
            f'{root}: could be of several kinds:',
            [f'{kind}: {reason}' for kind, reason in found.items()],
            'name the right one with --kind',
        )
    inner = []
    if root.is_dir():
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
        inner = [f'{folder} ({kind})' for folder in folders[:20] for kind in _reasons(folder)]
    raise UserError(
        f'{root}: no data set of a known kind. Looked for:',
        [f'{kind}: {known.layout}' for kind, known in SOURCES.items()],
        f'name one of these folders instead: {", ".join(inner)}'
        if inner
        else 'name the folder that holds the data set; --kind tells in detail what is missing',
    )


def _reasons(root: Path) -> dict[str, str]:
    found = {kind: reader(kind).recognise(root) for kind in SOURCES}
    return {kind: reason for kind, reason in found.items() if reason}


def prepare(
    src: str | Path,
    out: str | Path,
    kind: str = 'auto',
    placing: Placing = 'link',
    workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    **options: Any,
) -> Summary:
    """Write `out/annotations/instances_<split>.json` and `out/images/` from any data set.

    Everything is read and checked before anything appears in `out`; the files do not depend on
    the number of workers.

    Args:
        src: Folder (or COCO JSON) to read; never changed.
        out: Folder to make, see `Target`.
        kind: A key of `SOURCES`, or 'auto'.
        placing: How images come into `out`, see `place_images`.
        workers: Processes; all cores by default.
        skip_bad: Leave images with problems out instead of stopping.
        overwrite: Replace what an earlier call made.
        dry_run: Only read and check.
        progress: Whether to show progress bars.
        **options: For the reader; `classes` (names, an order and a subset) and `min_area` (pixels)
            hold for all kinds.

    Raises:
        UserError: All problems of a kind in one error; `out` is then as it was.
    """
    src, out = Path(src), Path(out)
    if not os.access(src, os.R_OK):
        raise UserError(
            f'{src}: ' + ('may not be read' if src.exists() else 'there is no such folder'), cure='correct the path'
        )
    reason = 'as named'
    workers = workers or os.cpu_count() or 1
    try:
        if kind == 'auto':
            kind, reason = recognise(src)
        target = Target(out, src, overwrite)
        source = reader(kind).open(src, {**options, 'progress': progress})
        items = source.items()
    except OSError as error:
        raise UserError(
            f'{error.filename or src}: {error.strerror or error}', cure='make all of the data set readable'
        ) from error
    if not items:
        raise UserError(
            f'{src}: no images (read as {kind}: {SOURCES[kind].layout})',
            cure='correct the path, or name another kind with --kind',
        )
    images = len(items)
    items, doubles = _without_doubles(items)
    summary = Summary(kind, reason, _chosen_classes(source, options.get('classes')))
    summary.left_out = list(doubles)
    summary.problems = [*getattr(source, 'problems', ()), *doubles.values()]
    summary.notes = list(getattr(source, 'notes', ()))
    task = _task(source, summary.classes, items, options.get('min_area') or 0)
    with nullcontext() if dry_run else target:
        writers: dict[str, SplitWriter] = {}
        names = []
        for done in read_all(task, items, workers, kind, progress):
            name = done.item.split or NO_SPLIT
            split = summary.splits.setdefault(name, Split(per_class=dict.fromkeys(summary.classes, 0)))
            if not dry_run and name not in writers:
                writers[name] = SplitWriter(target.staging / ANNOTATIONS / f'instances_{name}.json')
            _count(done, split, summary)
            if not dry_run and not done.problems:
                writers[name].add(done.image_id, done.image, done.annotations)
                names.append(relative_name(done.item.image, task.base))
        _require_good(summary, src, images, skip_bad, getattr(source, 'cure', ''))
        if dry_run:
            return summary
        for name, writer in writers.items():
            writer.finish(_header(source, name, src, task, summary))
        summary.placed = place_images(names, Path(task.base), target.staging / IMAGES, placing, workers, progress)
        target.commit(_report(summary, src, task, placing, options))
    return summary


def _without_doubles(items: Sequence[Item]) -> tuple[list[Item], dict[str, str]]:
    """Items of which no two are one file; and why each other is left out, by key."""
    first: dict[str, Item] = {}
    lines = {}
    for item in items:
        other = first.setdefault(str(absolute(item.image)), item)
        if other is not item:
            where = (
                f'in {other.split or NO_SPLIT} and in {item.split or NO_SPLIT}'
                if other.split != item.split
                else 'twice'
            )
            lines[item.key] = f'{item.key}: its image is listed {where} (also by {other.key})'
    return list(first.values()), lines


def _chosen_classes(source: Source, wanted: Sequence[str] | None) -> list[str]:
    """The classes to write, in label order.

    Raises:
        UserError: A name comes twice, is unknown, or there is none.
    """
    names = list(wanted or source.classes)
    problems = [f"'{name}' comes {count} times" for name, count in Counter(names).items() if count > 1]
    problems += [f'{name!r} is not UTF-8' for name in names if _printable(name) != name]
    for name in dict.fromkeys(names):
        if name not in source.classes:
            near = difflib.get_close_matches(name, source.classes, n=1)
            problems.append(f"there is no class '{name}'" + (f"; did you mean '{near[0]}'?" if near else ''))
    if problems:
        raise UserError(
            f'{source.root}: the classes do not fit the data:', problems, 'choose from: ' + ', '.join(source.classes)
        )
    if not names:
        raise UserError(f'{source.root}: no class is known', cure='name the classes with --classes')
    return names


def _task(source: Source, classes: list[str], items: Sequence[Item], min_area: int) -> Task:
    parents = {absolute(item.image).parent for item in items}
    kept = getattr(source, 'category_ids', None) or {}
    ids = [kept.get(name, 0) for name in classes]
    # Tools disagree whether labels follow the ids or the order in the file, so both must agree.
    if ids != sorted(set(ids)) or ids[0] < 1:
        ids = list(range(1, len(classes) + 1))
    labels = {name: label for label, name in enumerate(classes)}
    return Task(source, labels, ids, os.path.commonpath(parents), min_area)


def _count(done: Done, split: Split, summary: Summary) -> None:
    if done.problems:
        summary.left_out.append(done.item.key)
        summary.problems += done.problems
        return
    split.images += 1
    split.objects += len(done.labels)
    split.crowds += done.crowds
    split.empty += not done.annotations
    for label in done.labels:
        split.per_class[summary.classes[label]] += 1
    summary.dropped += done.dropped
    summary.notes += done.notes


def _require_good(summary: Summary, src: Path, images: int, skip_bad: bool, cure: str) -> None:
    if summary.problems and not skip_bad:
        count = len(summary.problems)
        raise _LongList(
            f'{src}: {count} problem{"s" * (count > 1)}, {len(summary.left_out)} of {images} '
            'images unusable; nothing was written',
            summary.problems,
            (f'{cure}; or ' if cure else 'mend these files, or ') + 'run again with --skip-bad, '
            'which leaves these out and goes on with the others',
        )
    empty = [f'{name}: all images are unusable' for name, split in summary.splits.items() if not split.images]
    if empty:
        raise _LongList(f'{src}: nothing is left to write', empty + summary.problems, cure)
    if not any(split.objects for split in summary.splits.values()):
        raise UserError(
            f'{src}: {images} images, but no object of any class',
            [f'{count} objects dropped: {reason}' for reason, count in sorted(summary.dropped.items())],
            'correct the path to the labels, --kind or --classes',
        )


def _header(source: Source, split: str, src: Path, task: Task, summary: Summary) -> dict[str, Any]:
    groups = getattr(source, 'supercategories', None) or {}
    own = (getattr(source, 'headers', None) or {}).get(None if split == NO_SPLIT else split, {})
    # No date and no path: the same data gives the same bytes.
    return {
        'info': own.get('info') or {'description': f'{src.resolve().name}, {split} (prepared from {summary.kind})'},
        'licenses': own.get('licenses') or [],
        'categories': [
            {'id': category_id, 'name': name, **({'supercategory': groups[name]} if groups.get(name) else {})}
            for category_id, name in zip(task.ids, summary.classes, strict=True)
        ],
    }


def _report(summary: Summary, src: Path, task: Task, placing: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        'kind': summary.kind,
        'source': str(src.resolve()),
        'images_from': task.base,
        'images': placing,
        'options': {
            key: str(value) if isinstance(value, Path) else value
            for key, value in sorted(options.items())
            if value not in (None, False)
        },
        'category_ids': dict(zip(summary.classes, task.ids, strict=True)),
        'splits': {
            name: vars(split) for name, split in sorted(summary.splits.items(), key=lambda pair: natural_key(pair[0]))
        },
        'dropped': dict(sorted(summary.dropped.items())),
        **{name: [_printable(line) for line in getattr(summary, name)] for name in ('left_out', 'problems', 'notes')},
    }


def format_summary(summary: Summary) -> str:
    """A table for the terminal: splits, classes, and what was left out."""
    splits = sorted(summary.splits.items(), key=lambda pair: natural_key(pair[0]))
    rows = [
        f'read as {summary.kind}: {summary.reason}',
        '',
        f'{"split":<12}{"images":>9}{"objects":>9}{"crowds":>8}{"empty":>8}',
    ]
    rows += [f'{name:<12}{s.images:>9}{s.objects:>9}{s.crowds:>8}{s.empty:>8}' for name, s in splits]
    width = max(12, *(len(name) + 2 for name in summary.classes))
    rows += ['', f'{"class":<{width}}' + ''.join(f'{name:>9}' for name, _ in splits)]
    rows += [
        f'{name:<{width}}' + ''.join(f'{s.per_class[name]:>9}' for _, s in splits)
        for name in summary.classes[:_SHOWN_CLASSES]
    ]
    if len(summary.classes) > _SHOWN_CLASSES:
        rows.append(f'… and {len(summary.classes) - _SHOWN_CLASSES} more classes')
    rows += [f'\n{count} objects dropped: {reason}' for reason, count in sorted(summary.dropped.items())]
    for title, lines in (('left out', summary.problems), ('notes', summary.notes)):
        if lines:
            rows += ['', f'{title}:', *(f'  - {line}' for line in lines[:_SHOWN_LINES])]
            if len(lines) > _SHOWN_LINES:
                rows.append(f'  … and {len(lines) - _SHOWN_LINES} more, see {REPORT}')
    if summary.placed:
        rows += ['', 'images: ' + ', '.join(f'{count} {how}' for how, count in sorted(summary.placed.items()))]
    return _printable('\n'.join(rows))


def _printable(text: str) -> str:
    """The text with the bytes of names that are not UTF-8 written out."""
    return text.encode(errors='backslashreplace').decode()
