"""Where COCO data sets keep their annotation files and images."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from mmfinetune.data.coco_json import name_problem
from mmfinetune.data.formats.folders import split_of
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import shown

_SPLITS = ('train', 'val', 'test', None)
_SNIFFED = 1 << 16  # bytes at either end of a file
_MAX_SNIFFED = 50  # files
_MAX_UNSURE = 3
_MAX_NAME, _MAX_PATH = 255, 2048  # bytes; a file name, and what leaves room for the folder
_KEY = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


def choose_files(root: Path) -> tuple[Path, dict[str | None, Path]]:
    """The data set's folder, and the annotation file of each split.

    Args:
        root: The folder, or one annotation file.

    Raises:
        UserError: There is none, or it is unclear which file belongs to which split.
    """
    if root.is_file():
        inner = root.parent.name == 'annotations'
        return (root.parent.parent if inner else root.parent), {_split_of(root): root}
    found = candidates(root)
    if not found:
        # A few may be damaged COCO files, which reading will show; many are something else.
        found = _json_files(root)
        if not 0 < len(found) <= _MAX_UNSURE:
            raise UserError('coco-none', path=root)
    splits: dict[str | None, list[Path]] = {}
    for path in found:
        splits.setdefault(_split_of(path), []).append(path)
    if max(map(len, splits.values())) > 1 or (None in splits and len(splits) > 1):
        listed = {
            split or 'no split': ', '.join(shown(path, root) for path in paths) for split, paths in splits.items()
        }
        lines = [Message('coco-of-split', split=split, files=files) for split, files in listed.items()]
        raise UserError('coco-several', problems=lines, path=root)
    return root, {split: splits[split][0] for split in _SPLITS if split in splits}


def official_files(root: Path) -> dict[str | None, Path]:
    """The annotation files of COCO 2017 by split."""
    paths = {split: root / 'annotations' / f'instances_{split}2017.json' for split in ('train', 'val')}
    return {split: path for split, path in paths.items() if path.is_file()}


def candidates(root: Path) -> list[Path]:
    """The JSON files of a folder that look like COCO."""
    return [path for path in _json_files(root)[:_MAX_SNIFFED] if is_coco(path)]


def _json_files(root: Path) -> list[Path]:
    """JSON files in the places where data sets have their COCO JSON."""
    folders = [root, root / 'annotations']
    folders += sorted(folder for folder in root.iterdir() if folder.is_dir() and split_of([folder.name]))
    paths = [path for folder in folders for path in sorted(folder.glob('*.json')) if not path.name.startswith('.')]
    # COCO's archive has captions and keypoints of the same images next to the instances.
    instances = [path for path in paths if path.name.startswith('instances_')]
    return instances or paths


def is_coco(path: Path) -> bool:
    """Whether two of the three lists of a COCO file begin near either end of a file."""
    if not path.is_file():
        return False
    with path.open('rb') as file:
        ends = file.read(_SNIFFED)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(len(ends), size - _SNIFFED))
        ends += b'\0' + file.read()
    return len(set(_KEY.findall(ends))) >= 2


def _split_of(path: Path) -> str | None:
    """The split in the name of an annotation file, or else in that of its folder."""
    return split_of(re.split(r'[^A-Za-z0-9]+', path.stem)) or split_of([path.parent.name])


def image_folders(path: Path, split: str | None, root: Path) -> list[Path]:
    """Folders in which data sets keep the images of an annotation file."""
    # A folder with the split in its name first: file names may be the same in all splits.
    names = dict.fromkeys(name for name in (path.stem.removeprefix('instances_'), split) if name)
    below = [*(f'images/{name}' for name in names), *names, '.', 'images', 'JPEGImages', 'img']
    folders = [Path(os.path.normpath(folder / name)) for folder in (path.parent, root) for name in below]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def is_usable(name: Any) -> bool:
    """Whether a `file_name` can name a file."""
    if name_problem(name):
        return False
    data = name.encode()
    return len(data) <= _MAX_PATH and max(map(len, data.split(b'/'))) <= _MAX_NAME


def find_image(folder: Path, name: str, root: Path) -> tuple[Path, bool]:
    """The image that a file_name means, and whether it was found.

    A name that leads nowhere or out of the data set (absolute, on another machine, with `..`, with
    `\\`, as a URL) is looked for by its end: all of its folders, then fewer and fewer of them.
    """
    inside = tuple(os.path.normpath(place) + os.sep for place in (folder, root))
    path = Path(os.path.normpath(folder / name))
    if str(path).startswith(inside) and path.is_file():
        return path, True
    # File systems and tools write accents as one character or as two.
    composed = [unicodedata.normalize(form, name) for form in ('NFC', 'NFD')]
    for spelling in dict.fromkeys((name, name.replace('\\', '/'), unquote(name), *composed)):
        parts = [part for part in PurePosixPath(spelling).parts if part not in ('..', '/')]
        for first in range(len(parts)):
            if (end := folder.joinpath(*parts[first:])).is_file():
                return end, True
    return folder / (PurePosixPath(name.replace('\\', '/')).name or name), False
