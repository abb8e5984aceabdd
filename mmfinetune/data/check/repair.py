"""Repaired copies of annotation files: what can be put right without a guess, the rest left out."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

from mmfinetune.data import coco_json
from mmfinetune.data.check.findings import Report
from mmfinetune.data.check.images import look_at
from mmfinetune.data.check.kinds import BOX_TOLERANCE_PX
from mmfinetune.data.check.run import Options, Splits, check, examine
from mmfinetune.data.check.shapes import as_json, clip, measure, to_rle, turn_mask, turn_polygons, usable_polygons
from mmfinetune.data.check.table import Table
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, json_bytes

CHANGES = 'changes.json'
_PASSES = 3
# What only a person can mend.
_BY_HAND = (
    'no-file',
    'file-unreadable',
    'not-json',
    'nesting',
    'top-level',
    'section-missing',
    'section-type',
    'no-images',
    'no-categories',
    'category-name',
)
_BAD_IMAGES = ('image-missing', 'image-unreadable', 'image-truncated', 'image-size', 'file-name')
_BAD_OBJECTS = ('image-id-unknown', 'category-id-unknown', 'mask-missing', 'rle-size', 'rle-counts', 'mask-empty')
_BAD_SHAPES = ('mask-type', 'polygon-points', 'polygon-odd', 'polygon-number')
_BAD_BOXES = ('box-invalid', 'box-degenerate', 'box-outside', 'box-over-edge', 'box-mask')
_BAD_AREAS = ('area-invalid', 'area-zero', 'area-mismatch')
_BAD_IDS = ('missing', 'type', 'range', 'duplicate')


@dataclass
class Fixed:
    """A repaired copy.

    Attributes:
        out: Its folder.
        paths: The annotation files in it, by split.
        changes: Of each change: split, image, annotation and what was done.
        report: Of the copy.
    """

    out: Path
    paths: dict[str, Path]
    changes: list[dict]
    report: Report

    def text(self) -> str:
        kinds = Counter((c['split'], c['change']) for c in self.changes)
        lines = [f'  {split}: {number:,} x {change}' for (split, change), number in kinds.items()]
        return '\n'.join(
            [f'{len(self.changes):,} changes (all of them: {self.out / CHANGES})', *lines, f'Repaired copy: {self.out}']
        )


def fix(splits: Splits, out: Path, classes: Sequence[str] | None = None, options: Options = Options()) -> Fixed:  # noqa: B008 (frozen)
    """Write a repaired copy of annotation files; the images are linked, the originals left alone.

    ``OUT/annotations/instances_<split>.json``, ``OUT/images`` and ``OUT/changes.json`` appear
    only when a check of the copy finds no error.

    Args:
        splits: See `dataset_check.check`.
        out: A folder that does not exist yet.
        classes: Class names in label order; those of the first split by default.
        options: How to check.

    Raises:
        UserError: `out` is there already, or there are errors that only a person can mend.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'{out} is there already', cure='pass a new folder to --fix')
    report, tables = examine(splits, classes, options, keep=True)
    _refuse(report)
    part = out.with_name(f'.{out.name}.{os.getpid()}.tmp')
    changes: list[dict] = []
    try:
        # One repair can bring another fault to light.
        for turn in range(_PASSES):
            known = len(changes)
            paths = _write(tables, part, classes, changes, first=turn == 0)
            again = {name: (path, part / 'images') for name, path in paths.items()}
            report, tables = examine(again, classes, options, keep=True)
            if report.good or len(changes) == known:
                break
        if not report.good:
            raise UserError(
                'These errors cannot be repaired without a guess; nothing was written:',
                [f.line() for f in report.of('error')],
                'mend them by hand',
            )
        atomic_write_all({part / CHANGES: json_bytes(changes, indent=1)})
        if out.is_dir():
            out.rmdir()
        part.rename(out)
    except OSError as error:
        raise UserError(
            f'{out}: cannot be written: {error.strerror or error}', cure='choose a folder you may write to'
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    done = {name: out / path.relative_to(part) for name, path in paths.items()}
    again = {name: (path, out / 'images') for name, path in done.items()}
    return Fixed(out, done, changes, check(again, classes, options))


def _refuse(report: Report) -> None:
    problems = [f'{f.line()}. Hint: {f.kind.hint}' for f in report.findings if f.code in _BY_HAND]
    if problems:
        raise UserError('These errors must be mended by hand first; nothing was written:', problems)


def _write(
    tables: Sequence[Table], out: Path, classes: Sequence[str] | None, changes: list[dict], first: bool
) -> dict[str, Path]:
    """Write the repaired files of all tables and link their images; paths by split."""
    roots = list(dict.fromkeys(t.root.resolve() for t in tables)) if first else []
    folders = _link(roots, out) if first else {}
    contents, paths, told = {}, {}, classes is not None
    for table in tables:
        name = table.name.partition(',')[0]
        repair = _Repair(table, classes, told)
        data = repair.run()
        changes += repair.changes
        classes = classes or [c['name'] for c in data['categories']]
        if first:
            _rename(data, table.root.resolve(), folders)
        paths[name] = out / 'annotations' / f'instances_{name.replace("/", "_")}.json'
        contents[paths[name]] = json_bytes(data)
    atomic_write_all(contents)
    return paths


def _link(roots: list[Path], out: Path) -> dict[Path, str | None]:
    """Link image folders into ``OUT/images``; what comes before a name, None for the whole path."""
    images = out / 'images'
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


def _rename(data: dict, root: Path, folders: dict[Path, str | None]) -> None:
    """Image names that hold in the copy; those that left the image folder become absolute."""
    prefix = folders[root]
    for image in data['images']:
        name = image['file_name']
        if prefix is None or Path(name).is_absolute() or '..' in Path(name).parts:
            image['file_name'] = os.path.normpath(root / name)
        else:
            image['file_name'] = prefix + name


@dataclass
class _Repair:
    """The repair of one annotation file, from what a check has marked in it."""

    table: Table
    classes: Sequence[str] | None
    told: bool  # the classes are those of a config, not of another file
    changes: list[dict] = field(default_factory=list)

    def run(self) -> dict:
        table = self.table
        # Not the table's, whose polygons are arrays; it is changed below.
        data = coco_json.read(table.path).data
        if any(code == 'encoding' for code, _ in table.fatal):
            self._note('saved as UTF-8')
        categories, category_of = self._categories(data['categories'])
        images, image_of = self._images(data['images'])
        data['annotations'] = self._annotations(data['annotations'], images, image_of, category_of)
        data['images'] = [images[row] for row in sorted(images)]
        data['categories'] = categories
        if not data['images'] or not data['annotations']:
            raise UserError(
                f'{table.path}: nothing is left after the repair; nothing was written',
                [f'{n:,} x {c}' for c, n in Counter(c['change'] for c in self.changes).items()],
                'look at the findings without --fix first',
            )
        return data

    def _note(self, change: str, image: int | None = None, annotation: int | None = None) -> None:
        table = self.table
        if annotation is not None and image is None and table.image_rows[annotation] >= 0:
            image = int(table.image_rows[annotation])
        self.changes.append(
            {
                'split': table.name,
                'change': change,
                'image': None if image is None else table.files[image],
                'annotation': None
                if annotation is None
                else table.annotations[annotation].get('id', f'position {annotation}'),
            }
        )

    def _renumber(self, unit: str) -> bool:
        codes = [f'{unit}-id-{what}' for what in _BAD_IDS] + ['annotation-id-zero'] * (unit == 'annotation')
        return bool(self.table.marks.marked(*codes))

    def _categories(self, entries: list[dict]) -> tuple[list[dict], dict[int, int]]:
        """The categories in the expected order, and the new id by old row."""
        names: dict[str, str] = {}
        for row in sorted(self.table.marks.marked('category-id-duplicate')):
            names = names or {repr(e.get('id')): e['name'] for e in reversed(entries) if e}
            key = repr(entries[row]['id'])
            if names[key] != entries[row]['name']:
                raise UserError(
                    f'{self.table.path}: category id {key} is that of {names[key]!r} '
                    f'and of {entries[row]["name"]!r}; nothing was written',
                    cure='only you know which objects are which',
                )
        kept: dict[str, dict] = {}
        for entry in entries:
            if entry and kept.setdefault(entry['name'], dict(entry)) != entry:
                self._note(f'category {entry["name"]!r} merged with the one of that name')
        order = list(self.classes or kept)
        counts = Counter(self.table.category_rows.tolist())
        extra = [e['name'] for row, e in enumerate(entries) if e and e['name'] not in order and counts[row]]
        if extra and not self.told:
            raise UserError(
                f'{self.table.path} has objects of classes that the first file has not; nothing was written',
                extra,
                'correct the names, add the classes to the first file, or pass --config to keep its classes only',
            )
        if order != list(kept):
            self._note('categories put into the expected order')
        if self._renumber('category'):
            self._note('category ids numbered anew')
            for number, entry in enumerate(kept.values(), 1):
                entry['id'] = number
        highest = max((e['id'] for e in kept.values()), default=0)
        for name in order:
            if name not in kept:
                highest += 1
                kept[name] = {'id': highest, 'name': name}
        new = {name: kept[name]['id'] for name in order}
        return [kept[name] for name in order], {
            row: new[e['name']] for row, e in enumerate(entries) if e and e['name'] in new
        }

    def _images(self, entries: list[dict]) -> tuple[dict[int, dict], dict[int, int]]:
        """Images that stay, by row, and the new id by row."""
        table, marks = self.table, self.table.marks
        dropped = {row: code for code in _BAD_IMAGES for row in marks.marked(code)}
        dropped |= {row: 'no JSON object' for row, entry in enumerate(entries) if not entry}
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
            images[row]['width'], images[row]['height'] = look_at(table.image_path(row)).upright
            self._note('size read from the image', row)
        if self._renumber('image'):
            self._note('image ids numbered anew')
            for number, row in enumerate(sorted(images), 1):
                images[row]['id'] = number
        return images, {row: image['id'] for row, image in images.items()}

    def _annotations(
        self, entries: list[dict], images: dict[int, dict], image_of: dict[int, int], category_of: dict[int, int]
    ) -> list[dict]:
        table, marks = self.table, self.table.marks
        dropped = {row: code for code in reversed(_BAD_OBJECTS) for row in marks.marked(code)}
        turned, later = self._turn(entries, images, dropped)
        shapes, boxes = marks.marked(*_BAD_SHAPES), marks.marked(*_BAD_BOXES)
        areas, outside = marks.marked(*_BAD_AREAS), marks.marked('polygon-far', 'polygon-over-edge')
        crowd = marks.marked('iscrowd-value')
        kept = []
        for row, entry in enumerate(entries):
            image, category = int(table.image_rows[row]), int(table.category_rows[row])
            reason = dropped.get(row)
            if not entry:
                reason = 'no JSON object'
            elif reason is None and image not in images:
                reason = 'its image is dropped'
            elif reason is None and category not in category_of:
                reason = 'its class is not expected'
            elif row in crowd and not isinstance(entry['iscrowd'], bool):
                reason = 'iscrowd-value'
            new = row in turned or row in shapes or row in outside
            if reason is None and row not in later and (new or row in boxes or row in areas):
                reason = self._reshape(row, entry, images[image], row in shapes, row in outside) or self._measure(
                    row, entry, images[image], new or row in boxes, new or row in areas
                )
            if reason:
                self._note(f'object dropped: {reason}', annotation=row)
                continue
            if type(entry.get('iscrowd')) is not int:
                entry['iscrowd'] = int(bool(entry.get('iscrowd', 0)))
                self._note('iscrowd set', annotation=row)
            entry['image_id'], entry['category_id'] = image_of[image], category_of[category]
            kept.append(entry)
        if self._renumber('annotation'):
            self._note('annotation ids numbered anew from 1')
            for number, entry in enumerate(kept, 1):
                entry['id'] = number
        return kept

    def _reshape(self, row: int, entry: dict, image: dict, shape: bool, outside: bool) -> str | None:
        """Put a mask right; the reason if nothing of it is left."""
        if shape:
            entry['segmentation'] = usable_polygons(entry['segmentation'])
            if not entry['segmentation']:
                return 'no usable polygon'
            self._note('unusable polygons dropped', annotation=row)
        if outside:
            entry['segmentation'] = clip(entry['segmentation'], image['width'], image['height'])
            if not entry['segmentation']:
                return 'outside the image'
            self._note('mask clipped to the image', annotation=row)
        return None

    def _measure(self, row: int, entry: dict, image: dict, box: bool, area: bool) -> str | None:
        """Make box and area from the mask; the reason if it has no pixel."""
        made, pixels = measure(entry['segmentation'], image['width'], image['height'])
        if not pixels or min(made[2:]) <= 0:
            return 'mask-empty'
        if box:
            entry['bbox'] = made
            self._note('bbox made from the mask', annotation=row)
        if area:
            entry['area'] = pixels
            self._note('area made from the mask', annotation=row)
        return None

    def _turn(self, entries: list[dict], images: dict[int, dict], dropped: dict[int, str]) -> tuple[set[int], set[int]]:
        """Give images that EXIF turns their true size.

        Returns:
            Rows of objects turned with their image; rows of objects that were judged by the wrong
            size, for the next pass to see to.
        """
        table, turned, later = self.table, set(), set()
        for image in self.table.marks.marked('image-exif') & set(images):
            facts = look_at(table.image_path(image))
            entry, stored = images[image], (facts.width, facts.height)
            entry['width'], entry['height'] = facts.upright
            rows = np.flatnonzero(table.image_rows == image).tolist()
            if any(_beyond(entries[row], *stored) for row in rows):
                # Objects reach out of the stored frame, so they were drawn on the upright image.
                self._note('size put right, the masks are upright already', image)
                later.update(rows)
                for row in rows:
                    if dropped.get(row) in ('rle-size', 'mask-empty'):
                        del dropped[row]
                continue
            self._note('size put right, masks turned like the image', image)
            for row in rows:
                if row not in dropped:
                    entries[row]['segmentation'] = _turned(entries[row]['segmentation'], facts.turned, *stored)
                    turned.add(row)
        return turned, later


def _turned(shape: list | dict, orientation: int, width: int, height: int) -> list | dict:
    """A segmentation of the stored image as one of the upright image."""
    polygons = usable_polygons(shape)
    if polygons is not None:
        return turn_polygons(polygons, orientation, width, height)
    if not isinstance(shape, dict):
        return shape
    mask = turn_mask(mask_api.decode(to_rle(shape, width, height)), orientation)
    return as_json(mask_api.encode(np.asfortranarray(mask)))


def _beyond(entry: dict, width: int, height: int) -> bool:
    """Whether a mask reaches out of the stored frame, or says that it is not of it."""
    shape = entry.get('segmentation')
    if isinstance(shape, dict):
        return shape.get('size') == [width, height]
    points = [value for part in usable_polygons(shape) or () for value in part]
    xs, ys = points[::2], points[1::2]
    return bool(points) and (max(xs) > width + BOX_TOLERANCE_PX or max(ys) > height + BOX_TOLERANCE_PX)
