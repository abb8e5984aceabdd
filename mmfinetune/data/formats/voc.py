"""PASCAL VOC 2012 with the true masks."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data.classes import VOC_CLASSES, VOC_GROUPS
from mmfinetune.data.formats.folders import read_ids
from mmfinetune.data.formats.voc_devkit import VOC_URL, find_devkit
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import MOST_TEXT, read_regular, reason_of
from mmfinetune.utils.images import read_pixels
from mmfinetune.utils.masks import masks_to_rles

VOID = 255  # border and ignored pixels in both kinds of PNG

# Images of the official archive whose masks are complete but whose XML lists fewer objects; without
# this every user's first conversion would stop. 2010_002305: 8 masks, 5 objects
# (https://github.com/airctic/icevision/issues/1073).
KNOWN_DISPUTES = frozenset({'2010_002305'})

_LISTS = 'ImageSets/Segmentation'
_FOLDERS = ('JPEGImages', 'SegmentationObject', 'SegmentationClass', 'Annotations', _LISTS)


class VocReader(Reader):
    """A VOC devkit, each object of SegmentationObject with exactly its pixels.

    The void border belongs to no object; `difficult` and `truncated` of the XML are kept.
    """

    hint = (
        'fix these files (for a fresh copy move the folder away and run tools/prepare_voc.py --download); '
        'where only classes or the XML disagree with the masks, --trust-masks keeps the images'
    )
    overlapping = True  # `trainval`; train and val are compared when the lists are read

    def __init__(self, root: Path, lists: dict[str, list[str]], problems: list[Message], trust_masks: bool) -> None:
        super().__init__(root, list(VOC_CLASSES))
        self.supercategories, self.problems = VOC_GROUPS, problems
        self.headers = {s: {'info': {'description': f'PASCAL VOC 2012 segmentation, {s}'}} for s in lists}
        self._lists, self._trust_masks = lists, trust_masks

    @classmethod
    def detect(cls, root: Path) -> str | None:
        devkit, wanted = find_devkit(root), _FOLDERS[:3]
        found = all((devkit / name).is_dir() for name in wanted)
        return f'{devkit} has ' + ', '.join(f'{name}/' for name in wanted) if found else None

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> VocReader:
        """See `Reader.open`. Options: `trust_masks`; `splits`, names of lists in ImageSets/Segmentation.

        With `trust_masks` what SegmentationClass or the XML dispute is settled: masks by
        SegmentationObject, class by most of their pixels in SegmentationClass.
        """
        devkit = find_devkit(root)
        lists, problems = _read_lists(devkit, options.get('splits') or ('train', 'val'))
        return cls(devkit, lists, problems, bool(options.get('trust_masks')))

    def items(self) -> list[Item]:
        return [
            Item(image_id, self.root / f'JPEGImages/{image_id}.jpg', None, split)
            for split, ids in self._lists.items()
            for image_id in ids
        ]

    def read(self, item: Item) -> Record:
        """See `Reader.read`; checks the four files of the image against each other."""
        record = Record(item.image, 0, 0)
        trusted = self._trust_masks or item.key in KNOWN_DISPUTES
        disputes = record.notes if trusted else record.problems
        jpeg, xml = f'JPEGImages/{item.key}.jpg', f'Annotations/{item.key}.xml'
        object_png, class_png = f'SegmentationObject/{item.key}.png', f'SegmentationClass/{item.key}.png'
        pixels = {name: self._pixels(name, record) for name in (jpeg, object_png, class_png)}
        listed = self._listed(xml, record.problems)
        shapes = {name: array.shape[:2] for name, array in pixels.items() if array is not None}
        for name, (height, width) in shapes.items():
            first, (other_height, other_width) = next(iter(shapes.items()))
            if (height, width) != (other_height, other_width):
                sizes = dict(width=width, height=height, other_width=other_width, other_height=other_height)
                record.problems.append(Message('voc-size', place=name, other=first, **sizes))
        objects, classes = pixels[object_png], pixels[class_png]
        if objects is None or classes is None or objects.shape != classes.shape:
            return record
        record.height, record.width = objects.shape
        labels = _labels(objects, classes, object_png, class_png, record.problems, disputes)
        if listed is None:
            return record
        _check_xml(labels, listed, object_png, xml, disputes)
        if absent := len(set(range(1, len(listed) + 1)) - labels.keys()):
            record.notes.append(Message('voc-without-mask', place=xml, count=absent))
        for (number, label), rle in zip(labels.items(), masks_to_rles(objects, labels), strict=True):
            # An object that the XML does not list, in an image whose masks are trusted.
            flags = listed[number - 1] if number <= len(listed) else {}
            extra = {key: flags.get(key, 0) for key in ('difficult', 'truncated')}
            record.instances.append(Instance(VOC_CLASSES[label - 1], rle, extra=extra))
        return record

    def _pixels(self, name: str, record: Record) -> np.ndarray | None:
        """A palette PNG as indices (height, width); a JPEG as pixels; None after a problem."""
        with record.collecting(name):
            pixels, mode, _ = read_pixels(self.root / name)
            if name.endswith('.png') and mode not in ('P', 'L'):
                raise Problem('voc-mode', mode=mode)
            return pixels
        return None

    def _listed(self, name: str, problems: list[Message]) -> list[dict] | None:
        """The objects of an XML: name, difficult, truncated; None after a problem."""
        try:
            root = ElementTree.fromstring(read_regular(self.root / name, MOST_TEXT))
        except FileNotFoundError:
            problems.append(Message('voc-xml-missing', place=name))
            return None
        except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
            problems.append(Message('voc-xml-unreadable', place=name, reason=reason_of(error)))
            return None
        listed = []
        # Boxes and <size> are not read: the mask and the image say both more exactly.
        for number, entry in enumerate(root.findall('object'), start=1):
            values: dict[str, Any] = {'name': (entry.findtext('name') or '').strip()}
            for key in ('difficult', 'truncated'):
                value = (entry.findtext(key) or '').strip() or '0'
                if value not in ('0', '1'):
                    problems.append(Message('voc-xml-flag', place=name, number=number, key=key, value=value))
                values[key] = int(value == '1')
            listed.append(values)
        return listed


def _labels(
    objects: np.ndarray,
    classes: np.ndarray,
    object_png: str,
    class_png: str,
    problems: list[Message],
    disputes: list[Message],
) -> dict[int, int]:
    """The class value (1 to 20) of each object number of an image."""
    joint = np.bincount(objects.ravel().astype(np.int64) * 256 + classes.ravel(), minlength=1 << 16).reshape(256, 256)
    # One image is made from the other in VOC, so background and void agree to the pixel.
    if stray := int(joint[np.ix_((0, VOID), range(1, VOID))].sum()):
        disputes.append(Message('voc-stray-pixels', place=class_png, other=object_png, count=stray))
    labels = {}
    for number in np.flatnonzero(joint.sum(axis=1)).tolist():
        if number in (0, VOID):
            continue
        counts = joint[number]
        label = int(counts.argmax())
        if not 1 <= label <= len(VOC_CLASSES):
            problems.append(Message('voc-class-value', place=class_png, number=number, value=label))
            continue
        pixels = int(counts.sum())
        if others := pixels - int(counts[label]):
            facts = dict(number=number, name=VOC_CLASSES[label - 1], others=others, pixels=pixels)
            disputes.append(Message('voc-class-mixed', place=class_png, **facts))
        labels[number] = label
    return labels


def _check_xml(labels: dict[int, int], listed: list[dict], object_png: str, xml: str, disputes: list[Message]) -> None:
    """Object k of the PNG is the k-th of the XML, and both name one class."""
    for number, label in labels.items():
        facts = dict(number=number, name=VOC_CLASSES[label - 1])
        if number > len(listed):
            disputes.append(Message('voc-xml-lacks', place=object_png, xml=xml, count=len(listed), **facts))
        elif (given := listed[number - 1]['name']) != facts['name']:
            disputes.append(Message('voc-xml-class', place=xml, given=given, **facts))


def _read_lists(devkit: Path, splits: list[str] | tuple[str, ...]) -> tuple[dict[str, list[str]], list[Message]]:
    """The ids of each split, and the lines that are not an id or are duplicated.

    Raises:
        UserError: The devkit is incomplete, or an image is in train and in val.
    """
    fatal = [Message('voc-folder', place=name) for name in _FOLDERS if not (devkit / name).is_dir()]
    lists: dict[str, list[str]] = {}
    bad: list[Message] = []
    for split in splits if (devkit / _LISTS).is_dir() else ():
        name = f'{_LISTS}/{split}.txt'
        try:
            lists[split], lines = read_ids(devkit / name)
        except Problem as problem:
            fatal.append(problem.message.at(name))
            continue
        bad += [line.at(name) for line in lines]
    both = sorted(set(lists.get('train', ())) & set(lists.get('val', ())))
    fatal += [Message('voc-train-in-val', place=_LISTS, image=image_id) for image_id in both]
    if fatal:
        raise UserError('voc-devkit', problems=fatal + bad, path=devkit, url=VOC_URL)
    return lists, bad
