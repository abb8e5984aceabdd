"""Layouts of data sets on the disk: split folders, class lists, files that belong together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmfinetune.data.records import Record
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import find_files, natural_key, read_text, shown
from mmfinetune.utils.images import IMAGE_SUFFIXES

IMAGE_FOLDERS = frozenset({'images', 'image', 'imgs', 'img'})
MASK_FOLDERS = frozenset({'masks', 'mask', 'instances', 'instance_masks'})
_CLASS_FOLDERS = frozenset({'classes', 'class_masks', 'semantic', 'semantic_masks'})
CLASS_LISTS = ('classes.txt', 'class_names.txt', 'names.txt', 'labels.txt', 'obj.names')
# Lines that LabelMe's own exporters want in a class list and that name no class.
NO_CLASS = frozenset({'__ignore__', '_background_', '__background__'})

# Not OpenCV's, so no image that could be trained on; as masks they are in use (Carvana).
_MASK_SUFFIXES = IMAGE_SUFFIXES | {'.gif'}
_WORDS = 'masks?|labels?|instances?|instanceids?|segmentation|seg|gt|binary'
_LAST_WORD = re.compile(rf'[-_. ](?:{_WORDS})$', re.IGNORECASE)
_MASK_WORD = re.compile(rf'(?:^|[-_. ])(?:{_WORDS})(?=[-_. ]|$)', re.IGNORECASE)
_SAMPLES = 5  # masks that are opened to detect a format
_SPLIT = re.compile(r'(train|val|test)(?:ing|id|idation)?(?:[-_]?[0-9]{4})?')

_Place = tuple[str, ...]  # folders without the one that names the role, then the stem


def split_of(parts: Iterable[str]) -> str | None:
    """The split in a path: 'train' for `images/train2017` or `training`, None for none.

    Args:
        parts: Folders of the path, relative to the data set.
    """
    for part in parts:
        if match := _SPLIT.fullmatch(part.lower()):
            return match[1]
    return None


def without_splits(parts: Iterable[str]) -> tuple[str, ...]:
    """The folders of a path that do not name a split."""
    return tuple(part for part in parts if split_of([part]) is None)


def apart(parts: tuple[str, ...], folders: Collection[str]) -> tuple[_Place, _Place] | None:
    """The folders before and after the first that has one of the names; None if there is none.

    Args:
        parts: Folders of a path.
        folders: Names in lower case.
    """
    for place, part in enumerate(parts):
        if part.lower() in folders:
            return parts[:place], parts[place + 1 :]
    return None


def find_class_list(root: Path) -> tuple[Path, list[str]] | None:
    """The class list of a data set and its names in order; None if there is no such file.

    LabelMe's `__ignore__` and `_background_` are left out.

    Raises:
        UserError: It is unreadable or empty, or has a duplicated name or an empty line between.
    """
    path = next((root / name for name in CLASS_LISTS if (root / name).is_file()), None)
    if path is None:
        return None
    problems, names = [], []
    try:
        # An empty line between would shift the number of every class after it.
        for number, line in enumerate(read_text(path).strip().splitlines(), 1):
            if not line.strip():
                problems.append(Message('class-list-line-empty', line=number))
            elif line.strip() not in NO_CLASS:
                names.append(line.strip())
    except Problem as problem:
        problems.append(problem.message)
    for name, count in Counter(names).items():
        if count > 1:
            problems.append(Message('class-list-repeated', name=name, count=count))
    if not problems and not names:
        problems.append(Message('class-list-empty'))
    if problems:
        raise UserError('class-list', problems=problems, path=path)
    return path, names


def read_ids(path: Path) -> tuple[list[str], list[Message]]:
    """The image ids of a text file, one a line, and the lines that are not an id or are duplicated.

    Raises:
        Problem: It is unreadable, or has no id.
    """
    first: dict[str, int] = {}
    bad = []
    for number, line in enumerate(map(str.strip, read_text(path).splitlines()), start=1):
        if len(line.split()) > 1 or '/' in line or '\\' in line:
            bad.append(Message('id-list-not-an-id', line=number, text=line))
        elif line and first.setdefault(line, number) != number:
            bad.append(Message('id-list-twice', line=number, text=line))
    if not first:
        raise Problem('id-list-empty')
    return list(first), bad


@dataclass
class Layout:
    """Which files belong together.

    Attributes:
        images: All images, in order.
        masks: The mask files of each image, with the class that folder or name gives.
        classes: The class mask of each image that has one.
        orphans: Masks without an image.
    """

    images: list[Path]
    masks: dict[Path, list[tuple[str | None, Path]]] = field(default_factory=dict)
    classes: dict[Path, Path] = field(default_factory=dict)
    orphans: list[Path] = field(default_factory=list)

    def sample(self) -> list[Path]:
        """A few masks, spread over the data set."""
        paths = [path for masks in self.masks.values() for _, path in masks]
        return paths[:: max(1, len(paths) // _SAMPLES)][:_SAMPLES]

    def fits(self) -> bool:
        """Whether it is likely meant so: most images have a mask, hardly a mask no image."""
        return (
            bool(self.masks) and 2 * len(self.masks) >= len(self.images) and 10 * len(self.orphans) <= len(self.images)
        )

    def share(self) -> str:
        """How many images have a mask, in words."""
        return f'{len(self.masks)} of {len(self.images)}'

    def images_of_masks(self) -> dict[Path, list[Path]]:
        """The other way round: the images of each mask, which should be one."""
        found: dict[Path, list[Path]] = {}
        for image, masks in self.masks.items():
            for _, path in masks:
                found.setdefault(path, []).append(image)
        return found

    def class_names(self) -> list[str]:
        """The classes that folders or names of masks give."""
        names = {name for masks in self.masks.values() for name, _ in masks if name is not None}
        return sorted(names, key=natural_key)


def require_size(pixels: np.ndarray, record: Record, root: Path) -> None:
    """Raise a Problem unless a mask, (h, w), has the size of its image."""
    height, width = pixels.shape
    size = (record.width, record.height)
    if (width, height) == size:
        return
    facts = dict(width=width, height=height, image=shown(record.image, root), size=f'{size[0]}x{size[1]}')
    if (height, width) == size:
        raise Problem('mask-file-turned', **facts)
    raise Problem('mask-file-size', **facts)


def numbered_layout(root: Path) -> Layout:
    """Images, masks and class masks by the folder they are in."""
    roles: dict[str, dict[_Place, list[Path]]] = {'image': {}, 'mask': {}, 'class': {}}
    images = []
    for path in find_files(root, _MASK_SUFFIXES):
        *folders, _ = path.relative_to(root).parts
        for role, names in (('mask', MASK_FOLDERS), ('class', _CLASS_FOLDERS), ('image', IMAGE_FOLDERS)):
            if halves := apart(tuple(folders), names):
                place = (*halves[0], *halves[1], path.stem)
                roles[role].setdefault(place, []).append(path)
                if role == 'image':
                    images.append(path)
                break
    layout = Layout(images)
    for role in ('mask', 'class'):
        for place, paths in roles[role].items():
            key = next(
                (key for key in (place, (*place[:-1], _LAST_WORD.sub('', place[-1]))) if key in roles['image']), None
            )
            if key is None:
                layout.orphans += paths
                continue
            for image in roles['image'][key]:
                if role == 'mask':
                    layout.masks.setdefault(image, []).extend((None, path) for path in paths)
                else:
                    layout.classes[image] = paths[0]
    return layout


def classed_layout(root: Path) -> Layout:
    """Images and masks by folders `images/` and `masks/`, or next to each other."""
    files = [(path, path.relative_to(root).parts[:-1]) for path in find_files(root, _MASK_SUFFIXES)]
    masks = [(path, parts) for path, parts in files if apart(parts, MASK_FOLDERS)]
    if masks:
        return _in_folders([pair for pair in files if not apart(pair[1], MASK_FOLDERS)], masks)
    return _side_by_side(files)


def _in_folders(others: list[tuple[Path, _Place]], masks: list[tuple[Path, _Place]]) -> Layout:
    in_folder = [
        (path, halves)
        for path, parts in others
        if path.suffix.lower() in IMAGE_SUFFIXES and (halves := apart(parts, IMAGE_FOLDERS))
    ]
    # Without a folder for them, all that are not masks are images.
    in_folder = in_folder or [(path, (parts, ())) for path, parts in others]
    layout = Layout([path for path, _ in in_folder])
    images: dict[_Place, dict[str, list[Path]]] = {}
    for path, (before, after) in in_folder:
        images.setdefault(before + after, {}).setdefault(path.stem, []).append(path)
    for path, parts in masks:
        before, after = apart(parts, MASK_FOLDERS) or ((), ())
        folders = before + after
        # One of the folders may be the class; images are where the others lead.
        tries = [(next(iter(without_splits(before)), None), folders)]
        tries += [
            (folders[k], folders[:k] + folders[k + 1 :]) for k in range(len(folders)) if split_of([folders[k]]) is None
        ]
        for label, place in tries:
            here = images.get(place, {})
            if match := _image_stem(path.stem, here):
                stem, named = match
                for image in here[stem]:
                    layout.masks.setdefault(image, []).append((named or label, path))
                break
        else:
            layout.orphans.append(path)
    return layout


def _side_by_side(files: list[tuple[Path, _Place]]) -> Layout:
    folders: dict[_Place, list[Path]] = {}
    for path, parts in files:
        folders.setdefault(parts, []).append(path)
    layout = Layout([])
    for parts, paths in folders.items():
        stems = {path.stem for path in paths}
        masks = [path for path in paths if path.suffix.lower() in ('.png', '.gif')]
        if len(masks) == len(paths):
            # Images are PNGs too: a mask's name begins with that of an image.
            masks = [path for path in masks if _image_stem(path.stem, stems - {path.stem})]
        is_mask = set(masks)
        images: dict[str, list[Path]] = {}
        for path in paths:
            if path not in is_mask:
                images.setdefault(path.stem, []).append(path)
                layout.images.append(path)
        for path in masks:
            match = _image_stem(path.stem, images)
            if not match:
                layout.orphans.append(path)
                continue
            stem, named = match
            label = named or next(iter(without_splits(parts)), None)
            for image in images[stem]:
                layout.masks.setdefault(image, []).append((label, path))
    return layout


def _image_stem(stem: str, stems: Container[str]) -> tuple[str, str | None] | None:
    """The image that a mask's name begins with, the longest, and the class in the rest of it."""
    if stem in stems:
        return stem, None
    for place in range(len(stem) - 1, 0, -1):
        if stem[place] in '-_. ' and stem[:place] in stems:
            return stem[:place], _MASK_WORD.sub('', stem[place + 1 :]).strip('-_. ') or None
    return None
