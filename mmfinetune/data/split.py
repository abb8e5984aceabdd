"""Split a COCO file: each class in its share, series of images whole."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data import coco_json
from mmfinetune.data.layout import SPLITS, WHOLE, file_name, find_source
from mmfinetune.data.stratify import MAX_SEED, best_of
from mmfinetune.utils import text
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, json_bytes

NO_OBJECTS = '(no objects)'
# Below this many images a share is mostly rounding: 1 of 4 images is 25 %, and 15 % is not possible.
_FEW = 20
_MAX_ROWS = 100


@dataclass(frozen=True)
class Report:
    """How a split came out.

    Attributes:
        files: The file of each split.
        names: Classes in the file's order, then the images without objects.
        images: Number of images with the class, (splits, names).
        objects: Number of objects without crowd regions, (splits, names).
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
        wanted = f'Wanted: {" / ".join(f"{100 * r:.4g}" for r in self.ratios)} % of the images'
        removed = [f'removed: {path} (of the earlier split)' for path in self.removed]
        wanted += f'; {self.series}' if self.series else ''
        return '\n'.join([self._table(), wanted, *self._deviations(), *self._rare(), *removed])

    @property
    def _off(self) -> np.ndarray:
        """How far each share is from the one wanted, (splits, names)."""
        return np.abs(self.images / np.maximum(self.images.sum(0), 1) - self.ratios[:, None])

    def _table(self) -> str:
        shown = body = np.flatnonzero(self.images.sum(0))
        if len(body) > _MAX_ROWS:
            shown = np.sort(body[np.argsort(-self._off.max(0)[body], kind='stable')[:_MAX_ROWS]])
        rows: list[list[str]] = [['class', *(f'{s} {what}' for s in self.files for what in ('objects', 'images', '%'))]]
        columns = [(self.names[i], self.objects[:, i], self.images[:, i]) for i in shown]
        for name, objects, images in (*columns, ('all', self.objects.sum(1), self.sizes)):
            row = [name]
            for count, number in zip(objects, images, strict=True):
                row += [f'{count:,}', f'{number:,}', f'{100 * number / images.sum():.1f}']
            rows.append(row)
        lines = text.table(rows).split('\n')
        if len(shown) < len(body):
            lines.insert(-1, f'… and {len(body) - len(shown):,} classes nearer to their share')
        return '\n'.join(lines)

    def _deviations(self) -> list[str]:
        """The largest one, and if that is of a rare class the largest of the others too."""
        totals = self.images.sum(0)
        lines = []
        for which, allowed in (('', totals > 0), (f' among those with {_FEW} images or more', totals >= _FEW)):
            if not allowed.any():
                continue
            off = np.where(allowed, self._off, -1)
            s, c = np.unravel_index(np.argmax(off), off.shape)
            count = self.images[s, c]
            lines.append(
                f'Largest deviation{which}: {self.names[c]} has {count:,} of {totals[c]:,} images in '
                f'{list(self.files)[s]}, {100 * count / totals[c]:.1f} % instead of {100 * self.ratios[s]:.1f} %'
            )
            if totals[c] >= _FEW:
                break
        return lines

    def _rare(self) -> list[str]:
        lines = []
        for name, images, groups in zip(self.names[:-1], self.images.T, self.groups.sum(0), strict=False):
            absent = [split for split, count in zip(self.files, images, strict=True) if not count]
            if len(absent) == len(self.files):
                lines.append(f'{name}: no object in the whole file')
            elif absent:
                why = 'rarer classes or whole series are in its images'
                if groups < len(self.files):
                    unit = text.plural(groups, 'series', 'series') if self.series else text.plural(groups, 'image')
                    why = f'it has only {unit}'
                lines.append(f'{name}: none in {" and ".join(absent)}, since {why}')
        if len(lines) > _MAX_ROWS:
            lines[_MAX_ROWS:] = [f'… and {len(lines) - _MAX_ROWS:,} more such classes']
        return lines


def shares(ratios: Sequence[float]) -> np.ndarray:
    """Ratios that sum to 1, for train, val and, unless 0 or absent, test.

    Raises:
        UserError: Not 2 or 3 numbers, negative ones, or none for train or val.
    """
    if len(ratios) not in (2, 3) or not all(0 <= r < math.inf for r in ratios) or 0 in ratios[:2]:
        raise UserError('split-ratios', ratios=' '.join(f'{r:g}' for r in ratios))
    values = np.array([r for r in ratios if r > 0], float)
    return values / values.sum()


def series_of(names: Sequence[str], pattern: str | None) -> tuple[list[tuple[str, str]], str]:
    """The series of each file name.

    Args:
        names: File names.
        pattern: Regular expression, searched for in the name; its first group, or else all that it
            matches, names the series. An image that does not match is a series of its own.

    Returns:
        A key for each name, and a sentence on what was grouped; empty without a pattern.

    Raises:
        UserError: The pattern is not a regular expression, or matches nothing.
    """
    if pattern is None:
        return [('', name) for name in names], ''
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError('split-pattern', pattern=pattern, reason=str(error)) from None
    keys: list[tuple[str, str]] = []
    for name in names:
        match = regex.search(name)
        series = match and match.group(1 if regex.groups else 0)
        keys.append((series, '') if series else ('', name))
    alone = sum(not series for series, _ in keys)
    if alone == len(names):
        raise UserError('split-pattern-matches-nothing', problems=names[:3], pattern=pattern, count=len(names))
    sentence = f'{len({series for series, _ in keys if series}):,} series by {pattern!r}'
    if alone:
        sentence += f', {alone:,} images match nothing and stand alone'
    return keys, sentence


