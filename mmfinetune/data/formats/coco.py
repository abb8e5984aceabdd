"""COCO JSON from anywhere, checked and made regular; the layout of COCO 2017."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from mmfinetune.data.formats.coco_index import CocoIndex, as_id, index
from mmfinetune.data.formats.folders import split_of
from mmfinetune.data.records import Instance, Item, Record
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import natural_key, shown
from mmfinetune.utils.images import image_size

_CORE = frozenset({'id', 'image_id', 'category_id', 'segmentation', 'area', 'bbox', 'iscrowd'})
_IMAGE_CORE = frozenset({'id', 'file_name', 'width', 'height'})
_SPLITS = ('train', 'val', 'test', None)
_SNIFFED = 1 << 16  # bytes at either end of a file
_MAX_SNIFFED = 50  # files
_MAX_UNSURE = 3
_SAMPLES = 20  # image names that tell in which folder the images are
_MAX_SIDE = 1 << 20  # pixels; OpenCV reads no larger images
_MAX_NAME, _MAX_PATH = 255, 2048  # bytes; a file name, and what leaves room for the folder
_KEY = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')


class CocoSource:
    """COCO JSON files, one for each split, or a single one.

    Ids may be integers, floats or strings, with gaps, from 0; image and category ids are kept
    where they are integers that serve (image ids from 0, category ids from 1 and ascending),
    annotation ids are always given anew. Boxes and areas are not read but made from the masks.
    """

    kind = 'coco'
    cure = 'correct the annotation files (for boxes that shall count as rectangular masks use --boxes-as-masks)'

    def __init__(self, root: Path, files: list[CocoIndex], options: dict[str, Any]) -> None:
        self.root, self._files = root, files
        self._boxes = bool(options.get('boxes_as_masks'))
        self._trust_sizes = bool(options.get('trust_sizes'))
        self._keeps_ids = [file.keeps_image_ids for file in files]
        self.problems: list[str] = []
        self.notes: list[str] = []
        named = [name for file in files for name in file.names.values()]
        self.classes = list(dict.fromkeys(named))
        self.category_ids = _common_ids(files)
        self.supercategories = {name: group for file in files for name, group in file.groups.items()}
        self.headers = {file.split: file.header for file in files}
        for file in files:
            name = shown(file.path, root)
            self.problems += [f'{name}: {line}' for line in file.strays]
            self.notes += [f'{name}: {line}' for line in file.notes]

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """See `Source.recognise`."""
        try:
            if root.is_file():
                return 'a COCO JSON file' if _is_coco(root) else None
            # Tools write their COCO JSON into these data sets; the true labels are the PNGs.
            other = any((root / name).is_dir() for name in ('SegmentationObject', 'gtFine'))
            if other or Coco2017Source.recognise(root):
                return None
            found = _candidates(root)
        except OSError:
            return None
        if not found:
            return None
        more = f' and {len(found) - 1} more' if len(found) > 1 else ''
        return f'{shown(found[0], root)}{more} with images, annotations and categories'

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> CocoSource:
        """See `Source.open`. Options: `boxes_as_masks`, `image_root`, `trust_sizes`, `progress`."""
        root, chosen = cls._choose(root)
        files, problems = [], []
        for split, path in chosen.items():
            try:
                files.append(index(path, split, options.get('progress', True)))
                lines = files[-1].problems
                if not (lines or files[-1].with_mask or options.get('boxes_as_masks')):
                    lines = [
                        f'none of its {len(files[-1].annotations)} annotations has a '
                        'segmentation; masks cannot be learnt from boxes'
                    ]
            except ValueError as error:
                lines = [str(error)]
            problems += [f'{shown(path, root)}: {line}' for line in lines]
        if problems:
            raise UserError(
                f'{root}: annotation files that cannot be used:',
                problems,
                'correct them, or make them anew; where only masks are missing, '
                '--boxes-as-masks makes them of the boxes',
            )
        source = cls(root, files, options)
        source._check_classes()
        for file in files:
            file.image_root = source._image_root(file, options.get('image_root'))
        return source

    @classmethod
    def _choose(cls, root: Path) -> tuple[Path, dict[str | None, Path]]:
        """The data set's folder, and the annotation file of each split."""
        if root.is_file():
            inner = root.parent.name == 'annotations'
            return (root.parent.parent if inner else root.parent), {_split_of(root): root}
        found = _candidates(root)
        if not found:
            # A few may be damaged COCO files, as reading will tell; many are something else.
            found = _json_files(root)
            if not 0 < len(found) <= _MAX_UNSURE:
                raise UserError(
                    f'{root}: no COCO JSON with images, annotations and categories', cure='name the JSON file itself'
                )
        splits: dict[str | None, list[Path]] = {}
        for path in found:
            splits.setdefault(_split_of(path), []).append(path)
        doubles = [
            f'{split or "no split"}: ' + ', '.join(shown(path, root) for path in paths)
            for split, paths in splits.items()
            if len(paths) > 1
        ]
        if doubles or (None in splits and len(splits) > 1):
            raise UserError(
                f'{root}: several annotation files, and not one for each split:',
                doubles or [shown(path, root) for path in found],
                'name the one JSON file to read, or keep only files whose names tell train, val and test apart',
            )
        return root, {split: splits[split][0] for split in _SPLITS if split in splits}

    def _check_classes(self) -> None:
        if not self.classes:
            raise UserError(
                f'{self.root}: no categories in ' + ', '.join(shown(file.path, self.root) for file in self._files)
            )
        for file in self._files:
            missing = [name for name in self.classes if name not in file.names.values()]
            if missing:
                self.notes.append(
                    f'{shown(file.path, self.root)}: lacks the categories {", ".join(missing)} of the others; added'
                )

    def _image_root(self, file: CocoIndex, named: Path | None) -> Path:
        """The folder in which most of a sample of a file's images are."""
        names = [name for name in file.file_names if _usable(name)]
        sample = names[:: max(1, len(names) // _SAMPLES)][:_SAMPLES]
        folders = [named] if named else _image_folders(file, self.root)
        hits = [sum(_find(folder, name, self.root)[1] for name in sample) for folder in folders]
        if max(hits, default=0):
            return folders[hits.index(max(hits))]
        if self._trust_sizes:
            stems = (file.path.stem.removeprefix('instances_'), file.split)
            return named or next((f for f in folders if f.name in stems), self.root)
        first = sample[0] if sample else 'an image'
        raise UserError(
            f'{shown(file.path, self.root)}: none of its images is there. Looked for {first} in',
            [str(folder) for folder in folders],
            'name their folder with --image-root',
        )

    def items(self) -> list[Item]:
        """See `Source.items`: by split, in natural order of the file names."""
        items, elsewhere = [], 0
        for number, file in enumerate(self._files):
            name_of_file = shown(file.path, self.root)
            own = []
            for place, name in enumerate(file.file_names):
                where = f'{name_of_file}: image {file.ids[place]}'
                if not _usable(name):
                    self.problems.append(f'{where}: file_name is {name!r:.60}')
                    continue
                if self._trust_sizes:
                    path = file.image_root / name
                else:
                    path, _ = _find(file.image_root, name, self.root)
                    elsewhere += path != file.image_root / name
                own.append(Item(f'{where} ({name})', path, (number, place), file.split))
            items += sorted(own, key=lambda item: natural_key(item.image))
        if elsewhere:
            self.notes.append(
                f'{elsewhere} images found by the end of their file_name (absolute, with .. or of another folder)'
            )
        return items

    def read(self, item: Item) -> Record:
        """See `Source.read`."""
        number, place = item.label
        file = self._files[number]
        image = file.slices.value(*file.images[place].tolist())
        width, height = image.get('width'), image.get('height')
        extra = {key: value for key, value in image.items() if key not in _IMAGE_CORE}
        record = Record(item.image, 0, 0, [], item.split, extra=extra)
        if self._keeps_ids[number]:
            record.image_id = file.ids[place]
        problem = self._set_size(record, width, height)
        if problem:
            record.problems.append(f'{item.key}: {problem}')
            return record
        for start, end in file.annotations[file.firsts[place] : file.firsts[place + 1]].tolist():
            annotation = file.slices.value(start, end)
            name = f'annotation {annotation.get("id")!r:.20}'
            try:
                record.instances.append(self._instance(annotation, file, name))
            except ValueError as error:
                record.problems.append(f'{item.key}: {name}: {error}')
        return record

    def _set_size(self, record: Record, width: Any, height: Any) -> str | None:
        """Give the record its size; returns what is wrong with it."""
        named = None
        if width is not None or height is not None:
            named = (_positive(width), _positive(height))
            if None in named:
                return f'its size is {width!r:.20} x {height!r:.20}'
        if self._trust_sizes:
            if not named:
                return 'it has no width and height'
            record.width, record.height = named
            return None
        try:
            record.width, record.height = size = image_size(record.image)
        except ValueError as error:
            return f'{shown(record.image, self.root)}: {error}'
        if named and named != size:
            hint = ' (turned by its EXIF orientation, after it was annotated?)' if named == size[::-1] else ''
            return (
                f'{shown(record.image, self.root)}: is {size[0]}x{size[1]}, but the annotation '
                f'file says {named[0]}x{named[1]}{hint}'
            )
        return None

    def _instance(self, annotation: dict[str, Any], file: CocoIndex, place: str) -> Instance:
        """An annotation as an instance; raises ValueError with what is wrong."""
        category = as_id(annotation.get('category_id'))
        if category not in file.names:
            raise ValueError(f'unknown category_id {annotation.get("category_id")!r:.40}')
        iscrowd = annotation.get('iscrowd') or 0
        if iscrowd not in (0, 1):
            raise ValueError(f'iscrowd is {iscrowd!r:.20}, not 0 or 1')
        shape = annotation.get('segmentation')
        if isinstance(shape, list) and shape and not isinstance(shape[0], list):
            shape = [shape]
        if isinstance(shape, list):
            shape = [_flat(polygon) for polygon in shape]
        if not shape or (isinstance(shape, list) and not any(shape)):
            if not self._boxes:
                raise ValueError('no segmentation, only a box')
            shape = [_rectangle(annotation.get('bbox'))]
        if not isinstance(shape, (list, dict)):
            raise ValueError(f'its segmentation {shape!r:.40} is neither polygons nor RLE')
        extra = {key: value for key, value in annotation.items() if key not in _CORE}
        return Instance(file.names[category], shape, bool(iscrowd), place, extra)


class Coco2017Source(CocoSource):
    """COCO 2017 as its archives unpack: instances_{train,val}2017.json and the image folders."""

    kind = 'coco2017'

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """See `Source.recognise`."""
        try:
            found = [split for split, path in _official(root).items() if (root / f'{split}2017').is_dir()]
        except OSError:
            return None
        return ' and '.join(f'annotations/instances_{split}2017.json beside {split}2017/' for split in found) or None

    @classmethod
    def _choose(cls, root: Path) -> tuple[Path, dict[str | None, Path]]:
        found = _official(root)
        if not found:
            raise UserError(
                f'{root}: no annotations/instances_{{train,val}}2017.json here',
                cure='name the folder that holds annotations/, train2017/ and val2017/',
            )
        return root, found


def _official(root: Path) -> dict[str | None, Path]:
    paths = {split: root / 'annotations' / f'instances_{split}2017.json' for split in ('train', 'val')}
    return {split: path for split, path in paths.items() if path.is_file()}


def _candidates(root: Path) -> list[Path]:
    return [path for path in _json_files(root)[:_MAX_SNIFFED] if _is_coco(path)]


def _json_files(root: Path) -> list[Path]:
    """JSON files in the places where data sets have their COCO JSON."""
    folders = [root, root / 'annotations']
    folders += sorted(folder for folder in root.iterdir() if folder.is_dir() and split_of([folder.name]))
    paths = [path for folder in folders for path in sorted(folder.glob('*.json')) if not path.name.startswith('.')]
    # COCO's archive has captions and keypoints of the same images beside the instances.
    instances = [path for path in paths if path.name.startswith('instances_')]
    return instances or paths


def _is_coco(path: Path) -> bool:
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
    """The split that the name of an annotation file tells, or else that of its folder."""
    return split_of(re.split(r'[^A-Za-z0-9]+', path.stem)) or split_of([path.parent.name])


def _common_ids(files: Sequence[CocoIndex]) -> dict[str, int]:
    """Category ids by name, if all files give the same and they are integers."""
    ids: dict[str, int] = {}
    for file in files:
        for category, name in file.names.items():
            if not isinstance(category, int) or ids.setdefault(name, category) != category:
                return {}
    return ids


def _image_folders(file: CocoIndex, root: Path) -> list[Path]:
    """Folders in which data sets keep the images of an annotation file."""
    stem = file.path.stem.removeprefix('instances_')
    # A name that tells the split comes first: names may be the same in all splits.
    names = dict.fromkeys(name for name in (stem, file.split) if name)
    below = [*(f'images/{name}' for name in names), *names, '.', 'images', 'JPEGImages', 'img']
    folders = [Path(os.path.normpath(folder / name)) for folder in (file.path.parent, root) for name in below]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _usable(name: Any) -> bool:
    if not isinstance(name, str) or not name.strip() or '\0' in name:
        return False
    try:
        data = name.encode()
    except UnicodeEncodeError:
        return False
    return len(data) <= _MAX_PATH and max(map(len, data.split(b'/'))) <= _MAX_NAME


def _find(folder: Path, name: str, root: Path) -> tuple[Path, int]:
    """The image that a file_name means, and how it was found: 2 as named, 1 otherwise, 0 not.

    A name that leads nowhere or out of the data set (absolute, on another machine, with `..`, with
    `\\`, as a URL) is looked for by its end: all of its folders, then fewer and fewer of them.
    """
    inside = tuple(os.path.normpath(place) + os.sep for place in (folder, root))
    path = Path(os.path.normpath(folder / name))
    if str(path).startswith(inside) and path.is_file():
        return path, 2
    for spelling in dict.fromkeys((name, name.replace('\\', '/'), unquote(name))):
        parts = [part for part in PurePosixPath(spelling).parts if part not in ('..', '/')]
        for first in range(len(parts)):
            if (end := folder.joinpath(*parts[first:])).is_file():
                return end, 1
    return folder / (PurePosixPath(name.replace('\\', '/')).name or name), 0


def _positive(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value <= _MAX_SIDE else None


def _flat(polygon: Any) -> Any:
    """A polygon of [x, y] pairs as x, y, x, y, ...; anything else as it is."""
    if isinstance(polygon, list) and polygon and all(isinstance(point, list) and len(point) == 2 for point in polygon):
        return [value for point in polygon for value in point]
    return polygon


def _rectangle(box: Any) -> list[float]:
    """A box x, y, width, height as a polygon."""
    if not (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in (int, float) and math.isfinite(value) for value in box)
    ):
        raise ValueError(f'its bbox is {box!r:.60}, not four numbers')
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise ValueError(f'its bbox is {width:g} x {height:g} pixels')
    return [x, y, x + width, y, x + width, y + height, x, y + height]
