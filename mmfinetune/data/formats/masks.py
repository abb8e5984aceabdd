"""Masks as image files: PNGs of object numbers, and black-and-white masks of one class each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data.formats.folders import (
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    Layout,
    classed_layout,
    find_class_list,
    numbered_layout,
    require_size,
    split_of,
)
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import shown
from mmfinetune.utils.images import read_pixels
from mmfinetune.utils.masks import masks_to_rles

VOID = 255  # in palette PNGs, as PASCAL VOC writes them: border and ignored pixels
THRESHOLD = 128  # a pixel of a black-and-white mask this bright belongs to an object
# Smoothed edges leave specks of a few pixels about an object: on the real magnetic tile masks all
# components but five have 33 pixels or more, and these five have one or two.
MIN_AREA = 10  # pixels

_MOST_VALUES = 4096  # more are not objects but a photograph or smoothed edges
_MODES = frozenset({'1', 'L', 'P', 'LA', 'PA', 'RGB', 'RGBA', 'F', 'I', 'I;16', 'I;16B'})  # modes of masks
_Masks = list[tuple[str | None, Path]]  # the masks of an image, each with the class that folder or name says


class _MaskReader(Reader):
    """What both formats share: the list of images, and what belongs to none of them."""

    hint = 'add or correct these files; to treat images without a mask file as images without objects use --background'

    def __init__(self, root: Path, layout: Layout, classes: list[str], options: dict[str, Any]) -> None:
        super().__init__(root, classes)
        self._layout, self._background = layout, bool(options.get('background'))
        self.problems = [Message('masks-no-image', place=shown(path, root)) for path in layout.orphans]
        images_of: dict[Path, list[Path]] = {}
        for image, masks in layout.masks.items():
            for _, mask in masks:
                images_of.setdefault(mask, []).append(image)
        for mask, images in images_of.items():
            if len(images) > 1:
                facts = dict(place=shown(mask, root), images=', '.join(shown(image, root) for image in images))
                self.problems.append(Message('masks-several-images', **facts))
        without = len(set(layout.images) - layout.masks.keys())
        if without and self._background:
            self.notes.append(Message('masks-background', count=without, images=len(layout.images)))

    def items(self) -> list[Item]:
        masks, classes = self._layout.masks, self._layout.classes
        return [
            Item(shown(path, self.root), path, (masks.get(path, []), classes.get(path)), split_of(folders))
            for path in self._layout.images
            for folders in [path.relative_to(self.root).parts[:-1]]
        ]

    def read(self, item: Item) -> Record:
        record = self.start(item)
        masks, class_mask = item.label
        if not masks and not self._background:
            record.problems.append(Message('masks-no-mask', place=item.key))
        if not record.problems:
            self._read_masks(record, masks, class_mask)
        return record

    def _read_masks(self, record: Record, masks: _Masks, class_mask: Path | None) -> None:
        raise NotImplementedError

    def _refuse_several(self, record: Record, masks: _Masks, label: str | None = None) -> None:
        facts = {} if label is None else dict(label=label)
        names = ', '.join(shown(path, self.root) for _, path in masks)
        code = 'masks-several-of-class' if facts else 'masks-several'
        record.problems.append(Message(code, place=shown(record.image, self.root), masks=names, **facts))


class MaskPngReader(_MaskReader):
    """`images/`, and `masks/` with one PNG for each image: a value above 0 is an object.

    The PNGs hold palette indices, grey values of 8 or 16 bits, or colours; of colours each is an
    object and black is none. In palette PNGs 255 is void, as in VOC, unless `void` says otherwise.
    `classes/` may hold a PNG of class numbers for each image: the class of an object is that of
    most of its pixels, number k being the k-th name of classes.txt. Without it all are of one
    class.
    """

    def __init__(self, root: Path, layout: Layout, classes: list[str], options: dict[str, Any]) -> None:
        super().__init__(root, layout, classes, options)
        self._void = options.get('void')
        if self._void is None and any(map(_is_palette, layout.sample())):
            self.notes.append(Message('masks-void', void=VOID))

    @classmethod
    def detect(cls, root: Path) -> str | None:
        layout = numbered_layout(root)
        if not layout.fits() or _binary(layout.sample())[0]:
            return None
        return f'images/ and masks/ with a mask of object numbers for {layout.share()} images'

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> MaskPngReader:
        """See `Reader.open`.

        Options: `classes` (the one class, or the meaning of the class numbers, if there is no
        classes.txt), `void` (value that is not an object; -1 for none), `background`.
        """
        layout = numbered_layout(root)
        if not layout.masks:
            facts: dict[str, Any] = dict(
                images=len(layout.images),
                masks=len(layout.orphans),
                image_folders=', '.join(sorted(IMAGE_FOLDERS - {'images'})),
                mask_folders=', '.join(sorted(MASK_FOLDERS - {'masks'})),
            )
            raise UserError('masks-none', path=root, **facts)
        listed, wanted = find_class_list(root), list(options.get('classes') or ())
        classes = listed[1] if listed else wanted
        if not layout.classes and len(wanted) == 1:
            classes = wanted
        if not classes or (len(classes) > 1 and not layout.classes):
            code = 'masks-classes' if classes else 'masks-no-classes'
            raise UserError(code, path=root, names=', '.join(classes))
        return cls(root, layout, classes, options)

    def _read_masks(self, record: Record, masks: _Masks, class_mask: Path | None) -> None:
        if len(masks) > 1:
            self._refuse_several(record, masks)
            return
        if self._layout.classes and class_mask is None and masks:
            record.problems.append(Message('masks-no-class-mask', place=shown(record.image, self.root)))
            return
        for _, path in masks:
            name = shown(path, self.root)
            with record.collecting(name):
                numbers = self._numbers(path, name, record)
                values = np.unique(numbers[numbers != 0]).tolist()
                if len(values) > _MOST_VALUES:
                    raise Problem('masks-values', count=len(values))
                names = self._classes_of(numbers, values, class_mask, record)
                record.instances = [
                    Instance(label, rle, place=f'object {value}')
                    for value, label, rle in zip(values, names, masks_to_rles(numbers, values), strict=True)
                ]

    def _numbers(self, path: Path, name: str, record: Record) -> np.ndarray:
        """Object numbers (height, width), void taken out."""
        numbers, mode = _load(path)
        require_size(numbers, record, self.root)
        void = self._void
        if void is None and mode == 'P':
            void = VOID
        elif void is not None and mode in ('RGB', 'RGBA') and void >= 0:
            void *= 0x10101
        if void is None and mode == 'L':
            counts = np.bincount(numbers.ravel(), minlength=VOID + 1)
            if counts[VOID] and not counts[VOID - 1] and counts[1:VOID].any():
                record.notes.append(Message('masks-maybe-void', place=name, void=VOID))
        return numbers if void is None else np.where(numbers == void, 0, numbers)

    def _classes_of(self, numbers: np.ndarray, values: list[int], class_mask: Path | None, record: Record) -> list[str]:
        """The class of each object; empty names after a problem."""
        if class_mask is None:
            return self.classes[:1] * len(values)
        name = shown(class_mask, self.root)
        try:
            labels, mode = _load(class_mask)
            if mode in ('RGB', 'RGBA'):
                raise Problem('masks-class-colours')
            require_size(labels, record, self.root)
        except Problem as problem:
            record.problems.append(problem.message.at(name))
            return [''] * len(values)
        names = []
        for value in values:
            found, counts = np.unique(labels[numbers == value], return_counts=True)
            known = (found > 0) & (found <= len(self.classes))
            label = int(found[counts.argmax()])
            if not 1 <= label <= len(self.classes):
                facts = dict(place=name, number=value, label=label, count=len(self.classes))
                record.problems.append(Message('masks-class-number', **facts))
                names.append('')
                continue
            names.append(self.classes[label - 1])
            if known.sum() > 1:
                facts = dict(number=value, label=names[-1], most=int(counts.max()), pixels=int(counts.sum()))
                record.notes.append(Message('masks-class-mixed', place=name, **facts))
        return names


class BinaryMasksReader(_MaskReader):
    """Images and one black-and-white mask for each image and class.

    The class comes from a folder (`CLASS/.../name.jpg` next to `name.png`; `images/name.jpg` and
    `masks/CLASS/name.png`) or by the name (`name_CLASS.png`); without either there must be one
    class only. Objects are the connected parts of a mask, pixels that touch at a corner included.
    A pixel counts if it is `threshold` or brighter, of colours the brightest channel. An empty
    mask makes an image without objects.
    """

    def __init__(self, root: Path, layout: Layout, classes: list[str], options: dict[str, Any]) -> None:
        super().__init__(root, layout, classes, options)
        threshold, min_area = options.get('threshold'), options.get('min_area')
        self._threshold = THRESHOLD if threshold is None else threshold
        self._min_area = MIN_AREA if min_area is None else min_area

    @classmethod
    def detect(cls, root: Path) -> str | None:
        layout = classed_layout(root)
        if not layout.fits() or not _binary(layout.sample())[1]:
            return None
        found = layout.class_names()
        names = ', '.join(found[:5]) + (', …' if len(found) > 5 else '')
        named = f'classes from folders or names: {names}' if found else 'of one class'
        return f'black-and-white masks for {layout.share()} images, {named}'

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> BinaryMasksReader:
        """See `Reader.open`.

        Options: `classes` (the one class, if neither folder nor name gives one), `threshold` (1 to
        255), `min_area` (pixels; smaller parts are left out), `background`.
        """
        layout = classed_layout(root)
        if not layout.masks:
            raise UserError('masks-binary-none', path=root, images=len(layout.images), masks=len(layout.orphans))
        found, listed = layout.class_names(), find_class_list(root)
        if listed and (unknown := [name for name in found if name not in listed[1]]):
            raise UserError('masks-unlisted', problems=unknown, path=listed[0])
        classes = listed[1] if listed else found
        unnamed = [shown(path, root) for masks in layout.masks.values() for name, path in masks if name is None]
        if unnamed:
            alone = list(options.get('classes') or classes)
            if len(alone) != 1 or (found and found != alone):
                raise UserError('masks-unnamed', problems=unnamed, path=root)
            classes = alone
            for masks in layout.masks.values():
                masks[:] = [(alone[0], path) for _, path in masks]
        return cls(root, layout, classes, options)

    def _read_masks(self, record: Record, masks: _Masks, class_mask: Path | None) -> None:  # noqa: ARG002
        twice = [label for label, count in Counter(label for label, _ in masks).items() if count > 1]
        for label in twice:
            self._refuse_several(record, [mask for mask in masks if mask[0] == label], label)
        if twice:
            return
        for label, path in masks:
            name = shown(path, self.root)
            with record.collecting(name):
                bright, is_exact = _load_bright(path)
                require_size(bright, record, self.root)
                peak = int(bright.max())
                if is_exact and 0 < peak < self._threshold:
                    raise Problem('masks-dark', peak=peak, threshold=self._threshold)
                self._add_parts(record, label or '', bright, name)

    def _add_parts(self, record: Record, label: str, bright: np.ndarray, name: str) -> None:
        from scipy import ndimage

        parts, count = ndimage.label(bright >= self._threshold, np.ones((3, 3)))
        areas = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        kept = (np.flatnonzero(areas >= self._min_area) + 1).tolist()
        if len(kept) < count:
            small = areas[areas < self._min_area]
            facts = dict(left_out=len(small), count=count, least=self._min_area, largest=int(small.max()))
            record.notes.append(Message('masks-small', place=name, **facts))
        record.instances += [
            Instance(label, rle, place=f'{name}, part {part}')
            for part, rle in zip(kept, masks_to_rles(parts, kept), strict=True)
        ]


def _is_palette(path: Path) -> bool:
    try:
        return _decode(path)[1] == 'P'
    except Problem:
        return False


def _load(path: Path) -> tuple[np.ndarray, str]:
    """The values of a mask, int32 (height, width), and Pillow's mode; of colours R + 256 G + …

    Raises:
        Problem: It is damaged or not a mask.
    """
    pixels, mode, is_exact = _decode(path)
    if not is_exact:
        raise Problem('masks-inexact')
    if mode == 'F':
        raise Problem('masks-fractions')
    if mode in ('LA', 'PA'):
        return np.where(pixels[..., 1] > 0, pixels[..., 0], 0).astype(np.int32), mode[0]
    if pixels.ndim == 2:
        if pixels.dtype.kind in 'iu' and pixels.min() < 0:
            raise Problem('masks-negative')
        return pixels.astype(np.int32), mode
    channels = pixels.astype(np.int32)
    values = channels[..., 0]
    # A grey mask that was saved as a colour image keeps its values.
    if (channels[..., 1] == values).all() and (channels[..., 2] == values).all():
        mode = 'L'
    else:
        values = values + (channels[..., 1] << 8) + (channels[..., 2] << 16)
    return (np.where(channels[..., 3] > 0, values, 0) if channels.shape[2] == 4 else values), mode


def _load_bright(path: Path) -> tuple[np.ndarray, bool]:
    """How bright each pixel is (height, width), and whether the file keeps values exactly."""
    pixels, mode, is_exact = _decode(path, colours=True)
    if mode == '1':
        return pixels.astype(np.uint8) * 255, True
    if pixels.ndim == 2:
        return pixels, is_exact
    bright = pixels[..., : 3 if pixels.shape[2] >= 3 else 1].max(axis=2)
    return np.where(pixels[..., -1] > 0, bright, 0) if mode.endswith('A') else bright, is_exact


def _decode(path: Path, colours: bool = False) -> tuple[np.ndarray, str, bool]:
    """Pixels, mode, and whether the format keeps values exactly; `colours` resolves palettes."""
    pixels, mode, file_format = read_pixels(path, colours)
    if mode not in _MODES:
        raise Problem('masks-mode', mode=mode)
    return pixels, mode, file_format not in ('JPEG', 'WEBP')


def _binary(paths: Iterable[Path]) -> tuple[bool, bool]:
    """Whether masks are certainly black and white, and whether they could be; raises Problem."""
    certainly = possibly = True
    for path in paths:
        bright, _ = _load_bright(path)
        objects = bright[bright > 0]
        if not objects.size:
            continue
        values = np.unique(objects)
        # Smoothed edges have many values, but most pixels are nearly white.
        smooth = len(values) > 8 and (objects >= 250).mean() > 0.3
        possibly &= len(values) == 1 or bool(smooth)
        certainly &= possibly and values[-1] >= 250
    return certainly, possibly
