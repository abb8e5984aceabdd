"""What is in a COCO annotation file and where, found without holding it in memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data.formats.json_index import Slices, scan

_MAX_ID = 1 << 53  # what every JSON reader keeps exact


@dataclass
class CocoIndex:
    """An annotation file.

    Attributes:
        path: The file.
        split: That it is.
        slices: Reads parts of it.
        names: Category names by id, in the file's order.
        groups: Supercategories by name.
        header: `info` and `licenses`.
        ids: Image ids; integers where they can be read as such.
        file_names: Of the images, unchecked.
        images: Places of the images in the file (N, 2).
        annotations: Places of the annotations, ordered by image (M, 2).
        firsts: Position in `annotations` of each image's first, and the end (N + 1).
        with_mask: Number of annotations that have a segmentation.
        problems: Why the file cannot be used at all.
        strays: Annotations that belong to no image of the file.
        notes: What is made regular.
        image_root: Folder that file names are relative to.
    """

    path: Path
    split: str | None
    slices: Slices
    names: dict[Any, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    ids: list[Any] = field(default_factory=list)
    file_names: list[Any] = field(default_factory=list)
    images: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    annotations: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    firsts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    with_mask: int = 0
    problems: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    image_root: Path = Path()

    @property
    def keeps_image_ids(self) -> bool:
        """Whether all image ids are integers that every tool can read."""
        return all(isinstance(i, int) and 0 <= i < _MAX_ID for i in self.ids)


def index(path: Path, split: str | None, progress: bool = True) -> CocoIndex:
    """Go through an annotation file once.

    Raises:
        ValueError: It is no JSON object, with the place.
    """
    file = CocoIndex(path, split, Slices(path))
    seen: set[str] = set()
    images, annotations = [], []
    owners: list[Any] = []
    own_ids: set[Any] = set()
    repeated = 0
    for key, value, is_element, start, end in scan(path, ('images', 'annotations'), progress):
        if not is_element:
            seen.add(key)
            _read_member(file, key, value)
        elif not isinstance(value, dict):
            file.problems.append(f"'{key}' has an element {value!r:.40}, not an object")
        elif key == 'images':
            if (image_id := as_id(value.get('id'))) is None:
                file.problems.append(f'an image ({value.get("file_name")!r:.60}) has the id {value.get("id")!r:.20}')
            file.ids.append(image_id)
            file.file_names.append(value.get('file_name'))
            images.append((start, end))
        else:
            owners.append(as_id(value.get('image_id')))
            annotations.append((start, end))
            file.with_mask += bool(value.get('segmentation'))
            own_id = as_id(value.get('id'))
            repeated += own_id in own_ids
            own_ids.add(own_id)
    file.problems += [f"has no list '{key}'" for key in ('images', 'annotations', 'categories') if key not in seen]
    file.problems += [
        f'image id {image_id} comes {count} times'
        for image_id, count in Counter(file.ids).items()
        if count > 1 and image_id is not None
    ]
    if repeated:
        file.notes.append(f'{repeated} annotation ids are missing or come again; all are new now')
    if not file.problems:
        file.images = np.array(images, np.int64).reshape(-1, 2)
        _group(file, owners, np.array(annotations, np.int64).reshape(-1, 2))
    return file


def as_id(value: Any) -> int | str | None:
    """An id as an integer if it can be read as one, a string if it is one, else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() else value or None
    return value if isinstance(value, int) else None


def _read_member(file: CocoIndex, key: str, value: Any) -> None:
    if key in ('images', 'annotations', 'categories') and not isinstance(value, list):
        file.problems.append(f"'{key}' is not a list")
    elif key == 'categories':
        _read_categories(file, value)
    elif (key, type(value)) in (('info', dict), ('licenses', list)):
        file.header[key] = value


def _read_categories(file: CocoIndex, categories: list[Any]) -> None:
    for category in categories:
        entry = category if isinstance(category, dict) else {}
        category_id, name = as_id(entry.get('id')), entry.get('name')
        if category_id is None or not isinstance(name, str) or not name.strip():
            file.problems.append(f'a category without id or name: {category!r:.60}')
            continue
        name = name.strip()
        if category_id in file.names:
            file.problems.append(f"category id {category_id} is '{file.names[category_id]}' and '{name}'")
        elif name in file.names.values():
            file.problems.append(f"the category '{name}' comes twice")
        file.names[category_id] = name
        if isinstance(entry.get('supercategory'), str):
            file.groups[name] = entry['supercategory']


def _group(file: CocoIndex, owners: list[Any], places: np.ndarray) -> None:
    """Order the annotations by image, in the file's order within one."""
    position = {image_id: place for place, image_id in enumerate(file.ids)}
    images = np.array([position.get(owner, -1) for owner in owners], np.int64)
    for place in places[images < 0].tolist():
        annotation = file.slices.value(*place)
        file.strays.append(
            f'annotation {annotation.get("id")!r:.20}: there is no image {annotation.get("image_id")!r:.20}'
        )
    kept = np.flatnonzero(images >= 0)
    order = kept[np.argsort(images[kept], kind='stable')]
    file.annotations = places[order]
    file.firsts = np.searchsorted(images[order], np.arange(len(file.ids) + 1))
