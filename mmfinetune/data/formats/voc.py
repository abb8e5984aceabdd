"""PASCAL VOC 2012 to COCO JSON with the true masks."""

from __future__ import annotations

import os
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.classes import VOC_CLASSES, VOC_SUPERCATEGORIES
from mmfinetune.data.formats import voc
from mmfinetune.data.formats.voc_devkit import VOC_URL, find_devkit
from mmfinetune.data.records import Instance, Item, Record
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, json_bytes
from mmfinetune.utils.workers import in_order

VOID = 255  # border and ignored pixels in both kinds of PNG

# Images of the official archive whose masks are whole but whose XML lists fewer objects; without
# this every user's first conversion would stop. 2010_002305: 8 masks, 5 objects
# (https://github.com/airctic/icevision/issues/1073).
KNOWN_DISPUTES = frozenset({'2010_002305'})

_LISTS = 'ImageSets/Segmentation'
_FOLDERS = ('JPEGImages', 'SegmentationObject', 'SegmentationClass', 'Annotations', _LISTS)
_CHUNK = 16  # images per task of a worker


class _AllShown(UserError):
    # A data set is mended file by file, so the list is of no use when it is cut.
    max_shown = sys.maxsize


@dataclass
class Summary:
    """What one split came to.

    Attributes:
        path: The JSON file.
        images: Images written.
        objects: Annotations written.
        per_class: Annotations of each of the 20 classes, in VOC order.
        difficult: Annotations marked difficult.
        truncated: Annotations marked truncated.
        without_mask: Objects that the XML lists but no pixel shows; they are not written.
        left_out: Ids of the images that `skip_bad` left out.
        problems: Why, one line each.
        notes: Disagreements that were settled by trusting the masks, one line each.
        seconds: Wall time of the whole conversion.
    """

    path: Path
    images: int = 0
    objects: int = 0
    per_class: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VOC_CLASSES, 0))
    difficult: int = 0
    truncated: int = 0
    without_mask: int = 0
    left_out: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _Read:
    """One image as a worker read it; annotations lack their ids still."""

    image_id: str
    height: int = 0
    width: int = 0
    annotations: list[dict] = field(default_factory=list)
    without_mask: int = 0
    problems: list[str] = field(default_factory=list)
    disputes: list[str] = field(default_factory=list)


def annotation_paths(out_dir: str | Path, splits: Sequence[str] = ('train', 'val')) -> dict[str, Path]:
    """The JSON file of each split in `out_dir`."""
    return {split: Path(out_dir) / f'instances_{split}.json' for split in splits}


def decode(annotation: dict) -> np.ndarray:
    """The mask of one annotation, a boolean array (height, width)."""
    return mask_api.decode(annotation['segmentation']).astype(bool)


