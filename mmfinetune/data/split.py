"""Split a COCO file: each class in its share, series of images whole."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfinetune.data import coco_json
from mmfinetune.data.layout import SPLITS, WHOLE, find_source
from mmfinetune.data.stratify import best_of
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, json_bytes

NO_OBJECTS = '(no objects)'
# Below this many images a share is mostly rounding: 1 of 4 images is 25 %, and 15 % cannot be had.
_FEW = 20
_MAX_ROWS = 100


@dataclass(frozen=True)
class Report:
    """How a split came out.

    Attributes:
        files: The file of each split.
        names: Classes in the file's order, then the images without objects.
        images: Number of images with the class, (splits, names).
        objects: Number of objects, crowd regions left out, (splits, names).
        sizes: Number of images of each split.
        ratios: Share wanted of each split; they sum to 1.
        groups: Number of series, (splits, names); single images where nothing is grouped.
        series: Text on the grouping; empty without one.
        removed: Files of an earlier split that this one does not have.
    """

    files: dict[str, Path]
    names: list[str]
    images: np.ndarray
    objects: np.ndarray
    sizes: np.ndarray
    ratios: np.ndarray
    groups: np.ndarray
    series: str = ''
    removed: Sequence[Path] = ()

    def text(self) -> str:
        """Table of class x split, the largest deviation, and what could not be spread."""
        lines = [
            self._table(),
            f'Wanted: {_percent(self.ratios)} % of the images' + (f'; {self.series}' if self.series else ''),
        ]
        lines += self._deviations() + self._rare()
        lines += [f'removed: {path} (of the earlier split)' for path in self.removed]
        return '\n'.join(lines)

    def _shares(self) -> np.ndarray:
        return self.images / np.maximum(self.images.sum(0), 1)

    def _table(self) -> str:
        rows = [['class', *(f'{s} {what}' for s in self.files for what in ('objects', 'images', '%'))]]
        body = np.flatnonzero(self.images.sum(0))
        deviation = np.abs(self._shares() - self.ratios[:, None]).max(0)
        shown = (
            body if len(body) <= _MAX_ROWS else np.sort(body[np.argsort(-deviation[body], kind='stable')[:_MAX_ROWS]])
        )
        columns = [(self.names[i], self.objects[:, i], self.images[:, i]) for i in shown]
        for name, objects, images in (*columns, ('all', self.objects.sum(1), self.sizes)):
            row = [name]
            for s in range(len(self.files)):
                share = 100 * images[s] / images.sum()
                row += [f'{objects[s]:,}', f'{images[s]:,}', f'{share:.1f}']
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            '  '.join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        if len(shown) < len(body):
            lines.insert(-1, f'… and {len(body) - len(shown):,} classes nearer to their share')
        return '\n'.join(lines)

    def _deviations(self) -> list[str]:
        """The largest one, and if that is of a rare class the largest of the others too."""
        totals = self.images.sum(0)
        off = np.where(totals, np.abs(self._shares() - self.ratios[:, None]), -1)
        lines = []
        for which, allowed in (('', totals > 0), (f' among those with {_FEW} images or more', totals >= _FEW)):
            if not allowed.any():
                continue
            s, c = np.unravel_index(np.argmax(np.where(allowed, off, -1)), off.shape)
            split = list(self.files)[s]
            lines.append(
                f'Largest deviation{which}: {self.names[c]} has {self.images[s, c]:,} of '
                f'{totals[c]:,} images in {split}, {100 * self._shares()[s, c]:.1f} % instead of '
                f'{100 * self.ratios[s]:.1f} %'
            )
            if totals[c] >= _FEW:
                break
        return lines

    def _rare(self) -> list[str]:
        lines, groups = [], self.groups.sum(0)
        unit = 'series' if self.series else 'images'
        for c, name in enumerate(self.names[:-1]):
            absent = [s for s, n in zip(self.files, self.images[:, c], strict=True) if not n]
            if len(absent) == len(self.files):
                lines.append(f'{name}: no object in the whole file')
            elif absent:
                why = 'rarer classes or whole series are in its images'
                if groups[c] < len(self.files):
                    why = f'it has only {groups[c]} ' + ('image' if unit == 'images' and groups[c] == 1 else unit)
                lines.append(f'{name}: none in {" and ".join(absent)}, since {why}')
        return lines[:_MAX_ROWS] + (
            [f'… and {len(lines) - _MAX_ROWS:,} more such classes'] if len(lines) > _MAX_ROWS else []
        )


def shares(ratios: Sequence[float]) -> np.ndarray:
    """Ratios that sum to 1, for train, val and, unless 0 or absent, test.

    Raises:
        UserError: Not 2 or 3 numbers, negative ones, or none for train or val.
    """
    given = ' '.join(f'{r:g}' for r in ratios)
    cure = 'e.g. --ratios 70 15 15, or --ratios 80 20 for train and val only'
    if len(ratios) not in (2, 3):
        raise UserError(f'--ratios takes 2 or 3 numbers (train, val, test), not {given!r}', cure=cure)
    if any(not math.isfinite(r) or r < 0 for r in ratios) or not all(ratios[:2]):
        raise UserError(f'--ratios {given}: train and val need shares above 0, test 0 or more', cure=cure)
    values = np.array([r for r in ratios if r > 0], float)
    return values / values.sum()


def series_of(names: Sequence[str], pattern: str | None) -> tuple[list[tuple[str, str]], str]:
    """The series of each file name.

    Args:
        names: File names.
        pattern: Regular expression, searched for in the name; its first group, or else all that it
            matches, names the series. An image that does not match is a series by itself.

    Returns:
        A key for each name, and a sentence on what was grouped; empty without a pattern.

    Raises:
        UserError: No regular expression, or one that matches nothing.
    """
    if pattern is None:
        return [('', name) for name in names], ''
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f'--group-by {pattern!r} is no regular expression: {error}',
            cure=r"e.g. --group-by '^(\w+)_\d+' for names as part7_003.jpg",
        ) from None
    keys, unmatched = [], 0
    for name in names:
        match = regex.search(name)
        key = match and match.group(1 if regex.groups else 0)
        if key:
            keys.append((key, ''))
        else:
            keys.append(('', name))
            unmatched += 1
    if unmatched == len(names):
        raise UserError(
            f'--group-by {pattern!r} matches none of the {len(names):,} file names, such as',
            list(names[:3]),
            'correct the expression, or leave it out',
        )
    found = len({k for k in keys if not k[1]})
    alone = f', {unmatched:,} images match nothing and stand alone' if unmatched else ''
    return keys, f'{found:,} series by {pattern!r}{alone}'


def split_file(
    source: Path,
    ratios: Sequence[float] = (70, 15, 15),
    seed: int = 0,
    group_by: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Write ``instances_<split>.json`` for each split of a COCO file.

    Ids, file names, all categories and whatever else the file holds stay as they are. What comes
    out depends on file names, classes, ratios and seed, not on the order within the file. Crowd
    regions are no objects: they decide nothing, and an image with nothing else has none.

    Args:
        source: COCO JSON, or a folder with one in ``annotations/``.
        ratios: See `shares`.
        seed: From 0 on.
        group_by: See `series_of`.
        out: Folder of the new files; that of the source by default.
        overwrite: Whether to replace the files of an earlier split, all of them.

    Raises:
        UserError: Bad input or arguments; nothing is written then.
    """
    wanted = shares(ratios)
    if seed < 0:
        raise UserError(f'--seed {seed}: must be 0 or more')
    path = find_source(source)
    out = out or path.parent
    targets = {split: out / f'instances_{split}.json' for split in SPLITS}
    files = dict(list(targets.items())[: len(wanted)])
    earlier = [target for target in targets.values() if target.exists()]
    if any(target.resolve() == path.resolve() for target in earlier):
        raise UserError(
            f'{path} is the source, and a file of the split would replace it',
            cure=f'rename it to {WHOLE}, or pass another folder with --out',
        )
    if earlier and not overwrite:
        raise UserError(
            'There are files of an earlier split:',
            map(str, earlier),
            'replace all of them with --overwrite, or pass another folder with --out',
        )
    data = coco_json.read(path).require(unique_files=True).data
    images = sorted(data['images'], key=lambda image: image['file_name'])
    keys, series = series_of([image['file_name'] for image in images], group_by)
    if len(set(keys)) < len(wanted):
        raise UserError(
            f'{path}: {len(images)} images'
            + (f' in {len(set(keys))} series' if series else '')
            + f' cannot fill {len(wanted)} splits',
            cure='a series is never torn: group less, or take fewer splits'
            if series
            else 'take fewer splits, or add images',
        )

    names = [c['name'] for c in data['categories']]
    objects = _objects(data, images)
    number = {key: i for i, key in enumerate(sorted(set(keys)))}
    group_of = np.array([number[key] for key in keys])
    # By name, or the order of the categories would settle ties.
    by_name = [*np.argsort(np.array(names, str), kind='stable'), len(names), len(names) + 1]
    per_group = _sums(np.column_stack([objects > 0, objects.sum(1) == 0, np.ones(len(images))]), group_of)
    objects_per_group = _sums(np.column_stack([objects, np.zeros((len(images), 2))]), group_of)
    split_of_group = best_of(per_group[:, by_name], objects_per_group[:, by_name], wanted, seed)

    split_of = {image['id']: split for image, split in zip(images, split_of_group[group_of].tolist(), strict=True)}
    try:
        contents = {
            target: json_bytes(
                {
                    **data,
                    'images': [i for i in data['images'] if split_of[i['id']] == s],
                    'annotations': [a for a in data['annotations'] if split_of[a['image_id']] == s],
                }
            )
            for s, target in enumerate(files.values())
        }
    except ValueError as error:
        raise UserError(
            f'{path}: a number in it is NaN or infinite ({error})', cure='`python tools/check_dataset.py` says where'
        ) from None
    atomic_write_all(contents)
    # Left there, its images would be in the new files too, and nobody would know.
    removed = [target for target in earlier if target not in contents]
    for target in removed:
        target.unlink()

    def by_split(values: np.ndarray) -> np.ndarray:
        return _sums(values, split_of_group, len(wanted))

    found = by_split(per_group)
    return Report(
        files,
        [*names, NO_OBJECTS],
        found[:, :-1],
        by_split(objects_per_group)[:, :-1],
        found[:, -1],
        wanted,
        by_split((per_group > 0).astype(int))[:, :-1],
        series,
        removed,
    )


def _objects(data: dict, images: list[dict]) -> np.ndarray:
    """Number of objects of each category in each image, (images, categories)."""
    row = {image['id']: i for i, image in enumerate(images)}
    column = {category['id']: i for i, category in enumerate(data['categories'])}
    counts = np.zeros((len(row), len(column)), np.int32)
    pairs = np.array(
        [(row[a['image_id']], column[a['category_id']]) for a in data['annotations'] if not a.get('iscrowd')], np.int64
    ).reshape(-1, 2)
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    return counts


def _sums(values: np.ndarray, index: np.ndarray, length: int | None = None) -> np.ndarray:
    """Sums of the rows that have the same index, (length, columns)."""
    sums = np.zeros((length or index.max() + 1, values.shape[1]), np.int64)
    np.add.at(sums, index, values.astype(np.int64))
    return sums


def _percent(ratios: np.ndarray) -> str:
    return ' / '.join(f'{100 * r:.4g}' for r in ratios)
