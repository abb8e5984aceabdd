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
    """The split in the folders of a path: 'train' for `images/train2017` or `training`, None for none."""
    for part in parts:
        if match := _SPLIT.fullmatch(part.lower()):
            return match[1]
    return None


def without_splits(parts: Iterable[str]) -> tuple[str, ...]:
    """The folders of a path that do not name a split."""
    return tuple(part for part in parts if split_of([part]) is None)


def apart(parts: tuple[str, ...], folders: Collection[str]) -> tuple[_Place, _Place] | None:
    """The folders before and after the first that has one of the names (in lower case); None if there is none."""
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

    def add(self, mask: Path, images: dict[str, list[Path]], label: str | None) -> bool:
        """Give a mask to the images of the stem that its name begins with; whether there is one.

        Args:
            mask: The file.
            images: Images by stem.
            label: Class, unless the name of the mask says one.
        """
        stem, named = _image_stem(mask.stem, images) or ('', None)
        for image in images.get(stem, ()):
            self.masks.setdefault(image, []).append((named or label, mask))
        return stem in images

    def sample(self) -> list[Path]:
        """A few masks, spread over the data set."""
        paths = [path for masks in self.masks.values() for _, path in masks]
        return paths[:: max(1, len(paths) // _SAMPLES)][:_SAMPLES]

    def fits(self) -> bool:
        """Whether it is likely meant so: most images have a mask, hardly a mask no image."""
        images, masks = len(self.images), len(self.masks)
        return masks > 0 and 2 * masks >= images and 10 * len(self.orphans) <= images

    def share(self) -> str:
        """How many images have a mask, in words."""
        return f'{len(self.masks)} of {len(self.images)}'

    def class_names(self) -> list[str]:
        """The classes that folders or names of masks give."""
        names = {name for masks in self.masks.values() for name, _ in masks if name is not None}
        return sorted(names, key=natural_key)


def require_size(pixels: np.ndarray, record: Record, root: Path) -> None:
    """Raise a Problem unless a mask, (h, w), has the size of its image."""
    height, width = pixels.shape
    if (width, height) != (record.width, record.height):
        code = 'mask-file-turned' if (height, width) == (record.width, record.height) else 'mask-file-size'
        size = f'{record.width}x{record.height}'
        raise Problem(code, width=width, height=height, image=shown(record.image, root), size=size)


def numbered_layout(root: Path) -> Layout:
    """Images, masks and class masks by the folder they are in."""
    roles: dict[str, dict[_Place, list[Path]]] = {'image': {}, 'mask': {}, 'class': {}}
    images = []
    for path in find_files(root, _MASK_SUFFIXES):
        *folders, _ = path.relative_to(root).parts
        for role, names in (('mask', MASK_FOLDERS), ('class', _CLASS_FOLDERS), ('image', IMAGE_FOLDERS)):
            if halves := apart(tuple(folders), names):
                roles[role].setdefault((*halves[0], *halves[1], path.stem), []).append(path)
                if role == 'image':
                    images.append(path)
                break
    layout = Layout(images)
    for role in ('mask', 'class'):
        for place, paths in roles[role].items():
            bare = (*place[:-1], _LAST_WORD.sub('', place[-1]))
            owners = roles['image'].get(place) or roles['image'].get(bare)
            if not owners:
                layout.orphans += paths
            for image in owners or ():
                if role == 'mask':
                    layout.masks.setdefault(image, []).extend((None, path) for path in paths)
                else:
                    layout.classes[image] = paths[0]
    return layout


def classed_layout(root: Path) -> Layout:
    """Images and masks by folders `images/` and `masks/`, or next to each other."""
    files = [(path, path.relative_to(root).parts[:-1]) for path in find_files(root, _MASK_SUFFIXES)]
    if masks := [(path, parts) for path, parts in files if apart(parts, MASK_FOLDERS)]:
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
        tries += [(name, folders[:k] + folders[k + 1 :]) for k, name in enumerate(folders) if not split_of([name])]
        for label, place in tries:
            here = images.get(place, {})
            if layout.add(path, here, label):
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
            if not layout.add(path, images, next(iter(without_splits(parts)), None)):
                layout.orphans.append(path)
    return layout


def _image_stem(stem: str, stems: Container[str]) -> tuple[str, str | None] | None:
    """The image that a mask's name begins with, the longest, and the class in the rest of it."""
    if stem in stems:
        return stem, None
    for place in range(len(stem) - 1, 0, -1):
        if stem[place] in '-_. ' and stem[:place] in stems:
            return stem[:place], _MASK_WORD.sub('', stem[place + 1 :]).strip('-_. ') or None
    return None