def convert(
    devkit: str | Path,
    out_dir: str | Path,
    splits: Sequence[str] = ('train', 'val'),
    workers: int | None = None,
    skip_bad: bool = False,
    trust_masks: bool = False,
    progress: bool = True,
) -> dict[str, Summary]:
    """Write one COCO JSON per split, each object of SegmentationObject with exactly its pixels.

    Nothing is written before every image of every split is checked; the result does not depend
    on the number of workers.

    Args:
        devkit: The `VOC2012` folder, see `find_devkit`.
        out_dir: Where `annotation_paths` lie.
        splits: Names of lists in ImageSets/Segmentation.
        workers: Processes; all cores by default.
        skip_bad: Leave images with problems out instead of stopping.
        trust_masks: Settle what SegmentationClass or the XML dispute: masks by
            SegmentationObject, class by most of their pixels in SegmentationClass.
        progress: Whether to show a progress bar.

    Returns:
        A summary for each split.

    Raises:
        UserError: Folders, lists, images, PNGs or XMLs that are missing, unreadable or at odds,
            all in one error; or `out_dir` cannot be written.
    """
    start = time.perf_counter()
    devkit, paths = Path(devkit), annotation_paths(out_dir, splits)
    _check_writable(Path(out_dir))
    lists, bad_lines = read_lists(devkit, splits)
    ids = list(dict.fromkeys(image_id for names in lists.values() for image_id in names))
    reads = {read.image_id: read for read in _read_all(devkit, ids, workers, progress)}
    for read in reads.values():
        if not (trust_masks or read.image_id in KNOWN_DISPUTES):
            read.problems += read.disputes
            read.disputes = []

    problems = [line for lines in bad_lines.values() for line in lines]
    problems += [line for read in reads.values() for line in read.problems]
    if problems and not skip_bad:
        bad = sum(bool(read.problems) for read in reads.values())
        raise _AllShown(
            f'{devkit}: {len(problems)} problems, {bad} of {len(ids)} images unusable; nothing was written',
            problems,
            'mend these files (for a fresh copy move the folder away and run with --download), or '
            'run again with --skip-bad, which leaves these images out and goes on with the others; '
            'where only classes or the XML are at odds, --trust-masks keeps them',
        )

    contents, summaries = {}, {}
    for split, names in lists.items():
        summary = summaries[split] = Summary(paths[split], problems=bad_lines[split])
        contents[paths[split]] = json_bytes(_dataset(split, [reads[name] for name in names], summary))
    empty = [
        f'{split}: all {len(lists[split])} images are unusable'
        for split, summary in summaries.items()
        if not summary.images
    ]
    if empty:
        raise _AllShown(
            f'{devkit}: nothing is left to write',
            empty + problems,
            'move the folder away and run with --download for a fresh copy',
        )
    atomic_write_all(contents)
    for summary in summaries.values():
        summary.seconds = time.perf_counter() - start
    return summaries


def format_summaries(summaries: dict[str, Summary]) -> str:
    """A short table for the terminal: one row per split, then one per class."""
    rows = [f'{"split":<12}{"images":>8}{"objects":>9}{"difficult":>11}{"truncated":>11}{"left out":>10}{"no mask":>9}']
    rows += [
        f'{split:<12}{s.images:>8}{s.objects:>9}{s.difficult:>11}{s.truncated:>11}'
        f'{len(s.left_out):>10}{s.without_mask:>9}'
        for split, s in summaries.items()
    ]
    rows += ['', f'{"class":<12}' + ''.join(f'{split:>8}' for split in summaries)]
    rows += [f'{name:<12}' + ''.join(f'{s.per_class[name]:>8}' for s in summaries.values()) for name in VOC_CLASSES]
    seconds = max(summary.seconds for summary in summaries.values())
    rows += ['', f'checked and converted in {seconds:.1f} s']
    left_out = [line for summary in summaries.values() for line in summary.problems]
    if left_out:
        rows += ['', 'left out:', *(f'  - {line}' for line in left_out)]
    notes = [line for summary in summaries.values() for line in summary.notes]
    if notes:
        rows += ['', 'kept, the masks trusted:', *(f'  - {line}' for line in notes)]
    return '\n'.join(rows)


def _check_writable(out_dir: Path) -> None:
    # Asked before the minute of work, not after it.
    folder = out_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f'{out_dir}: cannot be written', cure='choose another folder by --out')


