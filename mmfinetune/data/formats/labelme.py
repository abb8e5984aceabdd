"""LabelMe's JSON files: polygons, rectangles, circles and masks, one file for each image."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.formats.folders import IMAGE_FOLDERS, NO_CLASS, apart, find_class_list, split_of
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.console import bar
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import find_files, is_within, read_json, read_regular, shown
from mmfinetune.utils.images import IMAGE_SUFFIXES, find_images
from mmfinetune.utils.masks import as_json, check_polygon, mask_to_rle, to_rle
from mmfinetune.utils.text import brief

# Number of points that each shape with an area may have. X-AnyLabeling, which writes the same
# files, gives a rectangle four corners and calls a turned one 'rotation'.
_POINTS = {
    'polygon': None,
    'rectangle': (2, 4),
    'oriented_rectangle': (4,),
    'rotation': (4,),
    'circle': (2,),
    'mask': (2,),
}
_NO_AREA = frozenset({'point', 'points', 'line', 'linestrip'})
_LABEL_FOLDERS = frozenset({'labels', 'label', 'annotations', 'annotation', 'json', 'jsons'})
_SAMPLES = 5  # JSON files that are opened to detect the format
_MOST_BYTES = 64 << 20  # of these; a large photograph may be embedded


@dataclass
class _Head:
    """What the listing needs of a JSON file; only `problem` if the file is damaged."""

    image_path: str = ''
    labels: set[str] = field(default_factory=set)
    problem: Message | None = None


class LabelmeReader(Reader):
    """LabelMe JSON files of any version next to their images, or in a folder of their own.

    Shapes of one label and one `group_id` are one object of several parts. Polygons stay as they
    are, so their pixels are those of pycocotools' rasteriser: a pixel belongs to a polygon when
    its centre does. LabelMe's own exporters draw with Pillow, which adds the pixels on the
    outline: there an object is about half a pixel larger on each side. Circles follow the first
    rule, as RLE, because no polygon gives the exact pixels of a small one. Masks are kept to the
    pixel.

    Lines and points have no area; they, and the labels `__ignore__` and `_background_`, are left
    out.
    """

    hint = (
        'correct these files in LabelMe or a text editor; an image that is only embedded in '
        'its JSON file comes out with `labelme_export_json FILE.json`'
    )

    def __init__(
        self, root: Path, classes: list[str], class_list: Path | None, items: list[Item], notes: list[Message]
    ) -> None:
        super().__init__(root, classes)
        self.notes, self._class_list, self._items = notes, class_list, items
        self._ambiguous: set[Path] = set()  # files whose image, found by its name alone, is that of others too

    @classmethod
    def detect(cls, root: Path) -> str | None:
        paths = find_files(root, {'.json'})
        sample = paths[:: max(1, len(paths) // _SAMPLES)][:_SAMPLES]
        ours = [path for path in sample if _is_labelme(path)]
        if 2 * len(ours) <= len(sample):
            return None
        return f"{len(paths)} *.json, with 'shapes' as LabelMe writes them ({shown(ours[0], root)})"

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> LabelmeReader:
        """See `Reader.open`. Options: `image_root`, a folder outside the data set with the images.

        Looks into every JSON file once, for its image and its labels."""
        root = Path(os.path.normpath(root))  # as the paths of images are
        paths = find_files(root, {'.json'})
        heads, notes = {}, []
        for path in bar(paths, bool(options.get('progress')), desc='labels', unit='file'):
            if head := _head(path):
                heads[path] = head
            else:
                notes.append(Message('labelme-other-file', place=shown(path, root)))
        if not heads:
            raise UserError('labelme-no-files', path=root, count=len(paths))
        found = sorted(set().union(*(head.labels for head in heads.values())))
        listed = find_class_list(root)
        classes = listed[1] if listed else found
        if not classes:
            lines = [head.problem.at(shown(path, root)) for path, head in heads.items() if head.problem]
            raise UserError('labelme-no-shapes', problems=lines, path=root, count=len(heads))
        roots = [root, *map(Path, map(os.path.normpath, filter(None, [options.get('image_root')])))]
        images = list(dict.fromkeys(image for folder in roots for image in find_images(folder)))
        items = _items(roots, heads, images)
        if left := set(images) - {item.image for item in items}:
            # LabelMe writes a file for an image without objects too, once somebody saves it.
            notes.append(Message('labelme-unlabelled', count=len(left), images=len(images)))
        reader = cls(root, classes, listed and listed[0], items, notes)
        claims = Counter(item.image for item in items)
        for item in items:
            path = item.label.parent / _posix(heads[item.label].image_path)
            if claims[item.image] > 1 and item.image != Path(os.path.normpath(path)):
                reader._ambiguous.add(item.label)  # of one of two cameras, say
        return reader

    def items(self) -> list[Item]:
        return self._items

    def read(self, item: Item) -> Record:
        record = self.start(item)
        name = shown(item.label, self.root)
        try:
            data = read_json(item.label)
            if not isinstance(data, dict) or not isinstance(data.get('shapes'), list):
                raise Problem('labelme-shapes')
            if item.label in self._ambiguous:
                raise Problem(
                    'labelme-image-ambiguous', image=data.get('imagePath'), found=shown(item.image, self.root)
                )
            if record.problems and not item.image.exists():
                image = data.get('imagePath') or None
                code = 'labelme-image-missing' if image else 'labelme-image-unknown'
                if isinstance(image, str) and os.path.exists(item.label.parent / _posix(image)):  # noqa: PTH110 (long names)
                    code = 'labelme-image-outside'
                raise Problem('labelme-image-embedded' if data.get('imageData') else code, image=image)
        except Problem as problem:
            # Without the JSON nobody knows the name of the image.
            record.problems = [problem.message.at(name)]
            return record
        if not record.problems:
            _check_size(record, data, name)
            self._read_shapes(record, data['shapes'], name)
        return record

    def _read_shapes(self, record: Record, shapes: list[Any], name: str) -> None:
        objects: dict[tuple, list[tuple[int, list[float] | dict]]] = {}
        for number, shape in enumerate(shapes, start=1):
            place = f'{name}: shape {number}'
            with record.collecting(place):
                label = _label(shape)
                place += f" ('{label}')"
                if label in NO_CLASS:
                    continue
                with record.collecting(place):
                    kind = _kind(shape)
                    if kind in _NO_AREA:
                        record.notes.append(Message('labelme-no-area', place=place, kind=kind))
                        continue
                    if self._class_list and label not in self.classes:
                        raise Problem('labelme-label-unknown', file=shown(self._class_list, self.root))
                    group = shape.get('group_id')
                    if not isinstance(group, (int, str, type(None))):
                        raise Problem('labelme-group')
                    part = _part(shape, kind, record.width, record.height)
                    alone = number if group is None else None
                    objects.setdefault((label, group, alone), []).append((number, part))
        record.instances = [
            Instance(
                label,
                _join([part for _, part in parts], record.width, record.height),
                place='shape ' + ', '.join(str(number) for number, _ in parts),
            )
            for (label, _, _), parts in objects.items()
        ]


def _is_labelme(path: Path) -> bool:
    # COCO's own JSON files have hundreds of MB, which takes long to parse.
    data = None
    with contextlib.suppress(OSError, Problem):
        if b'"shapes"' in read_regular(path, _MOST_BYTES):
            data = read_json(path)
    return isinstance(data, dict) and isinstance(data.get('shapes'), list)


def _head(path: Path) -> _Head | None:
    """None if the file is sound and another kind of JSON."""
    try:
        data = read_json(path)
    except Problem as problem:
        return _Head(problem=problem.message)
    if not isinstance(data, dict) or 'shapes' not in data:
        return None
    image_path = data.get('imagePath')
    head = _Head(image_path if isinstance(image_path, str) else '')
    for shape in data['shapes'] if isinstance(data['shapes'], list) else ():
        with contextlib.suppress(Problem):
            label = _label(shape)
            if label not in NO_CLASS and _kind(shape) not in _NO_AREA:
                head.labels.add(label)
    return head


def _items(roots: list[Path], heads: dict[Path, _Head], images: list[Path]) -> list[Item]:
    by_stem: dict[str, list[Path]] = {}
    for image in images:
        by_stem.setdefault(image.stem, []).append(image)
    return [
        Item(shown(path, roots[0]), _find_image(path, head.image_path, by_stem, roots), path, split_of(folders))
        for path, head in heads.items()
        for folders in [path.relative_to(roots[0]).parts[:-1]]
    ]


def _posix(image_path: str) -> PurePosixPath:
    # Written on Windows it has backslashes, which are not separators elsewhere.
    return PurePosixPath(PureWindowsPath(image_path).as_posix())


def _candidates(path: Path, image_path: str, roots: list[Path]) -> Iterator[Path]:
    given = _posix(image_path) if image_path else None
    if given:
        named = [folder / given for folder in (path.parent, *roots[1:])]
        yield from (place for place in named if is_within(place, *roots))
        yield from (folder / given.name for folder in (path.parent, *roots[1:]))
    suffixes = sorted(IMAGE_SUFFIXES)
    suffixes += [suffix.upper() for suffix in suffixes]
    yield from (path.with_suffix(suffix) for suffix in suffixes)
    halves = apart(path.parts[:-1], _LABEL_FOLDERS)
    twins = [Path(*halves[0], folder, *halves[1]) for folder in sorted(IMAGE_FOLDERS)] if halves else []
    for twin in twins:
        if given:
            yield twin / given.name
        yield from (twin / f'{path.stem}{suffix}' for suffix in suffixes)


def _find_image(path: Path, image_path: str, by_stem: dict[str, list[Path]], roots: list[Path]) -> Path:
    """The image of a JSON file: where it says, next to it, in the folder of images, anywhere.

    The last only if one image of the whole data set has that name.
    """
    for candidate in _candidates(path, image_path, roots):
        # A name too long for a file system is an error, not just missing.
        with contextlib.suppress(OSError):
            if candidate.is_file():
                return Path(os.path.normpath(candidate))
    same = by_stem.get(path.stem, [])
    # A missing one within the data set, whose folder the names of all others depend on.
    return same[0] if len(same) == 1 else path.with_suffix('.jpg')


def _check_size(record: Record, data: dict, name: str) -> None:
    said, size = (data.get('imageWidth'), data.get('imageHeight')), (record.width, record.height)
    if None not in said and said != size:
        code = 'labelme-size-turned' if said == size[::-1] else 'labelme-size'
        facts = dict(image=record.image.name, said='x'.join(map(brief, said)), size=f'{size[0]}x{size[1]}')
        record.problems.append(Message(code, place=name, **facts))


def _label(shape: Any) -> str:
    if not isinstance(shape, dict):
        raise Problem('labelme-shape-type')
    label = shape.get('label')
    if not isinstance(label, str) or not label.strip():
        raise Problem('labelme-no-label')
    return label.strip()


def _kind(shape: dict) -> str:
    # Old files have polygons only and do not say so.
    kind = shape.get('shape_type') or 'polygon'
    return kind if isinstance(kind, str) and len(kind) < 40 else brief(kind)


def _part(shape: dict, kind: str, width: int, height: int) -> list[float] | dict:
    """A polygon or an RLE; raises Problem."""
    if kind not in _POINTS:
        raise Problem('labelme-shape-unknown', kind=kind)
    points = shape.get('points')
    if not isinstance(points, list) or not all(
        isinstance(point, (list, tuple)) and len(point) == 2 for point in points
    ):
        raise Problem('labelme-points')
    flat = [value for point in points for value in point]
    check_polygon(flat, height, width)
    allowed = _POINTS[kind]
    if len(points) not in allowed if allowed else len(points) < 3:
        raise Problem('labelme-point-count', kind=kind, count=len(points))
    if kind == 'circle':
        return _disc(flat, width, height)
    if kind == 'mask':
        return _mask(shape.get('mask'), flat, width, height)
    if kind == 'rectangle' and len(points) == 2:
        x1, y1, x2, y2 = flat
        return [x1, y1, x2, y1, x2, y2, x1, y2]
    return flat


def _disc(points: list[float], width: int, height: int) -> dict:
    """All pixels whose centre lies in the circle, given by its centre and a point of its rim."""
    x, y, rim_x, rim_y = points
    columns, rows = np.arange(width) + 0.5 - x, np.arange(height) + 0.5 - y
    radius2 = (rim_x - x) ** 2 + (rim_y - y) ** 2
    return mask_to_rle(rows[:, None] ** 2 + columns[None] ** 2 <= radius2)


def _mask(text: Any, corners: list[float], width: int, height: int) -> dict:
    """A mask shape: a base64 PNG, at the place that its two corners give.

    Whole corners are inclusive and cut the PNG, others only place it, as in LabelMe's
    `shapes_to_label`.
    """
    if not isinstance(text, str):
        raise Problem('labelme-mask-missing')
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            patch = np.asarray(image)
    except binascii.Error as error:
        raise Problem('labelme-mask-base64', reason=error) from None
    # Pillow's decoders raise many kinds; any of them means the one thing that is reported.
    except Exception as error:
        raise Problem('labelme-mask-png', reason=error) from None
    patch = (patch[..., :3].any(axis=2) if patch.ndim == 3 else patch) != 0
    left, top, right, bottom = (round(value) for value in corners)
    if all(float(value).is_integer() for value in corners):
        rows, columns = bottom - top + 1, right - left + 1
        if not (1 <= rows <= patch.shape[0] and 1 <= columns <= patch.shape[1]):
            raise Problem('labelme-mask-size', width=patch.shape[1], height=patch.shape[0], columns=columns, rows=rows)
        patch = patch[:rows, :columns]
    full = np.zeros((height, width), dtype=bool)
    y1, x1 = max(top, 0), max(left, 0)
    y2, x2 = min(top + patch.shape[0], height), min(left + patch.shape[1], width)
    if y1 < y2 and x1 < x2:
        full[y1:y2, x1:x2] = patch[y1 - top : y2 - top, x1 - left : x2 - left]
    return mask_to_rle(full)


def _join(parts: list[list[float] | dict], width: int, height: int) -> list[list[float]] | dict:
    """One segmentation of all parts: polygons as they are, else the union of the pixels."""
    masks = [part for part in parts if isinstance(part, dict)]
    polygons = [part for part in parts if isinstance(part, list)]
    if not masks:
        return polygons
    if polygons:
        masks.append(to_rle(polygons, height, width))
    return as_json(mask_api.merge(masks)) if len(masks) > 1 else masks[0]
