"""Annotation files and COCO result files to evaluate, checked row by row. No torch here."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmfinetune.utils.errors import UserError

_KEYS = {'segm': 'segmentation', 'bbox': 'bbox'}
_SHOWN = 5  # places of one problem; the same mistake is mostly in all rows


@dataclass(frozen=True)
class Truth:
    """A COCO annotation file that can be evaluated against.

    Attributes:
        path: The file.
        data: Its content; ``iscrowd`` is set in all annotations.
    """

    path: Path
    data: dict[str, Any] = field(repr=False)

    @cached_property
    def images(self) -> dict[int, dict]:
        """By id."""
        return {i['id']: i for i in self.data['images']}

    @cached_property
    def names(self) -> dict[int, str]:
        """Of the classes by id, in the order of the file, which is that of the labels."""
        return {c['id']: c['name'] for c in self.data['categories']}

    @cached_property
    def counts(self) -> dict[int, int]:
        """Objects of each class by id, crowd regions left out."""
        found = Counter(a['category_id'] for a in self.data['annotations'] if not a['iscrowd'])
        return {c: found[c] for c in self.names}

    @property
    def crowds(self) -> int:
        """Number of crowd regions."""
        return sum(bool(a['iscrowd']) for a in self.data['annotations'])

    def rle(self, annotation: Mapping[str, Any]) -> dict:
        """The mask of an annotation, given as polygons or run lengths."""
        from pycocotools import mask as mask_api

        image, shape = self.images[annotation['image_id']], annotation['segmentation']
        size = image['height'], image['width']
        if isinstance(shape, list):
            return mask_api.merge(mask_api.frPyObjects(shape, *size))
        if isinstance(shape['counts'], list):
            return mask_api.frPyObjects(shape, *size)
        return shape


def read_truth(path: Path, masks: bool = True) -> Truth:
    """Read an annotation file.

    Args:
        path: COCO JSON.
        masks: Whether masks will be evaluated.

    Raises:
        UserError: The file is missing or broken; all problems of the first kind found.
    """
    data = _read_json(path, 'annotation file')
    parts = ('images', 'annotations', 'categories')
    lacking = [p for p in parts if not isinstance(data, dict) or not isinstance(data.get(p), list)]
    if lacking:
        raise UserError(
            f'{path} is no COCO annotation file: no list of {", ".join(lacking)}',
            cure='pass the file with the ground truth, e.g. instances_val.json',
        )
    for part, keys in (
        ('images', ('id', 'width', 'height', 'file_name')),
        ('categories', ('id', 'name')),
        ('annotations', ('id', 'image_id', 'category_id', 'bbox', 'area')),
    ):
        problems = _Problems()
        for number, item in enumerate(data[part], 1):
            missing = [k for k in keys if not isinstance(item, dict) or k not in item]
            if missing:
                problems.add(f'without {", ".join(missing)}', f'number {number}')
        problems.raise_in(f'{path}: {part} that cannot be used:', 'mend the annotation file')
        twice = [i for i, n in Counter(item['id'] for item in data[part]).items() if n > 1]
        if twice:
            raise UserError(f'{path}: {part} with the same id:', [f'id {i}' for i in twice], 'number them anew')
    if not data['images'] or not data['categories']:
        raise UserError(
            f'{path} lists no {"categories" if data["images"] else "images"}',
            cure='pass the file with the ground truth of the split',
        )
    truth = Truth(
        path, {**data, 'annotations': [{**a, 'iscrowd': int(a.get('iscrowd', 0))} for a in data['annotations']]}
    )
    problems = _Problems()
    for a in truth.data['annotations']:
        where = f'id {a["id"]}'
        if a['id'] == 0:
            problems.add('id 0, which COCO evaluation takes for "no match"', where)
        if a['image_id'] not in truth.images:
            problems.add('of an image that is not in the file', where)
        if a['category_id'] not in truth.names:
            problems.add('of a category that is not in the file', where)
        shape = a.get('segmentation')
        if masks and not shape:
            problems.add('without a segmentation', where)
        elif masks and isinstance(shape, dict) and a['image_id'] in truth.images:
            image = truth.images[a['image_id']]
            if list(shape.get('size', ())) != [image['height'], image['width']]:
                problems.add('whose mask has another size (height, width) than its image', where)
    problems.raise_in(
        f'{path}: annotations that cannot be evaluated:',
        'mend the annotation file' + (', or evaluate boxes alone: --boxes FILE' if masks else ''),
    )
    if len(set(truth.names.values())) < len(truth.names):
        raise UserError(
            f'{path}: categories with the same name:',
            [n for n, k in Counter(truth.names.values()).items() if k > 1],
            'give each its own name',
        )
    return truth


def read_rows(path: Path) -> list:
    """The content of a COCO result file, to be checked by `checked_rows`.

    Raises:
        UserError: Missing, no JSON, no list, or empty.
    """
    rows = _read_json(path, 'file of predictions')
    if not isinstance(rows, list):
        raise UserError(
            f'{path} holds no predictions: a COCO result file is a list',
            cure='pass the list that was predicted, not a data set'
            if isinstance(rows, dict) and 'annotations' in rows
            else 'pass a file such as predictions.segm.json',
        )
    if not rows:
        raise UserError(
            f'{path} is an empty list: nothing was predicted, so every AP is 0',
            cure='check that the model ran on these images, and its score threshold',
        )
    return rows


def holds(rows: Sequence[Any], kind: str) -> bool:
    """Whether rows have masks (``'segm'``) or boxes (``'bbox'``)."""
    return any(isinstance(row, dict) and row.get(_KEYS[kind]) for row in rows)


def checked_rows(path: Path, rows: Sequence[Any], truth: Truth, kind: str) -> list[dict]:
    """The rows of a result file that can be evaluated.

    Args:
        path: Where they are from.
        rows: Dicts with ``image_id``, ``category_id``, ``score`` and ``segmentation`` (run
            lengths) or ``bbox`` (left, top, width, height in px). Where they have a ``file_name``
            it must be that of the image: ids alone do not tell one split from another.
        truth: What they are to be held against.
        kind: ``'segm'`` or ``'bbox'``: what to take of each row. The other is left out, since
            COCO's areas would be those of the boxes where a mask has one.

    Raises:
        UserError: Of other images or classes, or broken; all problems.
    """
    key = _KEYS[kind]
    if not holds(rows, kind):
        other = 'boxes: pass it with --boxes' if kind == 'segm' and holds(rows, 'bbox') else 'something else'
        raise UserError(f'{path} has no {key} in any row; it holds {other}')
    _check_ids(path, rows, truth)
    problems = _Problems()
    clean = []
    for number, row in enumerate(rows, 1):
        problem = _row_problem(row, key)
        if problem:
            problems.add(problem, f'row {number}')
            continue
        image, value = truth.images[row['image_id']], row[key]
        if 'file_name' in row and Path(str(row['file_name'])).name != Path(image['file_name']).name:
            problems.add(
                'of another image than the id says, so of another split?',
                f'row {number} of {row["file_name"]}, image {row["image_id"]} is {image["file_name"]}',
            )
        clean.append(
            {'image_id': row['image_id'], 'category_id': row['category_id'], 'score': float(row['score']), key: value}
        )
        if kind == 'segm' and list(value['size']) != [image['height'], image['width']]:
            problems.add(
                'whose mask has another size (height, width) than its image',
                f'row {number} {list(value["size"])} in image {row["image_id"]} of '
                f'[{image["height"]}, {image["width"]}]',
            )
    problems.raise_in(
        f'{path}: predictions that cannot be evaluated against {truth.path}:',
        'pass the annotation file of the split that was predicted with --ann, or mend what wrote the file',
    )
    if kind == 'segm':
        _check_run_lengths(path, clean)
    return clean


def image_folder(truth: Truth, root: Path | None) -> Path | None:
    """The folder that the file names of the images are relative to.

    Args:
        truth: The images.
        root: Given by the user; otherwise the folders around the annotation file are tried.

    Returns:
        None if no folder was given and none is found.

    Raises:
        UserError: The given folder lacks images.
    """
    names = [i['file_name'] for i in truth.data['images']]
    if root is not None:
        lacking = [n for n in names if not (root / n).is_file()]
        if lacking:
            raise UserError(
                f'{root} lacks {len(lacking):,} of {len(names):,} images:',
                [str(root / n) for n in lacking],
                'pass the folder that the file names are relative to with --data-root, '
                'or leave the pictures out: --no-pictures',
            )
        return root
    near = (truth.path.parent, *truth.path.resolve().parents[1:3])
    return next((f for f in near if all((f / n).is_file() for n in names)), None)


def _check_ids(path: Path, rows: Sequence[Any], truth: Truth) -> None:
    """Ids of another split or another numbering are told from single wrong ones."""

    def unknown(key: str, known: Collection, what: str, cure: str) -> None:
        found = Counter(r[key] for r in rows if isinstance(r, dict) and isinstance(r.get(key), (int, str)))
        wrong = {i: n for i, n in found.items() if i not in known}
        if not wrong:
            return
        share = 'none' if len(wrong) == len(found) else f'{len(wrong):,} of {len(found):,}'
        verb = 'of the {} ids is' if share == 'none' else '{} ids are not'
        head = f'{share} {verb.format(f"{len(found):,} {what}" if share == "none" else what)}'
        raise UserError(
            f'{path}: {head} in {truth.path}', [f'{what} id {i!r}: {n:,} predictions' for i, n in wrong.items()], cure
        )

    unknown('image_id', truth.images, 'image', 'pass the annotation file of the split that was predicted, with --ann')
    unknown(
        'category_id',
        truth.names,
        'category',
        'the ids must be those of the annotation file, not label numbers: '
        + ', '.join(f'{i} {n}' for i, n in list(truth.names.items())[:3])
        + ', …',
    )


def _row_problem(row: Any, key: str) -> str | None:
    if not isinstance(row, dict):
        return 'that are no JSON objects'
    missing = [k for k in ('image_id', 'category_id', 'score', key) if k not in row]
    if missing:
        return f'without {", ".join(missing)}'
    if any(isinstance(row[k], bool) or not isinstance(row[k], (int, str)) for k in ('image_id', 'category_id')):
        return 'whose image_id or category_id is no id'
    if not _numbers([row['score']], 1):
        return 'whose score is no number'
    if key == 'bbox':
        if not _numbers(row[key], 4) or min(row[key][2:]) < 0:
            return 'whose bbox is not left, top, width, height'
    elif (
        not isinstance(row[key], dict)
        or not isinstance(row[key].get('counts'), (str, list))
        or not _numbers(row[key].get('size'), 2)
    ):
        return 'whose segmentation is not in run lengths: {"size": [height, width], "counts": …}'
    return None


def _numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


def _check_run_lengths(path: Path, rows: list[dict]) -> None:
    """Let hotcoco decode them: pycocotools reads past the end of damaged ones."""
    from hotcoco import mask as mask_api

    problems = _Problems()
    try:
        mask_api.area([row['segmentation'] for row in rows])
    except (ValueError, TypeError, OverflowError):
        for number, row in enumerate(rows, 1):
            try:
                mask_api.area(row['segmentation'])
            except (ValueError, TypeError, OverflowError) as error:
                problems.add('whose mask is damaged', f'row {number}: {error}')
    problems.raise_in(f'{path}: predictions that cannot be evaluated:', 'mend what wrote the file')
    for row in rows:
        shape = row['segmentation']
        if isinstance(shape['counts'], list):
            rle = mask_api.frPyObjects(shape, *shape['size'])
            row['segmentation'] = {'size': shape['size'], 'counts': rle['counts'].decode()}


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f'There is no {what} {path}', cure='check the path') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}', cure=f'pass the {what}') from None
    except ValueError as error:
        raise UserError(f'{path} is not JSON: {error}', cure=f'pass the {what}, whole') from None


class _Problems:
    """Gathers what is wrong, the places of one kind in one line."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, kind: str, place: str) -> None:
        self._places.setdefault(kind, []).append(place)

    def raise_in(self, message: str, cure: str) -> None:
        """Raise a UserError if there is a problem."""
        if not self._places:
            return
        lines = []
        for kind, places in self._places.items():
            more = f', … ({len(places):,} in all)' if len(places) > _SHOWN else ''
            lines.append(f'{len(places):,} {kind}: {", ".join(places[:_SHOWN])}{more}')
        raise UserError(message, lines, cure)