def read_lists(devkit: Path, splits: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The ids of each split, and the lines of each that are no id or come twice."""
    fatal = [f'{name}/: missing' for name in _FOLDERS if not (devkit / name).is_dir()]
    lists: dict[str, list[str]] = {}
    bad_lines: dict[str, list[str]] = {}
    for split in splits if (devkit / _LISTS).is_dir() else ():
        name = f'{_LISTS}/{split}.txt'
        try:
            # utf-8-sig: Windows editors put a mark in front that would become part of an id.
            lines = (devkit / name).read_text(encoding='utf-8-sig').splitlines()
        except (OSError, UnicodeDecodeError) as error:
            fatal.append(f'{name}: {getattr(error, "strerror", None) or "not UTF-8 text"}')
            continue
        ids, bad = {}, []
        for number, line in enumerate(map(str.strip, lines), start=1):
            if len(line.split()) > 1 or '/' in line or '\\' in line:
                bad.append(f"{name}, line {number}: '{line}' is not one image id")
            elif line in ids:
                bad.append(f"{name}, line {number}: '{line}' is listed twice")
            elif line:
                ids[line] = number
        lists[split], bad_lines[split] = list(ids), bad
        if not ids:
            fatal.append(f'{name}: no image id in it')
    both = set(lists.get('train', ())) & set(lists.get('val', ()))
    fatal += [f'{_LISTS}: {image_id} is in train and in val' for image_id in sorted(both)]
    if fatal:
        raise _AllShown(
            f'{devkit}: not a whole VOC 2012 devkit; nothing was written',
            fatal + [line for bad in bad_lines.values() for line in bad],
            f'move the folder away and run with --download, or unpack {VOC_URL} anew',
        )
    return lists, bad_lines


def _read_all(devkit: Path, ids: list[str], workers: int | None, progress: bool) -> Iterator[_Read]:
    """Read all images, in the order of `ids` whatever the number of workers."""
    return in_order(
        partial(read_image, devkit), ids, workers or os.cpu_count() or 1, _CHUNK, desc='VOC 2012', disable=not progress
    )


def read_image(devkit: Path, image_id: str) -> _Read:
    """Read and check the four files of one image; every fault goes into `problems`."""
    read = _Read(image_id)
    jpeg, object_png, class_png = (
        f'JPEGImages/{image_id}.jpg',
        f'SegmentationObject/{image_id}.png',
        f'SegmentationClass/{image_id}.png',
    )
    pixels = _load(devkit, jpeg, read.problems, indices=False)
    objects = _load(devkit, object_png, read.problems)
    classes = _load(devkit, class_png, read.problems)
    listed = _load_xml(devkit, f'Annotations/{image_id}.xml', read.problems)
    shapes = {
        name: array.shape[:2]
        for name, array in ((jpeg, pixels), (object_png, objects), (class_png, classes))
        if array is not None
    }
    wanted = next(iter(shapes.values()), None)
    for name, (height, width) in shapes.items():
        if (height, width) != wanted:
            read.problems.append(
                f'{name}: {width}x{height} pixels, but {next(iter(shapes))} has {wanted[1]}x{wanted[0]}'
            )
    if objects is None or classes is None or objects.shape != classes.shape:
        return read

    read.height, read.width = objects.shape
    numbers, labels = _check_classes(objects, classes, object_png, class_png, read)
    if listed is None:
        return read
    _check_xml(numbers, labels, listed, read)
    read.without_mask = len(set(range(1, len(listed) + 1)) - set(numbers))
    if not read.problems:
        read.annotations = _annotations(objects, numbers, labels, listed)
    return read


def _load(devkit: Path, name: str, problems: list[str], indices: bool = True) -> np.ndarray | None:
    """A palette PNG as indices (height, width); a JPEG as pixels; None after a problem."""
    try:
        with Image.open(devkit / name) as image:
            if indices and image.mode not in ('P', 'L'):
                problems.append(
                    f'{name}: colours (mode {image.mode}) where a palette PNG of '
                    'indices (mode P) belongs; saved anew by another program?'
                )
                return None
            return np.asarray(image)
    except FileNotFoundError:
        problems.append(f'{name}: missing')
    # Pillow's decoders raise many kinds (OSError, SyntaxError, ValueError, struct.error, …); any
    # of them means the one thing that is reported.
    except Exception as error:
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        problems.append(f'{name}: unreadable ({reason})')
    return None


def _load_xml(devkit: Path, name: str, problems: list[str]) -> list[dict] | None:
    """The objects of an XML: name, difficult, truncated; None after a problem."""
    try:
        root = ElementTree.parse(devkit / name).getroot()
    except FileNotFoundError:
        problems.append(f'{name}: missing')
        return None
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        problems.append(f'{name}: unreadable ({error})')
        return None
    listed = []
    # Boxes and <size> are not read: the mask and the image say both more exactly.
    for number, entry in enumerate(root.findall('object'), start=1):
        values = {'name': (entry.findtext('name') or '').strip()}
        for key in ('difficult', 'truncated'):
            text = (entry.findtext(key) or '').strip() or '0'
            if text not in ('0', '1'):
                problems.append(f"{name}: object {number}: <{key}> is '{text}', not 0 or 1")
            values[key] = int(text == '1')
        listed.append(values)
    return listed


def _check_classes(
    objects: np.ndarray, classes: np.ndarray, object_png: str, class_png: str, read: _Read
) -> tuple[list[int], list[int]]:
    """Object numbers of an image and the class value (1 to 20) of each."""
    joint = np.bincount(objects.ravel().astype(np.int64) * 256 + classes.ravel(), minlength=1 << 16).reshape(256, 256)
    # One image is made from the other in VOC, so background and void agree to the pixel.
    stray = int(joint[np.ix_((0, VOID), range(1, VOID))].sum())
    if stray:
        read.disputes.append(f'{class_png}: {stray} pixels of a class where {object_png} has no object')
    numbers, labels = [], []
    for number in np.flatnonzero(joint.sum(axis=1)).tolist():
        if number in (0, VOID):
            continue
        counts = joint[number]
        label = int(counts.argmax())
        if not 1 <= label <= len(VOC_CLASSES):
            read.problems.append(f'{class_png}: object {number} has the value {label}, no class')
            continue
        others = int(counts.sum() - counts[label])
        if others:
            read.disputes.append(
                f"{class_png}: object {number} is '{VOC_CLASSES[label - 1]}', but "
                f'{others} of its {int(counts.sum())} pixels have another value'
            )
        numbers.append(number)
        labels.append(label)
    return numbers, labels


def _check_xml(numbers: list[int], labels: list[int], listed: list[dict], read: _Read) -> None:
    """Object k of the PNG is the k-th of the XML, and both name one class."""
    image_id = read.image_id
    for number, label in zip(numbers, labels, strict=True):
        name = VOC_CLASSES[label - 1]
        if number > len(listed):
            read.disputes.append(
                f"SegmentationObject/{image_id}.png: object {number} ('{name}') is not in "
                f'Annotations/{image_id}.xml, which lists {len(listed)}'
            )
        elif listed[number - 1]['name'] != name:
            read.disputes.append(
                f'Annotations/{image_id}.xml: object {number} is '
                f"'{listed[number - 1]['name']}', but '{name}' in SegmentationClass"
            )


def _annotations(objects: np.ndarray, numbers: list[int], labels: list[int], listed: list[dict]) -> list[dict]:
    if not numbers:
        return []
    # (N, W, H) in C order is (H, W, N) in the Fortran order that pycocotools wants, uncopied.
    columns = np.ascontiguousarray(objects.T)
    masks = columns[None] == np.array(numbers, dtype=objects.dtype)[:, None, None]
    rles = mask_api.encode(masks.view(np.uint8).transpose(2, 1, 0))
    # An object that the XML does not list, in an image whose masks are trusted.
    flags = {
        number: listed[number - 1] if number <= len(listed) else {'difficult': 0, 'truncated': 0} for number in numbers
    }
    return [
        {
            'category_id': label,
            'segmentation': {'size': list(objects.shape), 'counts': rle['counts'].decode()},
            'area': int(area),
            'bbox': [int(value) for value in box],
            'iscrowd': 0,
            'difficult': flags[number]['difficult'],
            'truncated': flags[number]['truncated'],
        }
        for number, label, rle, area, box in zip(
            numbers, labels, rles, mask_api.area(rles), mask_api.toBbox(rles), strict=True
        )
    ]


def _dataset(split: str, reads: list[_Read], summary: Summary) -> dict:
    """The COCO JSON of a split without its bad images; fills `summary`."""
    images, annotations = [], []
    groups = {name: group for group, names in VOC_SUPERCATEGORIES.items() for name in names}
    for read in reads:
        if read.problems:
            summary.left_out.append(read.image_id)
            summary.problems += read.problems
            continue
        images.append(
            {
                'id': len(images) + 1,
                'file_name': f'JPEGImages/{read.image_id}.jpg',
                'width': read.width,
                'height': read.height,
            }
        )
        summary.without_mask += read.without_mask
        summary.notes += read.disputes
        for annotation in read.annotations:
            annotations.append({'id': len(annotations) + 1, 'image_id': len(images), **annotation})
    counts = Counter(annotation['category_id'] for annotation in annotations)
    summary.images, summary.objects = len(images), len(annotations)
    summary.per_class = {name: counts[k] for k, name in enumerate(VOC_CLASSES, start=1)}
    summary.difficult = sum(annotation['difficult'] for annotation in annotations)
    summary.truncated = sum(annotation['truncated'] for annotation in annotations)
    return {
        # No date: the same devkit gives the same bytes.
        'info': {'description': f'PASCAL VOC 2012 segmentation, {split}', 'left_out': summary.left_out},
        'licenses': [],
        'categories': [
            {'id': k, 'name': name, 'supercategory': groups[name]} for k, name in enumerate(VOC_CLASSES, start=1)
        ],
        'images': images,
        'annotations': annotations,
    }


GROUPS = {name: group for group, names in VOC_SUPERCATEGORIES.items() for name in names}


class VocSource:
    """A VOC devkit, read and checked as `tools/prepare_voc.py` does.

    Objects are those of SegmentationObject to the pixel, without the void border; `difficult` and
    `truncated` of the XML are kept.
    """

    kind = 'voc'
    cure = 'mend these files; where only classes or the XML are at odds with the masks, --trust-masks keeps the images'

    def __init__(self, root: Path, lists: dict[str, list[str]], problems: list[str], trust_masks: bool) -> None:
        self.root, self.classes = root, list(VOC_CLASSES)
        self.supercategories, self.problems = GROUPS, problems
        self._lists, self._trust_masks = lists, trust_masks

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """See `Source.recognise`."""
        try:
            devkit = find_devkit(root)
        except UserError:
            return None
        wanted = ('JPEGImages', 'SegmentationObject', 'SegmentationClass')
        if not all((devkit / name).is_dir() for name in wanted):
            return None
        return f'{devkit} has ' + ', '.join(f'{name}/' for name in wanted)

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> VocSource:
        """See `Source.open`. Option: `trust_masks`."""
        cure = f'name the folder that holds VOCdevkit/VOC2012, or unpack {VOC_URL} anew'
        try:
            devkit = find_devkit(root)
            lists, bad_lines = voc.read_lists(devkit, ('train', 'val'))
        except UserError as error:
            raise UserError(error.message, error.problems, cure) from None
        problems = [line for lines in bad_lines.values() for line in lines]
        return cls(devkit, lists, problems, bool(options.get('trust_masks')))

    def items(self) -> list[Item]:
        """See `Source.items`."""
        return [
            Item(image_id, self.root / 'JPEGImages' / f'{image_id}.jpg', None, split)
            for split, ids in self._lists.items()
            for image_id in ids
        ]

    def read(self, item: Item) -> Record:
        """See `Source.read`."""
        read = voc.read_image(self.root, item.key)
        record = Record(item.image, read.width, read.height, [], item.split, read.problems)
        trusted = self._trust_masks or item.key in voc.KNOWN_DISPUTES
        (record.notes if trusted else record.problems).extend(read.disputes)
        if read.without_mask:
            record.notes.append(f'{item.key}: {read.without_mask} objects of the XML have no mask; not written')
        record.instances = [
            Instance(
                VOC_CLASSES[annotation['category_id'] - 1],
                annotation['segmentation'],
                extra={key: annotation[key] for key in ('difficult', 'truncated')},
            )
            for annotation in read.annotations
        ]
        return record
