"""Records to the members of COCO annotations, many images at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_api

from mmfinetune.data.records import Instance, Item, Record, Source
from mmfinetune.utils.errors import Problem
from mmfinetune.utils.masks import check_polygon, check_rle
from mmfinetune.utils.workers import in_order

_GIVEN_LATER = frozenset({'id', 'image_id'})


@dataclass
class Task:
    """What worker processes need to know beside the items.

    Attributes:
        source: Reads the items.
        labels: Of the classes to write, by name; the position in `ids`.
        ids: Category ids in label order.
        base: Absolute path that file names are relative to.
        min_area: Objects of fewer pixels are left out.
    """

    source: Source
    labels: dict[str, int]
    ids: list[int]
    base: str
    min_area: int


@dataclass
class Done:
    """One image as a worker leaves it.

    Attributes:
        item: What was read.
        image_id: Id to keep.
        image: Members of the image's JSON object but for the id, without braces.
        annotations: The same of its annotations, but for `id` and `image_id`.
        labels: Of those annotations that are no crowd regions.
        crowds: Number of the others.
        dropped: Objects not among them, by reason.
        problems: Why the image cannot be used; the others are then of no use.
        notes: What was left out or mended.
    """

    item: Item
    image_id: int | None = None
    image: str = ''
    annotations: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def absolute(image: Path) -> Path:
    """The path without `..` in it; symbolic links stay, since their names are what counts."""
    return Path(os.path.normpath(Path.cwd() / image))


def relative_name(image: Path, base: str) -> str:
    """The image's path relative to `base`, with slashes."""
    return absolute(image).relative_to(base).as_posix()


def read_all(task: Task, items: Sequence[Item], workers: int, title: str, progress: bool) -> Iterator[Done]:
    """Read all images, in the order of `items` whatever the number of workers.

    Args:
        task: What to do.
        items: The images.
        workers: Processes.
        title: Of the progress bar.
        progress: Whether to show it.

    Raises:
        UserError: A worker process was killed.
    """
    chunk = max(1, min(64, len(items) // (8 * workers)))
    return in_order(partial(_read, task), items, workers, chunk, desc=title, disable=None if progress else True)


def _read(task: Task, item: Item) -> Done:
    """Read one image and turn its objects into the members of COCO annotations."""
    done = Done(item)
    try:
        record = task.source.read(item)
        done.problems, done.notes = list(record.problems), list(record.notes)
        if not done.problems:
            _add_record(task, record, done)
    # Files are damaged in ways no reader foresees; one must not end the work on the others.
    except Exception as error:
        done.problems.append(f'{item.key}: cannot be read ({type(error).__name__}: {error})')
    return done


def _add_record(task: Task, record: Record, done: Done) -> None:
    name = relative_name(done.item.image, task.base)
    if not is_text(name):
        done.problems.append(f'{done.item.key}: the name of the image is not UTF-8; rename it')
        return
    done.image_id = record.image_id
    done.image = _members({'file_name': name, 'width': record.width, 'height': record.height}, record.extra, done)
    for instance in record.instances:
        _add_instance(task, record, instance, done)


def _add_instance(task: Task, record: Record, instance: Instance, done: Done) -> None:
    where = f'{done.item.key}: ' + (f'{instance.place}: ' if instance.place else '')
    if instance.category not in task.labels:
        if instance.category in task.source.classes:
            done.dropped['of a class that --classes does not name'] += 1
        else:
            done.problems.append(f"{where}unknown class '{instance.category}'")
        return
    shape, width, height = instance.segmentation, record.width, record.height
    try:
        if isinstance(shape, dict):
            rle = shape = check_rle(shape, height, width)
        else:
            for polygon in shape:
                check_polygon(polygon, height, width)
    except Problem as problem:
        done.problems.append(f'{where}{problem}')
        return
    if not isinstance(shape, dict):
        # Of fewer than three points: no area, and pycocotools would take two for a box.
        full = [polygon for polygon in shape if len(polygon) >= 6]
        if full and len(full) < len(shape):
            done.notes.append(
                f'{where}{len(shape) - len(full)} of its {len(shape)} polygons left out: fewer than 3 points'
            )
        shape = full
        if not shape:
            done.dropped['without area (fewer than 3 points)'] += 1
            return
        rle = mask_api.merge(mask_api.frPyObjects(shape, height, width))
    area = int(mask_api.area(rle))
    if not area:
        done.dropped['without a pixel in the image'] += 1
        return
    if area < task.min_area and not instance.iscrowd:
        done.dropped[f'smaller than {task.min_area} pixels'] += 1
        return
    label = task.labels[instance.category]
    done.annotations.append(
        _members(
            {
                'category_id': task.ids[label],
                'segmentation': shape,
                'area': area,
                'bbox': [int(value) for value in mask_api.toBbox(rle)],
                'iscrowd': int(instance.iscrowd),
            },
            instance.extra,
            done,
        )
    )
    if instance.iscrowd:
        done.crowds += 1
    else:
        done.labels.append(label)


def _members(members: dict[str, Any], extra: dict[str, Any], done: Done) -> str:
    """Members of a JSON object without its braces; ours win over those of the source."""

    def dump(value: dict[str, Any]) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))

    extra = {key: value for key, value in extra.items() if key not in members and key not in _GIVEN_LATER}
    try:
        text = dump({**members, **extra})
        if is_text(text):
            return text[1:-1]
    except ValueError:
        pass
    done.notes.append(
        f'{done.item.key}: further keys left out, since JSON cannot hold a value: ' + ', '.join(sorted(extra))
    )
    return dump(members)[1:-1]


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: file names and JSON may hold half characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