def split_file(
    source: Path,
    ratios: Sequence[float] = (70, 15, 15),
    seed: int = 0,
    group_by: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Write ``instances_<split>.json`` for each split of a COCO file.

    Ids, file names, all categories and whatever else the file holds stay as they are. The result
    depends on file names, classes, ratios and seed, not on the order within the file. Crowd
    regions are not objects: they decide nothing, and an image with nothing else has none.

    Args:
        source: COCO JSON, or a folder with one in ``annotations/``.
        ratios: See `shares`.
        seed: From 0 to `MAX_SEED`.
        group_by: See `series_of`.
        out: Folder of the new files; that of the source by default.
        overwrite: Whether to replace the files of an earlier split, all of them.

    Raises:
        UserError: Bad input or arguments; nothing is written then.
    """
    wanted = shares(ratios)
    if not 0 <= seed <= MAX_SEED:
        raise UserError('split-seed', seed=seed, highest=MAX_SEED)
    path = find_source(source)
    targets = {split: (out or path.parent) / file_name(split) for split in SPLITS}
    earlier = _earlier(path, targets.values(), overwrite)
    files = dict(list(targets.items())[: len(wanted)])

    coco = coco_json.read(path).require(unique_files=True)
    images = sorted(coco.images, key=lambda image: image['file_name'])
    keys, series = series_of([image['file_name'] for image in images], group_by)
    number = {key: i for i, key in enumerate(sorted(set(keys)))}
    _check_enough(path, len(images), len(number), len(wanted), bool(series))
    group_of = np.array([number[key] for key in keys])
    images_per_group, objects_per_group = _per_group(coco, images, group_of)
    # By name, or the order of the categories would settle ties.
    by_name = [*np.argsort(np.array(coco.classes, str), kind='stable'), len(coco.classes), len(coco.classes) + 1]
    split_of_group = best_of(images_per_group[:, by_name], objects_per_group[:, by_name], wanted, seed)

    split_of = {image['id']: split for image, split in zip(images, split_of_group[group_of].tolist(), strict=True)}
    _write(coco, files, split_of)
    removed = [target for target in earlier if target not in files.values()]
    for target in removed:
        # Left there, its images would be in the new files too, and nobody would know.
        target.unlink()
    counted = (images_per_group, objects_per_group, images_per_group > 0)
    found, objects, groups = (_sums(counts, split_of_group, len(wanted)) for counts in counted)
    names, sizes = [*coco.classes, NO_OBJECTS], found[:, -1]
    return Report(files, names, found[:, :-1], objects[:, :-1], sizes, wanted, groups[:, :-1], series, removed)


def _earlier(source: Path, targets: Iterable[Path], overwrite: bool) -> list[Path]:
    """The targets that already exist; UserError if one is the source, or they must not be replaced."""
    earlier = [target for target in targets if target.exists()]
    if any(target.resolve() == source.resolve() for target in earlier):
        raise UserError('split-source', path=source, whole=WHOLE)
    if earlier and not overwrite:
        raise UserError('split-exists', problems=earlier)
    return earlier


def _check_enough(path: Path, images: int, groups: int, splits: int, grouped: bool) -> None:
    if groups < splits and grouped:
        raise UserError('split-few-series', path=path, images=images, groups=groups, splits=splits)
    if groups < splits:
        raise UserError('split-few-images', path=path, images=images, splits=splits)


def _write(coco: coco_json.Coco, files: dict[str, Path], split_of: dict[Any, int]) -> None:
    contents = {}
    try:
        for split, target in enumerate(files.values()):
            images = [i for i in coco.images if split_of[i['id']] == split]
            annotations = [a for a in coco.annotations if split_of[a['image_id']] == split]
            contents[target] = json_bytes({**coco.data, 'images': images, 'annotations': annotations})
    except ValueError as error:
        raise UserError('split-number', path=coco.path, reason=str(error)) from None
    atomic_write_all(contents)


def _per_group(coco: coco_json.Coco, images: list[dict], group_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and objects, (groups, classes + 2): of each class, without objects, and in all."""
    row = {image['id']: i for i, image in enumerate(images)}
    column = {category['id']: i for i, category in enumerate(coco.categories)}
    objects = np.zeros((len(row), len(column) + 2), np.int64)
    for annotation in coco.annotations:
        if not annotation.get('iscrowd'):
            objects[row[annotation['image_id']], column[annotation['category_id']]] += 1
    present = objects > 0
    present[:, -2], present[:, -1] = ~present.any(1), True
    return _sums(present, group_of), _sums(objects, group_of)


def _sums(values: np.ndarray, index: np.ndarray, length: int | None = None) -> np.ndarray:
    """Sums of the rows that have the same index, (length, columns)."""
    sums = np.zeros((length or index.max() + 1, values.shape[1]), np.int64)
    np.add.at(sums, index, values)
    return sums
