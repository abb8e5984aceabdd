"""Records to the members of COCO annotations, many images at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_api

from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.errors import Message, Problem
from mmfinetune.utils.files import json_bytes
from mmfinetune.utils.masks import check_polygon, check_rle, to_rle
from mmfinetune.utils.text import printable
from mmfinetune.utils.workers import in_order

_GIVEN_LATER = frozenset({'id', 'image_id'})


@dataclass
class Result:
    """One image as a worker leaves it.

    Attributes:
        image_id: Id to keep.
        image: Members of the image's JSON object but for the id, without braces.
        annotations: The same of its annotations, but for `id` and `image_id`.
        labels: Labels of those annotations that are not crowd regions.
        crowds: Number of the others.
        dropped: Objects not among them, by reason.
        reach: How far polygons reach, as a multiple of the image's size.
        problems: Why the image cannot be used; the rest is then meaningless.
        notes: What was left out or fixed.
    """

    item: Item
    image_id: int | None = None
    image: str = ''
    annotations: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: int = 0
    reach: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[Message] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)


def absolute(image: Path) -> Path:
    """The path without `..` in it; symbolic links stay, since their names are what counts."""
    return Path(os.path.normpath(Path.cwd() / image))


def relative_name(image: Path, base: str) -> str:
    """The image's path relative to `base`, with slashes."""
    return absolute(image).relative_to(base).as_posix()


@dataclass
class Converter:
    """Reads items and turns their objects into the members of COCO annotations.

    Attributes:
        reader: Reads the items.
        labels: Label of each class to write, by name; its position in `ids`.
        ids: Category ids in label order.
        base: Absolute path that file names are relative to.
        min_area: Objects of fewer pixels are left out.
    """

    reader: Reader
    labels: dict[str, int]
    ids: list[int]
    base: str
    min_area: int

    def convert(self, items: Sequence[Item], workers: int, title: str, progress: bool) -> Iterator[Result]:
        """Convert all images, in the order of `items` whatever the number of workers.

        Raises:
            UserError: A worker process was killed.
        """
        chunk = max(1, min(64, len(items) // (8 * workers)))
        return in_order(self, items, workers, chunk, desc=title, wanted=progress)

    def __call__(self, item: Item) -> Result:
        result = Result(item)
        try:
            record = self.reader.read(item)
            result.problems, result.notes = list(record.problems), list(record.notes)
            if not result.problems:
                self._add_record(record, result)
        # Files are damaged in ways no reader foresees; one must not end the work on the others.
        except Exception as error:
            kind = type(error).__name__
            result.problems.append(Message('prepare-image-unreadable', place=item.key, type=kind, reason=error))
        return result

    def _add_record(self, record: Record, result: Result) -> None:
        name = relative_name(result.item.image, self.base)
        if printable(name) != name:
            result.problems.append(Message('prepare-image-name', place=result.item.key))
            return
        result.image_id = record.image_id
        size = {'width': record.width, 'height': record.height}
        result.image = _members({'file_name': name, **size}, record.extra, result)
        for instance in record.instances:
            place = f'{result.item.key}: {instance.place}' if instance.place else result.item.key
            try:
                self._add_instance(record, instance, result, place)
            except Problem as problem:
                result.problems.append(problem.message.at(place))

    def _add_instance(self, record: Record, instance: Instance, result: Result, place: str) -> None:
        if instance.category not in self.labels:
            if instance.category not in self.reader.classes:
                raise Problem('prepare-class-unknown', name=instance.category)
            result.dropped['of a class that --classes does not name'] += 1
            return
        shape, height, width = instance.segmentation, record.height, record.width
        if isinstance(shape, dict):
            rle = shape = check_rle(shape, height, width)
        else:
            for polygon in shape:
                check_polygon(polygon, height, width)
                result.reach = max([result.reach, *(v / (height if i % 2 else width) for i, v in enumerate(polygon))])
            # Of fewer than three points: no area, and pycocotools would take two for a box.
            full = [polygon for polygon in shape if len(polygon) >= 6]
            if not full:
                result.dropped['without area (fewer than 3 points)'] += 1
                return
            if len(full) < len(shape):
                short = len(shape) - len(full)
                result.notes.append(Message('prepare-polygons-short', place=place, left_out=short, count=len(shape)))
            shape, rle = full, to_rle(full, height, width)
        area = int(mask_api.area(rle))
        if not area:
            result.dropped['without a pixel in the image'] += 1
            return
        if area < self.min_area and not instance.iscrowd:
            result.dropped[f'smaller than {self.min_area} pixels'] += 1
            return
        label = self.labels[instance.category]
        members = {
            'category_id': self.ids[label],
            'segmentation': shape,
            'area': area,
            'bbox': [int(value) for value in mask_api.toBbox(rle)],
            'iscrowd': int(instance.iscrowd),
        }
        result.annotations.append(_members(members, instance.extra, result))
        if instance.iscrowd:
            result.crowds += 1
        else:
            result.labels.append(label)


def _members(members: dict[str, Any], extra: dict[str, Any], result: Result) -> str:
    """Members of a JSON object without its braces; ours win over those of the source."""
    extra = {key: value for key, value in extra.items() if key not in members and key not in _GIVEN_LATER}
    try:
        json.dumps(extra, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):  # too deep, NaN, or a lone surrogate
        keys = ', '.join(sorted(extra))
        result.notes.append(Message('prepare-keys-left-out', place=result.item.key, keys=keys))
        extra = {}
    return json_bytes({**members, **extra}).decode().strip()[1:-1]
