"""Repaired copies of annotation files: what can be put right without a guess, the rest left out."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfinetune.data import coco_json
from mmfinetune.data.check.findings import Report
from mmfinetune.data.check.images import ImageFacts, look_at
from mmfinetune.data.check.run import Options, Splits, check, examine
from mmfinetune.data.check.shapes import clip, frame_of, measure, turn, usable_polygons
from mmfinetune.data.check.table import Table
from mmfinetune.data.layout import Prepared
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import atomic_write_all, json_bytes, reason_of
from mmfinetune.utils.text import brief

CHANGES = 'changes.json'
_PASSES = 3
# What only a person can fix.
_BY_HAND = ('category-name', 'labels-relative', 'labels-larger')
_BAD_IMAGES = ('image-missing', 'image-unreadable', 'image-truncated', 'image-size', 'file-name')
_BAD_OBJECTS = ('image-id-unknown', 'category-id-unknown', 'mask-missing', 'rle-size', 'rle-counts', 'mask-empty')
_BAD_SHAPES = ('mask-type', 'polygon-points', 'polygon-odd', 'polygon-number')
_BAD_BOXES = ('box-invalid', 'box-degenerate', 'box-outside', 'box-over-edge', 'box-mask')
_BAD_AREAS = ('area-invalid', 'area-zero', 'area-mismatch')


@dataclass
class Fixed:
    """A repaired copy.

    Attributes:
        out: Its folder.
        paths: The annotation files in it, by split.
        changes: Split, image, annotation and what was done, for each change.
        report: The check of the copy.
    """

    out: Path
    paths: dict[str, Path]
    changes: list[dict]
    report: Report

    def text(self) -> str:
        kinds = Counter((c['split'], c['change']) for c in self.changes)
        lines = [f'{len(self.changes):,} changes (all of them: {self.out / CHANGES})']
        lines += [f'  {split}: {number:,} x {change}' for (split, change), number in kinds.items()]
        return '\n'.join([*lines, f'Repaired copy: {self.out}'])


def fix(splits: Splits, out: Path, classes: Sequence[str] | None = None, options: Options = Options()) -> Fixed:  # noqa: B008 (frozen)
    """Write a repaired copy of annotation files; the images are linked, the originals left alone.

    ``OUT/annotations/instances_<split>.json``, ``OUT/images`` and ``OUT/changes.json`` appear
    only when a check of the copy finds no error.

    Args:
        splits: See `run.check`.
        out: A folder that does not exist yet.
        classes: Class names in label order; those of the first split by default.
        options: How to check.

    Raises:
        UserError: `out` already exists, or there are errors that only a person can fix.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError('fix-exists', out=out)
    report, tables = examine(splits, classes, options, keep=True)
    # Of the faults of a whole file these alone are repaired.
    whole = {code for table in tables for code, _ in table.fatal} - {'encoding', 'entry-type'}
    if by_hand := [f.message() for f in report.findings if f.code in whole | {*_BY_HAND}]:
        raise UserError('fix-by-hand', problems=by_hand)
    part = out.with_name(f'.{out.name}.{os.getpid()}.tmp')
    changes: list[dict] = []
    try:
        paths = _repair_all(tables, part, classes, changes, options)
        atomic_write_all({part / CHANGES: json_bytes(changes, indent=1)})
        if out.is_dir():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        raise UserError('fix-unwritable', out=out, reason=reason_of(error)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    done = {name: out / path.relative_to(part) for name, path in paths.items()}
    return Fixed(out, done, changes, check(_copied(done, out), classes, options))


def _repair_all(
    tables: Sequence[Table], part: Path, classes: Sequence[str] | None, changes: list[dict], options: Options
) -> dict[str, Path]:
    """Repair until a check is content; one repair can bring another fault to light."""
    for number in range(_PASSES):
        known = len(changes)
        paths = _write(tables, part, classes, changes, options.exif_masks, first=number == 0)
        report, tables = examine(_copied(paths, part), classes, options, keep=True)
        if report.good or len(changes) == known:
            break
    if not report.good:
        raise UserError('fix-incomplete', problems=[f.message() for f in report.of('error')])
    return paths


def _copied(paths: dict[str, Path], folder: Path) -> Splits:
    return {name: (path, Prepared(folder).images) for name, path in paths.items()}


def _write(
    tables: Sequence[Table],
    out: Path,
    classes: Sequence[str] | None,
    changes: list[dict],
    exif_masks: str | None,
    first: bool,
) -> dict[str, Path]:
    """Write the repaired files of all tables and link their images; paths by split."""
    folders = _link(list(dict.fromkeys(t.root.resolve() for t in tables)), out) if first else {}
    contents, paths, from_config = {}, {}, classes is not None
    for table in tables:
        name = table.name.partition(',')[0]
        repair = _Repair(table, classes, from_config, changes, exif_masks)
        data = repair.run()
        classes = classes or [c['name'] for c in data['categories']]
        if first:
            root = table.root.resolve()
            _rename(data, root, folders[root])
        paths[name] = Prepared(out).annotation(name.replace('/', '_'))
        try:
            contents[paths[name]] = json_bytes(data)
        except ValueError as error:  # in keys that no check reads, and that a copy must keep
            raise UserError('fix-not-json', path=table.path, reason=error) from None
    atomic_write_all(contents)
    return paths


def _link(roots: list[Path], out: Path) -> dict[Path, str | None]:
    """Link image folders into ``OUT/images``; what comes before a name, None for the whole path."""
    images = Prepared(out).images
    out.mkdir(parents=True, exist_ok=True)
    try:
        if len(roots) == 1:
            images.symlink_to(roots[0], target_is_directory=True)
            return {roots[0]: ''}
        folders: dict[Path, str | None] = {}
        images.mkdir(exist_ok=True)
        for root in roots:
            name = root.name
            while f'{name}/' in folders.values():
                name += '_'
            (images / name).symlink_to(root, target_is_directory=True)
            folders[root] = f'{name}/'
        return folders
    except OSError:
        # Some systems let only an administrator make links.
        images.mkdir(exist_ok=True)
        return dict.fromkeys(roots)


def _rename(data: dict, root: Path, prefix: str | None) -> None:
    """Image names that hold in the copy; those that left the image folder become absolute."""
    for image in data['images']:
        name = image['file_name']
        outside = prefix is None or Path(name).is_absolute() or '..' in Path(name).parts
        image['file_name'] = os.path.normpath(root / name) if outside else f'{prefix}{name}'


@dataclass
class _Repair:
    """The repair of one annotation file, from what a check has marked in it; `changes` gets what is done."""

    table: Table
    classes: Sequence[str] | None  # expected; those of this file if None
    from_config: bool  # not from another file
    changes: list[dict]
    exif_masks: str | None  # which picture masks are drawn on that do not tell

    def run(self) -> dict:
        """The repaired content of the file."""
        # Not the table's, whose polygons are arrays; it is changed below.
        data = coco_json.read(self.table.path).data
        before = len(self.changes)
        if any(code == 'encoding' for code, _ in self.table.fatal):
            self._note('saved as UTF-8')
        categories, category_of = self._categories(data['categories'])
        images = self._images(data['images'])
        annotations = self._annotations(data['annotations'], images, category_of)
        if not images or not annotations:
            counts = Counter(change['change'] for change in self.changes[before:])
            problems = [Message('fix-change', change=c, count=n) for c, n in counts.items()]
            raise UserError('fix-nothing-left', problems=problems, path=self.table.path)
        return {**data, 'categories': categories, 'images': list(images.values()), 'annotations': annotations}

    def _note(self, change: str, image: int | None = None, annotation: int | None = None) -> None:
        table, number = self.table, None
        if annotation is not None:
            number = table.annotations[annotation].get('id', f'position {annotation}')
            if not isinstance(number, (int, str)):
                number = brief(number)  # NaN and infinity are not JSON
            if table.image_rows[annotation] >= 0:
                image = int(table.image_rows[annotation])
        name = None if image is None else table.files[image]
        self.changes.append({'split': table.name, 'change': change, 'image': name, 'annotation': number})

    def _renumber(self, unit: str, entries: Iterable[dict], *more: str) -> None:
        """Number entries from 1 if an id of them is wrong."""
        wrong = [f'{unit}-id-{what}' for what in ('missing', 'type', 'range', 'duplicate')]
        if self.table.marks.marked(*wrong, *more):
            self._note(f'{unit} ids renumbered from 1')
            for number, entry in enumerate(entries, 1):
                entry['id'] = number

    def _categories(self, entries: list[dict]) -> tuple[list[dict], dict[int, int]]:
        """The categories in the expected order, and the new id by old row."""
        self._refuse_ambiguous(entries)
        kept: dict[str, dict] = {}
        for entry in entries:
            if entry and kept.setdefault(entry['name'], dict(entry)) != entry:
                self._note(f'category {entry["name"]!r} merged with the one of that name')
        order = list(self.classes or kept)
        used = set(self.table.category_rows.tolist())
        extra = [e['name'] for row, e in enumerate(entries) if e and e['name'] not in order and row in used]
        if extra and not self.from_config:
            raise UserError('fix-classes', problems=extra, path=self.table.path)
        if order != list(kept):
            self._note('categories put into the expected order')
        self._renumber('category', kept.values())
        highest = max((e['id'] for e in kept.values()), default=0)
        for number, name in enumerate((name for name in order if name not in kept), highest + 1):
            kept[name] = {'id': number, 'name': name}
        categories = [kept[name] for name in order]
        new = {e['name']: e['id'] for e in categories}
        return categories, {row: new[e['name']] for row, e in enumerate(entries) if e and e['name'] in new}

    def _refuse_ambiguous(self, entries: list[dict]) -> None:
        """Refuse categories of one id and several names."""
        names = {repr(e.get('id')): e['name'] for e in reversed(entries) if e}
        for row in sorted(self.table.marks.marked('category-id-duplicate')):
            key, second = repr(entries[row]['id']), entries[row]['name']
            if (first := names[key]) != second:
                raise UserError('fix-category-id', path=self.table.path, id=key, first=first, second=second)

    def _images(self, entries: list[dict]) -> dict[int, dict]:
        """Images that stay, by row, with their new ids."""
        table, marks = self.table, self.table.marks
        dropped = {row: code for code in _BAD_IMAGES for row in marks.marked(code)}
        dropped |= {row: 'not a JSON object' for row, entry in enumerate(entries) if not entry}
        rows = {repr(e.get('id')): r for r, e in reversed(list(enumerate(entries)))}
        for row in marks.marked('image-id-duplicate'):
            dropped[row] = 'id used twice'
            first = rows[repr(entries[row].get('id'))]
            if table.files[first] != table.files[row]:
                # Nobody can tell which of the two the objects belong to.
                dropped[first] = 'id used twice'
        for row in sorted(dropped):
            self._note(f'image dropped: {dropped[row]}', row)
        images = {row: e for row, e in enumerate(entries) if row not in dropped}
        for row in marks.marked('image-size-invalid') & set(images):
            images[row]['width'], images[row]['height'] = self._look_at(row).upright
            self._note('size read from the image', row)
        self._renumber('image', images.values())
        return images

    def _look_at(self, row: int) -> ImageFacts:
        return look_at(self.table.root / str(self.table.files[row]))

    def _annotations(self, entries: list[dict], images: dict[int, dict], category_of: dict[int, int]) -> list[dict]:
        table, marks = self.table, self.table.marks
        dropped = {row: code for code in reversed(_BAD_OBJECTS) for row in marks.marked(code)}
        turned, later = self._turn(entries, images, dropped)
        for row, entry in enumerate(entries):
            if not entry:
                dropped[row] = 'not a JSON object'
            elif row not in dropped and table.image_rows[row] not in images:
                dropped[row] = 'its image is dropped'
            elif row not in dropped and table.category_rows[row] not in category_of:
                dropped[row] = 'its class is not expected'
        for row in marks.marked('iscrowd-value'):
            if not isinstance(entries[row]['iscrowd'], bool):
                dropped.setdefault(row, 'iscrowd-value')
        unusable, outside = marks.marked(*_BAD_SHAPES), marks.marked('polygon-far', 'polygon-over-edge')
        reshaped = turned | unusable | outside
        boxes, areas = reshaped | marks.marked(*_BAD_BOXES), reshaped | marks.marked(*_BAD_AREAS)
        for row in sorted((boxes | areas) - dropped.keys() - later):
            image = images[table.image_rows[row]]
            reason = self._reshape(row, entries[row], image, row in unusable, row in outside)
            reason = reason or self._measure(row, entries[row], image, row in boxes, row in areas)
            if reason:
                dropped[row] = reason
        kept = []
        for row, entry in enumerate(entries):
            if row in dropped:
                self._note(f'object dropped: {dropped[row]}', annotation=row)
                continue
            if type(entry.get('iscrowd')) is not int:
                entry['iscrowd'] = int(bool(entry.get('iscrowd', 0)))
                self._note('iscrowd set', annotation=row)
            entry['image_id'] = images[table.image_rows[row]]['id']
            entry['category_id'] = category_of[table.category_rows[row]]
            kept.append(entry)
        self._renumber('annotation', kept, 'annotation-id-zero')
        return kept

    def _reshape(self, row: int, entry: dict, image: dict, unusable: bool, outside: bool) -> str:
        """Correct a mask; the reason if nothing of it is left."""
        if unusable:
            entry['segmentation'] = usable_polygons(entry['segmentation'])
            if not entry['segmentation']:
                return 'no usable polygon'
            self._note('unusable polygons dropped', annotation=row)
        if outside:
            entry['segmentation'] = clip(entry['segmentation'], image['width'], image['height'])
            if not entry['segmentation']:
                return 'outside the image'
            self._note('mask clipped to the image', annotation=row)
        return ''

    def _measure(self, row: int, entry: dict, image: dict, box: bool, area: bool) -> str:
        """Make box and area from the mask; the reason if it has no pixel."""
        found, pixels = measure(entry['segmentation'], image['width'], image['height'])
        if not pixels or min(found[2:]) <= 0:
            return 'mask-empty'
        if box:
            entry['bbox'] = found
            self._note('bbox made from the mask', annotation=row)
        if area:
            entry['area'] = pixels
            self._note('area made from the mask', annotation=row)
        return ''

    def _turn(self, entries: list[dict], images: dict[int, dict], dropped: dict[int, str]) -> tuple[set[int], set[int]]:
        """Correct sizes of images that EXIF turns; rows of objects turned too, and of those for the next pass."""
        turned, later = set(), set()
        for image, frame in self._frames(entries, set(images)).items():
            facts = self._look_at(image)
            images[image]['width'], images[image]['height'] = facts.upright
            rows = np.flatnonzero(self.table.image_rows == image).tolist()
            if frame == 'upright':
                self._note('size corrected, the masks are upright already', image)
                later.update(rows)
                for row in rows:
                    if dropped.get(row) in ('rle-size', 'mask-empty'):
                        del dropped[row]
                continue
            self._note('size corrected, masks turned like the image', image)
            for row in rows:
                if row not in dropped:
                    shape = entries[row]['segmentation']
                    entries[row]['segmentation'] = turn(shape, facts.turned, facts.width, facts.height)
                    turned.add(row)
        return turned, later

    def _frames(self, entries: list[dict], kept: set[int]) -> dict[int, str]:
        """Which picture the masks of each image that EXIF turns were drawn on.

        Masks that leave one of the two tell; those of the same file are of one kind. The rest is for a person.
        """
        frames = {}
        for image in sorted(self.table.marks.marked('image-exif') & kept):
            facts = self._look_at(image)
            shapes = [entries[row].get('segmentation') for row in np.flatnonzero(self.table.image_rows == image)]
            frames[image] = frame_of(shapes, facts.width, facts.height) if shapes else 'upright'
        found = {frame for image, frame in frames.items() if frame and (self.table.image_rows == image).any()}
        usual = self.exif_masks or (found.pop() if len(found) == 1 else '')
        if unclear := [self.table.files[image] for image, frame in frames.items() if not (frame or usual)]:
            raise UserError('fix-exif', problems=unclear, path=self.table.path)
        return {image: frame or usual for image, frame in frames.items()}
