"""Ground truth and COCO result rows: rows made of predictions, files of both read and checked. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data import coco_json
from mmfinetune.data.coco_json import Problems
from mmfinetune.data.layout import guess_image_root
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import MOST_JSON, read_json
from mmfinetune.utils.masks import mask_to_rle, to_rle
from mmfinetune.utils.text import is_number

_KEYS = {'segm': 'segmentation', 'bbox': 'bbox'}


@dataclass(frozen=True)
class Truth:
    """A COCO annotation file that can be evaluated against; ``iscrowd`` is set in all annotations of its data."""

    path: Path
    data: dict[str, Any] = field(repr=False)

    @cached_property
    def images(self) -> dict[int, dict]:
        """Images by id."""
        return {i['id']: i for i in self.data['images']}

    @cached_property
    def names(self) -> dict[int, str]:
        """Class names by id, in the order of the file, which is that of the labels."""
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

    def of_images(self, ids: Collection[int]) -> Truth:
        """The ground truth of some of the images."""
        data = {
            'images': [image for image in self.data['images'] if image['id'] in ids],
            'annotations': [a for a in self.data['annotations'] if a['image_id'] in ids],
        }
        return Truth(self.path, self.data | data)

    def rle(self, annotation: Mapping[str, Any]) -> dict:
        """The mask of an annotation, given as polygons or run lengths."""
        image, shape = self.images[annotation['image_id']], annotation['segmentation']
        if isinstance(shape, list):
            # Fewer than three points have no area; pycocotools would take two for a box.
            shape = [polygon for polygon in shape if len(polygon) >= 6] or [[0.0] * 6]
        return to_rle(shape, image['height'], image['width'])


def read_truth(path: Path, masks: bool = True) -> Truth:
    """Read a COCO annotation file.

    Args:
        masks: Whether masks will be evaluated.

    Raises:
        UserError: The file is missing or broken; all problems of the first kind found.
    """
    coco = coco_json.read(path, compact=True)
    coco.require(images=('width', 'height'), annotations=('id', 'bbox', 'area'))
    annotations = [{**a, 'iscrowd': int(bool(a.get('iscrowd')))} for a in coco.annotations]
    truth = Truth(path, {**coco.data, 'annotations': annotations})
    problems = Problems()
    for annotation in annotations if masks else ():
        where, shape = f'id {annotation["id"]}', annotation.get('segmentation')
        if not shape:
            problems.add('truth-no-mask', where)
        elif isinstance(shape, dict):
            image = truth.images[annotation['image_id']]
            if list(shape.get('size', ())) != [image['height'], image['width']]:
                problems.add('truth-mask-size', where)
    if problems:
        raise UserError('truth-masks', problems=problems.lines(), path=path)
    return truth


def result_rows(
    image_id: int,
    category_ids: Sequence[int],
    labels: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray | None = None,
    masks: Sequence[Any] | np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """COCO result rows of one image: ``image_id, category_id, score``, ``bbox`` and ``segmentation``.

    Args:
        category_ids: Category id of each label.
        labels: (N,) class numbers.
        scores: (N,) float32.
        boxes: (N, 4) float32 left, top, right, bottom in px; rows have no ``bbox`` without them.
        masks: (N, H, W) bool, or N run lengths; rows have no ``segmentation`` without them.
    """
    pairs = zip(labels, _shortest(scores), strict=True)
    rows = [{'image_id': image_id, 'category_id': category_ids[label], 'score': score} for label, score in pairs]
    if boxes is not None:
        sizes = _shortest(np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]))
        for row, bbox in zip(rows, sizes, strict=True):
            row['bbox'] = bbox
    if masks is not None:
        for row, mask in zip(rows, masks, strict=True):
            row['segmentation'] = _as_text(mask) if isinstance(mask, Mapping) else mask_to_rle(mask)
    return rows


def read_rows(path: Path) -> list:
    """The content of a COCO result file, to be checked by `checked_rows`.

    Raises:
        UserError: Missing, not JSON, not a list, or empty.
    """
    try:
        rows = read_json(path, MOST_JSON)
    except ValueError as error:
        raise UserError('rows-unreadable', path=path, reason=str(error)) from None
    if not isinstance(rows, list):
        hint = 'pass a file such as predictions.segm.json'
        if isinstance(rows, dict) and 'annotations' in rows:
            hint = 'pass the list that was predicted, not a data set'
        raise UserError('rows-no-list', hint=hint, path=path)
    if not rows:
        raise UserError('rows-empty', path=path)
    return rows


def holds(rows: Sequence[Any], kind: str) -> bool:
    """Whether rows have masks (``'segm'``) or boxes (``'bbox'``)."""
    return any(isinstance(row, dict) and row.get(_KEYS[kind]) for row in rows)


def checked_rows(path: Path, rows: Sequence[Any], truth: Truth, kind: str) -> list[dict]:
    """The rows of a result file that can be evaluated.

    Args:
        rows: Dicts with ``image_id``, ``category_id``, ``score`` and ``segmentation`` (run
            lengths) or ``bbox`` (left, top, width, height in px). Where they have a ``file_name``
            it must be that of the image: ids alone do not tell one split from another.
        kind: ``'segm'`` or ``'bbox'``: what to take of each row. The other is left out, since
            COCO's areas would be those of the boxes where a mask has one.

    Raises:
        UserError: Rows of other images or classes, or broken ones; all problems.
    """
    key = _KEYS[kind]
    if not holds(rows, kind):
        if kind == 'segm' and holds(rows, 'bbox'):
            raise UserError('rows-boxes', path=path)
        raise UserError('rows-other-kind', path=path, key=key)
    _check_ids(path, rows, truth)
    problems = Problems()
    clean = []
    for number, row in enumerate(rows, 1):
        where = f'row {number}'
        if not _is_row(row, key, where, problems):
            continue
        image_id, value = row['image_id'], row[key]
        image = truth.images[image_id]
        size = [image['height'], image['width']]
        if 'file_name' in row and Path(str(row['file_name'])).name != Path(image['file_name']).name:
            where += f' of {row["file_name"]}, image {image_id} is {image["file_name"]}'
            problems.add('row-other-image', where)
        if kind == 'segm' and value['size'] != size:
            problems.add('row-mask-size', f'row {number} {value["size"]} in image {image_id} of {size}')
        clean.append(
            {'image_id': image_id, 'category_id': row['category_id'], 'score': float(row['score']), key: value}
        )
    if kind == 'segm' and not problems:
        _check_run_lengths(clean, problems)
    if problems:
        raise UserError('rows-broken', problems=problems.lines(), path=path, truth=truth.path)
    return clean


def image_folder(truth: Truth, root: Path | None) -> Path | None:
    """The folder that the file names of the images are relative to.

    Args:
        root: Given by the user; otherwise the folders around the annotation file are tried.

    Returns:
        None if no folder was given and none has all images.

    Raises:
        UserError: The given folder lacks images.
    """
    names = [image['file_name'] for image in truth.data['images']]
    folder = root or guess_image_root(truth.path, names)
    missing = [folder / name for name in names if not (folder / name).is_file()]
    if root is not None and missing:
        raise UserError('truth-images', problems=missing, root=root, missing=len(missing), count=len(names))
    return None if missing else folder


def _check_ids(path: Path, rows: Sequence[Any], truth: Truth) -> None:
    """Tell ids of another split, or numbered otherwise, from single wrong ones."""
    for key, known, hint in (
        ('image_id', truth.images, 'pass the annotation file of the split that was predicted, with --ann'),
        ('category_id', truth.names, 'the ids must be those of the annotation file, not label numbers: {known}, …'),
    ):
        found = Counter(r[key] for r in rows if isinstance(r, dict) and isinstance(r.get(key), (int, str)))
        unknown = {i: n for i, n in found.items() if i not in known}
        if unknown:
            raise UserError(
                'rows-ids',
                problems=[Message('row-id', key=key, id=i, count=n) for i, n in unknown.items()],
                hint=hint,
                path=path,
                key=key,
                unknown=len(unknown),
                count=len(found),
                truth=truth.path,
                known=', '.join(f'{i} {name}' for i, name in list(truth.names.items())[:3]),
            )


def _is_row(row: Any, key: str, where: str, problems: Problems) -> bool:
    """Whether a row can be evaluated; adds why not to the problems."""
    if not isinstance(row, dict):
        problems.add('row-type', where)
        return False
    if missing := [k for k in ('image_id', 'category_id', 'score', key) if k not in row]:
        problems.add('row-keys', where, keys=', '.join(missing))
        return False
    value = row[key]
    if any(isinstance(row[k], bool) or not isinstance(row[k], (int, str)) for k in ('image_id', 'category_id')):
        wrong = 'row-id-type'
    elif not _numbers([row['score']], 1):
        wrong = 'row-score'
    elif key == 'bbox':
        wrong = '' if is_box(value) else 'row-box'
    else:
        coded = isinstance(value, dict) and isinstance(value.get('counts'), (str, list))
        wrong = '' if coded and _numbers(value.get('size'), 2) else 'row-shape'
    if wrong:
        problems.add(wrong, where)
    return not wrong


def is_box(value: Any) -> bool:
    """Whether a value is left, top, width and height."""
    return _numbers(value, 4) and min(value[2:]) >= 0


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))


def _check_run_lengths(rows: list[dict], problems: Problems) -> None:
    """Let hotcoco decode them: pycocotools reads past the end of damaged ones."""
    from hotcoco import mask as mask_api

    damaged = (ValueError, TypeError, OverflowError)
    try:
        mask_api.area([row['segmentation'] for row in rows])
    except damaged:
        for number, row in enumerate(rows, 1):
            try:
                mask_api.area(row['segmentation'])
            except damaged as error:
                problems.add('row-mask', f'row {number} ({error})')
        return
    for row in rows:
        row['segmentation'] = to_rle(row['segmentation'], *row['segmentation']['size'])


def _shortest(values: np.ndarray) -> list:
    """The numbers with as many digits as a float32 has; as doubles they would get ten more."""
    return np.asarray(values, np.float32).astype(str).astype(float).tolist()


def _as_text(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle['counts']
    return {'size': [*map(int, rle['size'])], 'counts': counts.decode() if isinstance(counts, bytes) else counts}
