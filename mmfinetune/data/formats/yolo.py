"""YOLO segmentation labels: a data.yaml or class list, and one text file of polygons an image."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmfinetune.data.formats.folders import CLASS_LISTS, find_class_list, split_of
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import find_files, is_within, natural_key, read_text, read_yaml, shown
from mmfinetune.utils.images import find_images
from mmfinetune.utils.text import brief, is_text

_MAX_CLASSES = 100_000
_MAX_PATH = 4096  # characters
_SPLIT_KEYS = {'train': 'train', 'val': 'val', 'validation': 'val', 'valid': 'val', 'test': 'test'}
# How far out of 0..1 a coordinate may be: what Ultralytics itself lets pass (verify_image_label).
_SLACK = 0.01
_NOT_LABELS = frozenset({*CLASS_LISTS, 'train.txt', 'val.txt', 'test.txt', 'readme.txt'})


class YoloReader(Reader):
    """Images, and next to `images/` a folder `labels/` with a text file of the same name for each.

    A line is a class number and a polygon `x1 y1 x2 y2 ...` in parts of the image's size. An
    image with no or an empty file has no objects. Ultralytics joins the parts of an object to one
    polygon by bridges of no width; it stays as it is, since a bridge covers no pixel.
    """

    hint = 'correct these label files; for boxes to treat as rectangular masks use --boxes-as-masks'

    def __init__(self, root: Path, classes: list[str], splits: dict[str | None, list[Path]], boxes: bool) -> None:
        super().__init__(root, classes)
        self._splits, self._boxes = splits, boxes

    @classmethod
    def detect(cls, root: Path) -> str | None:
        for path in _yaml_files(root):
            with contextlib.suppress(UserError):
                data = _load_yaml(path)
                if data.keys() & {'names', 'nc'} and data.keys() & _SPLIT_KEYS.keys():
                    return f'{shown(path, root)} with class names and image folders'
        for folder in (root / 'labels', *sorted(root.glob('*/labels'))):
            if folder.is_dir() and (folder.parent / 'images').is_dir():
                for path in find_files(folder, {'.txt'}):
                    if path.name not in _NOT_LABELS and _is_label_file(path):
                        return f'images/ and labels/ with lines of numbers ({shown(path, root)})'
        return None

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> YoloReader:
        """See `Reader.open`.

        Options: `boxes_as_masks`, `classes` if the data set names none, `image_root`, where it names images elsewhere.
        """
        notes: list[Message] = []
        root = Path(os.path.normpath(root))  # as the paths of images are
        path = root if root.is_file() else _only_yaml(root)
        if path:
            root = path.parent
            data = _load_yaml(path)
            if 'kpt_shape' in data:
                raise UserError('yolo-pose', path=path)
            classes, splits = _names(data, path), _images_of_splits(data, path, options.get('image_root'))
            # Ultralytics' own VOC.yaml is such a one.
            if 'test' in splits and set(splits['test']) == set(splits.get('val', ())):
                notes.append(Message('yolo-test-is-val'))
                del splits['test']
            paths = [image for images in splits.values() for image in images]
            if elsewhere := [image for image in paths if not is_within(image, root)]:
                notes.append(Message('yolo-elsewhere', count=len(elsewhere), folder=elsewhere[0].parent))
        else:
            classes, splits = _listed_classes(root, options), {}
            for image in find_images(root):
                split = split_of(image.relative_to(root).parts[:-1])
                splits.setdefault(split, []).append(image)
        if not any(splits.values()):
            raise UserError('yolo-no-images', path=path or root)
        reader = cls(root, classes, splits, bool(options.get('boxes_as_masks')))
        reader.notes = notes
        reader._check_labels()
        return reader

    def _check_labels(self) -> None:
        """Note what belongs to no single image: images without labels, labels without an image."""
        images = [image for images in self._splits.values() for image in images]
        labels = {image: _label_path(image, self.root) for image in images}
        there = {label for label in labels.values() if os.path.lexists(label)}
        if not there:
            image, label = shown(images[0], self.root), shown(labels[images[0]], self.root)
            raise UserError('yolo-no-labels', path=self.root, count=len(images), image=image, label=label)
        if background := sum(label not in there for label in labels.values()):
            self.notes.append(Message('yolo-background', count=background, images=len(images)))
        # Only folders called labels: elsewhere a text file may be anything.
        folders = {label.parent for image, label in labels.items() if label.parent != image.parent}
        texts = {path for folder in folders for path in find_files(folder, {'.txt'})}
        spare = {path for path in texts - there if path.name not in _NOT_LABELS}
        if spare:
            # An image may be there that no split names.
            spare -= {_label_path(image, self.root) for image in find_images(self.root)}
        for path in sorted(spare, key=natural_key):
            self.problems.append(Message('yolo-no-image', place=shown(path, self.root)))

    def items(self) -> list[Item]:
        return [
            Item(shown(image, self.root), image, _label_path(image, self.root), split)
            for split, images in self._splits.items()
            for image in images
        ]

    def read(self, item: Item) -> Record:
        record = self.start(item)
        if record.problems or not os.path.lexists(item.label):
            return record
        name = shown(item.label, self.root)
        lines: list[str] = []
        with record.collecting(name):
            lines = read_text(item.label).splitlines()
        first_of: dict[tuple[str, ...], int] = {}
        for number, line in enumerate(lines, start=1):
            words = tuple(line.split())
            if not words:
                continue
            place = f'{name}, line {number}'
            if (first := first_of.setdefault(words, number)) != number:
                record.notes.append(Message('yolo-line-repeated', place=place, first=first))
                continue
            with record.collecting(place):
                label, polygon, outside = self._object(words, record.width, record.height)
                if outside > 1:
                    record.notes.append(Message('yolo-outside', place=place, pixels=outside))
                record.instances.append(Instance(label, [polygon], place=f'line {number}'))
        return record

    def _object(self, words: tuple[str, ...], width: int, height: int) -> tuple[str, list[float], float]:
        """Class, polygon in pixels, and how far it was out; raises Problem."""
        try:
            number, *values = (float(word) for word in words)
        except ValueError:
            word = next(word for word in words if not _is_number(word))
            raise Problem('yolo-word', word=word[:20]) from None
        if not all(map(math.isfinite, (number, *values))):
            raise Problem('yolo-nan')
        if number != int(number) or not 0 <= number < len(self.classes):
            raise Problem('yolo-class', number=words[0], last=len(self.classes) - 1)
        if len(values) == 4:
            if not self._boxes:
                raise Problem('yolo-box')
            x, y, w, h = values
            left, right, top, bottom = x - w / 2, x + w / 2, y - h / 2, y + h / 2
            values = [left, top, right, top, right, bottom, left, bottom]
        elif len(values) % 2:
            raise Problem('yolo-odd', count=len(values))
        elif len(values) < 6:
            raise Problem('yolo-points', count=len(values) // 2)
        wrong = [value for value in values if not -_SLACK <= value <= 1 + _SLACK]
        if wrong:
            raise Problem('yolo-pixels' if max(wrong) > 2 else 'yolo-coordinate', value=wrong[0])
        cut = [min(max(value, 0.0), 1.0) for value in values]
        sides = (width, height) * (len(values) // 2)
        outside = max(abs(value - inside) * side for value, inside, side in zip(values, cut, sides, strict=True))
        polygon = [value * side for value, side in zip(cut, sides, strict=True)]
        return self.classes[int(number)], polygon, outside


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_label_file(path: Path) -> bool:
    words: list[str] = []
    with contextlib.suppress(Problem):
        words = read_text(path).split('\n', 1)[0].split()
    return len(words) >= 5 and all(map(_is_number, words)) and float(words[0]).is_integer()


def _label_path(image: Path, root: Path) -> Path:
    """Where the labels of an image are: its last folder `images` becomes `labels`."""
    parts = list(image.parts[:-1])
    # Folders above the data set do not count, unless the image is outside it.
    above = len(root.parts) if image.is_relative_to(root) else 0
    for place in reversed(range(above, len(parts))):
        if parts[place] == 'images':
            parts[place] = 'labels'
            break
    return Path(*parts, image.name).with_suffix('.txt')


def _yaml_files(root: Path) -> list[Path]:
    paths = root.iterdir() if root.is_dir() else [root]
    return sorted(path for path in paths if path.suffix in ('.yaml', '.yml') and path.is_file())


def _only_yaml(root: Path) -> Path | None:
    """The YAML file of a data set; None if there is none.

    Raises:
        UserError: Several could be it.
    """
    files = _yaml_files(root)
    by_name = {path.name: path for path in files}
    for name in ('data.yaml', 'data.yml', 'dataset.yaml', 'dataset.yml', f'{root.name}.yaml'):
        if name in by_name:
            return by_name[name]
    if len(files) > 1:
        raise UserError('yolo-yamls', problems=[path.name for path in files], path=root)
    return files[0] if files else None


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        data = read_yaml(path)
    except Problem as problem:
        raise UserError('yolo-unreadable', problems=[problem.message], path=path) from None
    if not isinstance(data, dict):
        raise UserError('yolo-no-keys', path=path)
    return data


def _names(data: dict[str, Any], path: Path) -> list[str]:
    """The classes of a data.yaml in label order; raises UserError."""
    names, count = data.get('names'), data.get('nc')
    if names is None and isinstance(count, int) and 0 < count <= _MAX_CLASSES:
        return [f'class_{number}' for number in range(count)]
    problems = []
    if isinstance(names, dict):
        wanted = list(range(len(names)))
        try:
            names = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError, OverflowError):
            names = {}
        if sorted(names) != wanted:
            problems.append(Message('yolo-name-keys', last=len(wanted) - 1))
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, list) or not names:
        problems.append(Message('yolo-names'))
        names = []
    problems += [Message('yolo-name', name=brief(name)) for name in names if not _is_name(name)]
    if problems:
        raise UserError('yolo-classes', problems=problems, path=path)
    names = [str(name).strip() for name in names]
    repeated = ((name, times) for name, times in Counter(names).items() if times > 1)
    problems += [Message('yolo-name-repeated', name=name, times=times) for name, times in repeated]
    if count is not None and names and count != len(names):
        problems.append(Message('yolo-count', nc=brief(count), names=len(names)))
    if problems:
        raise UserError('yolo-classes', problems=problems, path=path)
    return names


def _is_name(name: Any) -> bool:
    # YAML reads no, yes, on, off as truth values.
    if isinstance(name, (int, float)):
        return not isinstance(name, bool) and abs(name) < _MAX_CLASSES
    return isinstance(name, str) and name != '' and is_text(name)


def _listed_classes(root: Path, options: dict[str, Any]) -> list[str]:
    if listed := find_class_list(root) or find_class_list(root / 'labels'):
        return listed[1]
    if options.get('classes'):
        return list(options['classes'])
    raise UserError('yolo-no-classes', path=root)


def _images_of_splits(data: dict[str, Any], path: Path, images: Path | None) -> dict[str | None, list[Path]]:
    """The images of each split of a data.yaml, all in its folder, in what it calls its `path`, or in `images`.

    Raises:
        UserError: Folders, lists or listed images that are missing or elsewhere.
    """
    splits: dict[str | None, list[Path]] = {}
    problems: list[Message] = []
    bases = [*filter(None, [images]), *_bases(data.get('path'), path)]
    for key, split in _SPLIT_KEYS.items():
        entries = data.get(key)
        if not entries or split in splits:
            continue
        found: dict[Path, None] = {}
        for entry in entries if isinstance(entries, list) else [entries]:
            place = _resolve(bases, entry, bases) if isinstance(entry, str) and entry.strip() else None
            if place is None:
                problems.append(Message('yolo-entry-missing', key=key, entry=_shown(entry)))
            elif not is_within(place, *bases):
                problems.append(Message('yolo-entry-outside', key=key, entry=_shown(entry), found=place))
            elif place.is_dir():
                found |= dict.fromkeys(find_images(place))
            else:
                found |= dict.fromkeys(_listed_images(place, bases, problems))
        splits[split] = list(found)
        if not found and not problems:
            problems.append(Message('yolo-entry-empty', key=key, entries=_shown(entries)))
    if not splits:
        problems.append(Message('yolo-no-splits'))
    if problems:
        raise UserError('yolo-images', problems=problems, path=path, folders=', '.join(map(str, bases)))
    return splits


def _bases(given: Any, path: Path) -> list[Path]:
    """Folders that the entries of a data.yaml may be relative to, the likeliest first.

    `path` in it is often that of another machine, or relative to a folder of Ultralytics' own.
    """
    bases = [path.parent / given, path.parent.parent / given] if isinstance(given, str) and given else []
    # Not is_dir() or resolve(), for which a name may be too long or hold a NUL.
    bases = [base for base in dict.fromkeys([*bases, path.parent]) if os.path.isdir(base)]  # noqa: PTH112
    # A whole disk is no data set.
    return [base for base in bases if len(base.resolve().parts) > 1]


def _shown(entry: Any) -> str:
    return entry if isinstance(entry, str) and len(entry) <= _MAX_PATH else brief(entry)


def _resolve(bases: Iterable[Path], entry: str, roots: list[Path]) -> Path | None:
    """What an entry means, in one of the roots if possible; None if there is nothing of that name."""
    found = None
    entry = entry.strip().replace('\\', '/')
    # Roboflow writes ../train/images for a folder next to the data.yaml; Ultralytics accepts it too.
    for name in (entry, entry.removeprefix('../')):
        for base in bases:
            # Not resolve(): a linked data set keeps its own name.
            place = Path(os.path.normpath(base / name))
            if os.path.exists(place):  # noqa: PTH110 (no name is too long for it)
                if is_within(place, *roots):
                    return place
                found = found or place
    return found


def _listed_images(path: Path, bases: list[Path], problems: list[Message]) -> list[Path]:
    """The images that a text file names, relative to it, to the data set, or by a stale path."""
    try:
        lines = read_text(path).splitlines()
    except Problem as problem:
        problems.append(problem.message.at(path))
        return []
    images = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        name = line.replace('\\', '/')
        parts = Path(name).parts
        # A list written elsewhere has other folders in front; a bare name is too little to go by.
        tails = ['/'.join(parts[start:]) for start in range(1, len(parts) - 1)] if len(name) <= _MAX_PATH else []
        places = [path.parent, *bases]
        tries = (place for tail in (name, *tails) if (place := _resolve(places, tail, bases)) and place.is_file())
        if image := next((place for place in tries if is_within(place, *bases)), None):
            images.append(image)
        else:
            code = 'yolo-listed-outside' if _resolve(places, name, bases) else 'yolo-listed-missing'
            problems.append(Message(code, path=path, line=number, name=_shown(line)))
    return images
