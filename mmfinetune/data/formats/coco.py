"""COCO JSON from anywhere, checked and made regular; the layout of COCO 2017."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mmfinetune.data import coco_json
from mmfinetune.data.coco_json import as_id
from mmfinetune.data.formats.coco_files import (
    candidates,
    choose_files,
    find_image,
    image_folders,
    is_coco,
    is_usable,
    official_files,
)
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import is_within, is_writable, natural_key, shown
from mmfinetune.utils.images import MOST_SIDE, image_size, require_readable
from mmfinetune.utils.text import brief, is_number, is_text

_CORE = frozenset({'id', 'image_id', 'category_id', 'segmentation', 'area', 'bbox', 'iscrowd'})
_IMAGE_CORE = frozenset({'id', 'file_name', 'width', 'height'})
_SAMPLES = 20  # image names that are looked up to find the folder of the images
_MAX_ID = 1 << 53  # what every JSON reader keeps exact


@dataclass
class _File:
    """An annotation file.

    Attributes:
        names: Category names by id, in the file's order.
        groups: Supercategories by name.
        ids: Image ids; integers where they can be read as such.
        annotations: The annotations of each image, in the order of `ids`.
        problems: Why the file cannot be used at all.
        strays: Annotations that belong to no image of the file.
        image_root: Folder that file names are relative to.
    """

    path: Path
    split: str | None
    coco: coco_json.Coco
    names: dict[Any, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    ids: list[Any] = field(default_factory=list)
    annotations: list[list[dict]] = field(default_factory=list)
    problems: list[Message] = field(default_factory=list)
    strays: list[Message] = field(default_factory=list)
    image_root: Path = Path()


class CocoReader(Reader):
    """COCO JSON files, one for each split, or a single one.

    Ids may be integers, floats or strings, with gaps, from 0; image and category ids are kept
    where they are usable integers (image ids from 0, category ids from 1 and ascending),
    annotation ids are always new. Boxes and areas are not read but made from the masks.
    """

    hint = (
        'correct the annotation files (for boxes to treat as rectangular masks use --boxes-as-masks; what '
        '`python tools/check_dataset.py FILE --fix OUT` can correct, sizes before EXIF turned the images too, it does)'
    )

    def __init__(self, root: Path, files: list[_File], options: dict[str, Any]) -> None:
        super().__init__(root, list(dict.fromkeys(name for file in files for name in file.names.values())))
        self._files = files
        self._by_end: dict[str, set[str]] | None = None  # image names by their last part
        self._boxes, self._relative = bool(options.get('boxes_as_masks')), bool(options.get('relative'))
        self._crowd_as_objects = bool(options.get('crowd_as_objects'))
        self._trust_sizes = bool(options.get('trust_sizes'))
        self._roots = [root, *filter(None, [options.get('image_root')])]
        self._keeps_ids = [all(isinstance(i, int) and 0 <= i < _MAX_ID for i in file.ids) for file in files]
        self.category_ids = _common_ids(files)
        self._leave_out_root()
        for file in files:
            name, data = shown(file.path, root), file.coco.data
            self.supercategories |= file.groups
            wanted = (('info', dict), ('licenses', list))
            self.headers[file.split] = {
                key: data[key] for key, kind in wanted if isinstance(data.get(key), kind) and is_writable(data[key])
            }
            self.problems += [stray.at(name) for stray in file.strays]
            ids = {as_id(annotation.get('id')) for annotation in file.coco.annotations} - {None}
            if repeated := len(file.coco.annotations) - len(ids):
                self.notes.append(Message('coco-ids-new', place=name, count=repeated))
            if missing := [category for category in self.classes if category not in file.names.values()]:
                self.notes.append(Message('coco-categories-added', place=name, names=', '.join(missing)))

    def _leave_out_root(self) -> None:
        """Leave out categories without objects that only stand above the others, as Roboflow writes one."""
        used = {file.names.get(as_id(a.get('category_id'))) for file in self._files for a in file.coco.annotations}
        above = {group for file in self._files for name, group in file.groups.items() if group != name}
        roots = [name for name in self.classes if name in above and name not in used]
        if roots and len(roots) < len(self.classes):
            self.classes = [name for name in self.classes if name not in roots]
            self.notes.append(Message('coco-root-category', names=', '.join(roots)))

    @classmethod
    def detect(cls, root: Path) -> str | None:
        if root.is_file():
            return 'a COCO JSON file' if is_coco(root) else None
        # Tools write their COCO JSON into these data sets; the true labels are the PNGs.
        other = any((root / name).is_dir() for name in ('SegmentationObject', 'gtFine'))
        if other or Coco2017Reader.detect(root) or not (found := candidates(root)):
            return None
        more = f' and {len(found) - 1} more' if len(found) > 1 else ''
        return f'{shown(found[0], root)}{more} with images, annotations and categories'

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> CocoReader:
        """See `Reader.open`.

        Options: `boxes_as_masks`, `image_root`, `trust_sizes`, `relative` (coordinates from 0 to 1),
        `crowd_as_objects` (`iscrowd` is not what COCO means by it).
        """
        root, chosen = cls._choose(root)
        files = [_read(path, split, bool(options.get('boxes_as_masks'))) for split, path in chosen.items()]
        for file in files:
            if not options.get('relative') and _is_relative(file.coco):
                file.problems.append(Message('coco-relative'))
        if problems := [line.at(shown(file.path, root)) for file in files for line in file.problems]:
            raise UserError('coco-files', problems=problems, path=root)
        reader = cls(root, files, options)
        for file in files:
            file.image_root = reader._image_root(file, options.get('image_root'))
        return reader

    _choose = staticmethod(choose_files)

    def _image_root(self, file: _File, named: Path | None) -> Path:
        """The folder in which most of a sample of a file's images are."""
        names: list[str] = [name for image in file.coco.images if is_usable(name := image.get('file_name', ''))]
        sample = names[:: max(1, len(names) // _SAMPLES)][:_SAMPLES]
        folders = [named] if named else image_folders(file.path, file.split, self.root)
        hits = [sum(find_image(folder, name, self.root)[1] for name in sample) for folder in folders]
        if max(hits, default=0):
            return folders[hits.index(max(hits))]
        if self._trust_sizes:
            stems = (file.path.stem.removeprefix('instances_'), file.split)
            return named or next((folder for folder in folders if folder.name in stems), self.root)
        facts: dict[str, Any] = dict(path=shown(file.path, self.root), image=sample[0] if sample else None)
        raise UserError('coco-images-missing', problems=map(str, folders), **facts)

    def items(self) -> list[Item]:
        """See `Reader.items`: by split, in natural order of the file names."""
        items, elsewhere = [], 0
        for number, file in enumerate(self._files):
            own = []
            for place, image in enumerate(file.coco.images):
                name: Any = image.get('file_name')
                where = f'{shown(file.path, self.root)}: image {file.ids[place]}'
                if not is_usable(name):
                    self.problems.append(Message('coco-image-name', place=where, name=brief(name)))
                    continue
                path = file.image_root / name
                if not self._trust_sizes or not is_within(path, file.image_root, self.root):
                    found, is_there = find_image(file.image_root, name, self.root)
                    if self._trust_sizes and not is_there:
                        self.problems.append(Message('coco-image-outside', place=where, name=name))
                        continue
                    by_end = is_there and str(found) != os.path.normpath(path)
                    if by_end and (other := self._other_of(found.relative_to(file.image_root), name)):
                        facts = dict(found=shown(found, self.root), other=other)
                        self.problems.append(Message('coco-image-ambiguous', place=where, **facts))
                        continue
                    path, elsewhere = found, elsewhere + (found != path)
                own.append(Item(f'{where} ({name})', path, (number, place), file.split))
            items += sorted(own, key=lambda item: natural_key(item.image))
        if elsewhere:
            self.notes.append(Message('coco-images-elsewhere', count=elsewhere))
        return items

    def _other_of(self, end: Path, name: str) -> str:
        """Another image name that ends in this path: to choose one of two cameras', say, would be a guess."""
        if self._by_end is None:
            self._by_end = {}
            for file in self._files:
                for image in file.coco.images:
                    other: Any = image.get('file_name')
                    if is_usable(other):
                        self._by_end.setdefault(PurePosixPath(_slashes(other)).name, set()).add(other)
        others = sorted(self._by_end[PurePosixPath(_slashes(name)).name] - {name})
        return next((other for other in others if f'/{_slashes(other)}'.endswith(f'/{end.as_posix()}')), '')

    def read(self, item: Item) -> Record:
        number, place = item.label
        file = self._files[number]
        image = file.coco.images[place]
        record = Record(item.image, 0, 0, extra={k: v for k, v in image.items() if k not in _IMAGE_CORE})
        if self._keeps_ids[number]:
            record.image_id = file.ids[place]
        with record.collecting(item.key):
            record.width, record.height = self._size(item.image, image)
            for annotation in file.annotations[place]:
                name = f'annotation {brief(annotation.get("id"))}'
                with record.collecting(f'{item.key}: {name}'):
                    record.instances.append(self._instance(annotation, file.names, name, (record.width, record.height)))
        return record

    def _size(self, path: Path, image: dict[str, Any]) -> tuple[int, int]:
        """Width and height of an image; raises Problem."""
        width, height = image.get('width'), image.get('height')
        named = None
        if width is not None or height is not None:
            named = _positive(width), _positive(height)
            if 0 in named:
                raise Problem('coco-size', width=brief(width), height=brief(height))
        if self._trust_sizes:
            if not named:
                raise Problem('coco-no-size')
            self._check_trusted(path)
            return named
        try:
            size = image_size(path)
        except Problem as problem:
            raise problem.at(shown(path, self.root)) from None
        if named and named != size:
            code = 'coco-size-turned' if named == size[::-1] else 'coco-other-size'
            sizes = dict(found=f'{size[0]}x{size[1]}', named=f'{named[0]}x{named[1]}')
            raise Problem(code, image=shown(path, self.root), **sizes)
        return size

    def _check_trusted(self, path: Path) -> None:
        """Refuse what cannot be the image that was measured; raises Problem. It may be missing yet."""
        if not path.exists():
            return
        try:
            require_readable(path)
            # One's own data may have links (DVC, a folder on another disk); a stranger's could lead to any file.
            if not is_within(os.path.realpath(path), *self._roots):
                image_size(path)
        except Problem as problem:
            raise problem.at(shown(path, self.root)) from None

    def _instance(
        self, annotation: dict[str, Any], names: dict[Any, str], place: str, size: tuple[int, int]
    ) -> Instance:
        """An annotation as an instance; raises Problem."""
        category = as_id(annotation.get('category_id'))
        if category not in names:
            raise Problem('coco-category-unknown', category=brief(annotation.get('category_id')))
        iscrowd = annotation.get('iscrowd') or 0
        if iscrowd not in (0, 1):
            raise Problem('coco-iscrowd', value=brief(iscrowd))
        shape = annotation.get('segmentation')
        if isinstance(shape, list) and shape and not isinstance(shape[0], list):
            shape = [shape]
        if isinstance(shape, list):
            shape = [_flat(polygon) for polygon in shape]
        if not shape or (isinstance(shape, list) and not any(shape)):
            if not self._boxes:
                raise Problem('coco-only-box')
            shape = [_rectangle(annotation.get('bbox'))]
        if not isinstance(shape, (list, dict)):
            raise Problem('coco-segmentation', value=brief(shape))
        if self._relative and isinstance(shape, list):
            shape = [_scaled(polygon, size) for polygon in shape]
        iscrowd = iscrowd and not self._crowd_as_objects
        extra = {key: value for key, value in annotation.items() if key not in _CORE}
        return Instance(names[category], shape, bool(iscrowd), place, extra)


class Coco2017Reader(CocoReader):
    """COCO 2017 as its archives unpack: instances_{train,val}2017.json and the image folders."""

    @classmethod
    def detect(cls, root: Path) -> str | None:
        found = [split for split in official_files(root) if (root / f'{split}2017').is_dir()]
        return ' and '.join(f'annotations/instances_{split}2017.json next to {split}2017/' for split in found) or None

    @staticmethod
    def _choose(root: Path) -> tuple[Path, dict[str | None, Path]]:
        if not (found := official_files(root)):
            raise UserError('coco2017-missing', path=root)
        return root, found


def _read(path: Path, split: str | None, boxes: bool) -> _File:
    """Read an annotation file; what makes all of it useless is in `problems`."""
    coco = coco_json.read(path)
    file = _File(path, split, coco)
    file.problems = [fault for fault in coco.faults if fault.code != 'coco-encoding' or not coco.images]
    if file.problems:
        return file
    _read_categories(file)
    for image in coco.images:
        if (image_id := as_id(image.get('id'))) is None:
            facts = dict(name=brief(image.get('file_name')), value=brief(image.get('id')))
            file.problems.append(Message('coco-image-id', **facts))
        file.ids.append(image_id)
    for image_id, count in Counter(file.ids).items():
        if count > 1 and image_id is not None:
            file.problems.append(Message('coco-image-id-repeated', value=image_id, count=count))
    if not boxes and not any(annotation.get('segmentation') for annotation in coco.annotations):
        file.problems.append(Message('coco-no-masks', count=len(coco.annotations)))
    by_id: dict[Any, list[dict]] = {image_id: [] for image_id in file.ids}
    for annotation in coco.annotations:
        owner = as_id(annotation.get('image_id'))
        if owner in by_id:
            by_id[owner].append(annotation)
        else:
            facts = dict(value=brief(annotation.get('id')), image=brief(annotation.get('image_id')))
            file.strays.append(Message('coco-stray', **facts))
    file.annotations = list(by_id.values())
    return file


def _read_categories(file: _File) -> None:
    for category in file.coco.categories:
        category_id, name = as_id(category.get('id')), category.get('name')
        if category_id is None or not isinstance(name, str) or not name.strip():
            file.problems.append(Message('coco-category', category=brief(category)))
            continue
        name = name.strip()
        if category_id in file.names:
            facts = dict(value=category_id, name=file.names[category_id], other=name)
            file.problems.append(Message('coco-category-id-repeated', **facts))
        elif name in file.names.values():
            file.problems.append(Message('coco-category-repeated', name=name))
        file.names[category_id] = name
        if isinstance(group := category.get('supercategory'), str) and is_text(group):
            file.groups[name] = group


def _common_ids(files: Sequence[_File]) -> dict[str, int]:
    """Category ids by name, if all files give the same and they are integers."""
    pairs = {(name, category) for file in files for category, name in file.names.items()}
    ids = dict(pairs)
    return ids if len(ids) == len(pairs) and all(isinstance(category, int) for category in ids.values()) else {}


def _positive(value: Any) -> int:
    """A side of an image in pixels; 0 if it cannot be one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value <= MOST_SIDE else 0


def _flat(polygon: Any) -> Any:
    """A polygon of [x, y] pairs as x, y, x, y, ...; anything else as it is."""
    if isinstance(polygon, list) and polygon and all(isinstance(point, list) and len(point) == 2 for point in polygon):
        return [value for point in polygon for value in point]
    return polygon


def _is_relative(coco: coco_json.Coco) -> bool:
    """Whether all polygons have coordinates from 0 to 1."""
    shapes = (annotation.get('segmentation') for annotation in coco.annotations)
    parts = (part for shape in shapes if isinstance(shape, list) for part in shape)
    values = [value for part in itertools.islice(parts, _SAMPLES) for value in _numbers_in(part)]
    if not values or not all(0 <= value <= 1 for value in values):
        return False
    return all(0 <= value <= 1 for part in parts for value in _numbers_in(part))


def _numbers_in(part: Any) -> list:
    flat = _flat(part) if isinstance(part, list) else [part]
    return [value for value in flat if type(value) in (int, float)]


def _scaled(polygon: Any, size: tuple[int, int]) -> Any:
    """A polygon of parts of the image's size in pixels; what is not one as it is, to be refused later."""
    if not isinstance(polygon, list) or any(type(value) not in (int, float) for value in polygon):
        return polygon
    return [value * size[i % 2] for i, value in enumerate(polygon)]


def _slashes(name: str) -> str:
    return name.replace('\\', '/')


def _rectangle(box: Any) -> list[float]:
    """A box x, y, width, height as a polygon; raises Problem."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        raise Problem('coco-box', box=brief(box))
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise Problem('coco-box-empty', width=width, height=height)
    return [x, y, x + width, y, x + width, y + height, x, y + height]
