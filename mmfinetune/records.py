"""What every reader of a data set hands over, and what readers share. No torch here."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from pycocotools import mask as mask_api

from mmfinetune.files import looks_like

# What OpenCV, with which training reads images, can decode.
IMAGE_SUFFIXES = frozenset({'.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.dib', '.tif',
                            '.tiff', '.webp', '.jp2', '.ppm', '.pgm', '.pbm', '.pnm'})

_TAIL = 2048  # bytes; some cameras and editors put a few behind the end mark
_END_MARKS = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}
_NOT_DATA = frozenset({'__MACOSX', 'Thumbs.db'})


@dataclass
class Instance:
    """One object of an image.

    Attributes:
        category: Name of its class.
        segmentation: Polygons as flat lists x, y, x, y, ... in pixels, or a COCO RLE
            `{'size': [height, width], 'counts': str}`. `prepare` checks both, and compresses an
            RLE whose counts are a list.
        iscrowd: Whether it is a group that evaluation ignores.
        place: Where it stands in the label file, for messages: 'annotation 17', 'shape 3'.
        extra: Further keys of the annotation with JSON values, such as VOC's `difficult`.
    """

    category: str
    segmentation: list[list[float]] | dict
    iscrowd: bool = False
    place: str = ''
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """One image and its objects.

    Attributes:
        image: The file as it lies in the source.
        width: In pixels, as training reads the image: EXIF orientation applied.
        height: Likewise.
        instances: Its objects; of no use when there are problems.
        split: 'train', 'val', 'test' or None.
        problems: What forbids the image: file, place, facts; one line each.
        notes: What was left out or mended without forbidding the image, one line each.
        image_id: Id to keep; all images of a split have one or none has.
        extra: Further keys of the image with JSON values, such as `license`.
    """

    image: Path
    width: int
    height: int
    instances: list[Instance]
    split: str | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    image_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Item:
    """One image before it is read.

    Attributes:
        key: Unique name of the item, shown in messages.
        image: The image file.
        label: Whatever the reader needs to find the labels: a path, numbers, a list of paths.
        split: 'train', 'val', 'test' or None.
    """

    key: str
    image: Path
    label: Any
    split: str | None = None


class Source(Protocol):
    """A data set of one kind; picklable, since it is sent to worker processes.

    A source may also have these attributes: `problems` and `notes` (lists of lines that belong to
    no single image), `cure` (how to mend problems of this kind), `category_ids` (ids to keep, by
    class name), `supercategories` (by class name) and `headers` (`info` and `licenses` by split).

    Attributes:
        kind: Name of the kind.
        root: Folder of the data set.
        classes: Names of all classes in label order.
    """

    kind: str
    root: Path
    classes: list[str]

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Why `root` seems to be of this kind, or None; looks at few files and never raises."""

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> Source:
        """The data set at `root`; raises UserError with all problems if it cannot be used."""

    def items(self) -> list[Item]:
        """All images, always in the same order."""

    def read(self, item: Item) -> Record:
        """Read one image; what is wrong with it goes into `Record.problems`, never raised."""


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """A mask as compressed COCO RLE.

    Args:
        mask: Boolean or 0/1 array (height, width).

    Returns:
        `{'size': [height, width], 'counts': str}`.
    """
    rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {'size': [int(side) for side in rle['size']], 'counts': rle['counts'].decode()}


def masks_to_rles(indices: np.ndarray, values: Iterable[int]) -> list[dict[str, Any]]:
    """The pixels of each value in an index image as compressed COCO RLE.

    Args:
        indices: Integer array (height, width).
        values: Values to encode; one that does not occur gives an empty mask.
    """
    height, width = indices.shape
    # All runs of the image at once, since comparing it with each value costs the whole image.
    columns = indices.ravel(order='F')
    starts = np.concatenate(([0], np.flatnonzero(columns[1:] != columns[:-1]) + 1))
    ends = np.append(starts[1:], columns.size)
    held = columns[starts]
    order = np.argsort(held, kind='stable')
    held = held[order]
    rles = []
    for value in values:
        own = order[np.searchsorted(held, value):np.searchsorted(held, value, side='right')]
        # Background and object in turns, from the first pixel to the last.
        edges = np.stack((starts[own], ends[own]), axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=columns.size).tolist()
        if not counts[-1] and len(counts) > 1:
            counts.pop()
        rle = mask_api.frPyObjects({'size': [height, width], 'counts': counts}, height, width)
        rles.append({'size': [height, width], 'counts': rle['counts'].decode()})
    return rles


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image, upright: EXIF orientation applied, as in training.

    Only the first and the last bytes of the file are read.

    Raises:
        ValueError: With a short reason: missing, empty, not an image, truncated.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not size:
            raise ValueError('empty file (0 bytes)')
        with warnings.catch_warnings():
            # Pillow warns of large images; their header alone is harmless.
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                width, height = image.size
                kind = image.format
                turned = _orientation(image) >= 5
        if turned and kind not in _END_MARKS:
            # OpenCV 4.12 does not turn WebP and does not decode a turned TIFF at all.
            raise ValueError(f'a {kind} turned by its EXIF orientation, which OpenCV does not '
                             'follow; save it upright')
        with path.open('rb') as file:
            file.seek(-min(_TAIL, size), os.SEEK_END)
            tail = file.read()
    except FileNotFoundError:
        raise ValueError('missing') from None
    except UnidentifiedImageError:
        raise ValueError('not an image' + _instead(path)) from None
    except Image.DecompressionBombError:
        raise ValueError('too many pixels; cut it into tiles') from None
    except ValueError:
        raise
    # Pillow's plugins raise many kinds (OSError, SyntaxError, struct.error, …) on damaged headers.
    except Exception as error:
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise ValueError(f'unreadable ({reason})') from None
    mark = _END_MARKS.get(kind or '')
    if mark and mark not in tail:
        raise ValueError(f'truncated {kind} (its end is missing)')
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on width and height change places."""
    exif = Image.Exif()
    if image.format == 'PNG':
        # Pillow's `getexif` would decode a PNG to look for EXIF data behind the pixels.
        exif.load(image.info.get('exif') or b'')
    else:
        exif = image.getexif()
    found = exif.get(ExifTags.Base.Orientation)
    return found if found in range(1, 9) else 1


def _instead(path: Path) -> str:
    try:
        found = looks_like(path)
    except OSError:
        return ''
    return f' but {found}' if found else ''


def natural_key(text: str | Path) -> tuple:
    """A sort key in which `img2` comes before `img10`; no two texts compare as equal."""
    text = text.as_posix() if isinstance(text, Path) else text
    # Digits stand at odd places, so that numbers meet numbers only.
    parts = tuple(int(part) if place % 2 else part.casefold()
                  for place, part in enumerate(re.split(r'([0-9]+)', text)))
    return (parts, text)


def find_files(root: str | Path, suffixes: Iterable[str]) -> list[Path]:
    """All files below a folder with one of the suffixes, in natural order of their paths.

    Hidden files and folders and `__MACOSX` are skipped. Linked folders are followed, each folder
    once, so that a link to a folder above does no harm.

    Args:
        root: The folder.
        suffixes: In lower case with the dot; the case of the files' own does not matter.
    """
    suffixes = frozenset(suffixes)
    found = [path for path in _walk(Path(root)) if path.suffix.lower() in suffixes]
    return sorted(found, key=natural_key)


def find_images(root: str | Path) -> list[Path]:
    """All image files below a folder; see `find_files`."""
    return find_files(root, IMAGE_SUFFIXES)


def _walk(root: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        place = Path(folder)
        status = place.stat()
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        # The order decides by which of two links a folder is reached.
        subfolders[:] = sorted(name for name in subfolders if _is_data(name))
        yield from (place / name for name in names if _is_data(name))


def _is_data(name: str) -> bool:
    return not name.startswith('.') and name not in _NOT_DATA


def shown(path: Path, root: Path) -> str:
    """A path for messages: relative to the data set where it lies in it, with slashes."""
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.as_posix()


def read_text(path: Path) -> str:
    """The text of a label file: UTF-8, or UTF-16 with its mark.

    Raises:
        ValueError: With a short reason: missing, unreadable, not text.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError('missing') from None
    except OSError as error:
        raise ValueError(f'unreadable ({error.strerror or error})') from None
    try:
        # A mark in front (Windows editors write it) would become part of the first word.
        return data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'not UTF-8 text (byte {error.start})') from None


def read_json(path: Path) -> Any:
    """The value of a JSON file; NaN and infinity are let through, see `polygon_problem`.

    Raises:
        ValueError: With a short reason and the place.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError('empty file')
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f'not JSON ({error.msg}, line {error.lineno}, '
                         f'column {error.colno})') from None
    except RecursionError:
        raise ValueError('not usable JSON (nested too deeply)') from None


def polygon_problem(points: Any, width: int, height: int) -> str | None:
    """What is wrong with a polygon that cannot be meant so; None if nothing.

    One of fewer than three points, or outside the image by less than the image's longer side, is
    not wrong: it covers few pixels or none, and is clipped.

    Args:
        points: A flat list x, y, x, y, ... in pixels.
        width: Of the image.
        height: Of the image.
    """
    if not isinstance(points, (list, tuple)):
        return f'a polygon is {type(points).__name__}, not a list of numbers'
    for value in points:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f'a polygon holds {_short(value)}, not a number'
    if len(points) % 2:
        return f'a polygon has an odd number of coordinates ({len(points)})'
    # Rasterising costs the length of the outline, without limit.
    reach = max(width, height)
    far = next((value for value in points if not -reach <= value <= 2 * reach), None)
    if far is None:
        return None
    if far in (math.inf, -math.inf) or far != far:
        return 'a polygon holds NaN or infinity'
    return f'a polygon reaches {_short(far)}, far outside the {width}x{height} image'


def rle_problem(rle: Any, width: int, height: int) -> str | None:
    """What is wrong with a COCO RLE, compressed or not; None if nothing.

    pycocotools does not check these, and a bad one makes it write past its memory.

    Args:
        rle: `{'size': [height, width], 'counts': str or list of ints}`.
        width: Of the image.
        height: Of the image.
    """
    if not isinstance(rle, dict) or not {'size', 'counts'} <= rle.keys():
        return "an RLE without 'size' and 'counts'"
    if rle['size'] != [height, width]:
        return f"an RLE of size {_short(rle['size'])} (height, width), not [{height}, {width}]"
    counts = rle['counts']
    if isinstance(counts, str):
        try:
            runs = rle_runs(counts)
        except ValueError as error:
            return f'an RLE whose counts are {error}'
    elif isinstance(counts, list) and all(type(run) is int for run in counts):
        if any(not 0 <= run <= width * height for run in counts):
            return 'an RLE with a run that is negative or longer than the image'
        runs = np.array(counts, dtype=np.int64)
    else:
        return "an RLE whose 'counts' are neither a string nor a list of integers"
    if runs.size and runs.min() < 0:
        return 'an RLE with a negative run'
    if runs.sum() != width * height:
        return f'an RLE of {runs.sum()} pixels for {width * height} of the image'
    return None


def rle_runs(counts: str) -> np.ndarray:
    """The run lengths (int64) in a compressed RLE string.

    Each number is written in groups of 5 bits, low ones first, and from the fourth on as the
    difference from the one two before (`rleFrString` of pycocotools' maskApi.c).

    Raises:
        ValueError: It is no such string.
    """
    try:
        codes = np.frombuffer(counts.encode('ascii'), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        raise ValueError('not ASCII') from None
    if not codes.size:
        return codes
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError('no compressed RLE')
    is_last = (codes & 0x20) == 0
    if not is_last[-1]:
        raise ValueError('cut off')
    ends = np.flatnonzero(is_last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits, more than the 32 of a run
        raise ValueError('no compressed RLE')
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 0x1f) << shifts, starts)
    negative = (codes[ends] & 0x10) != 0
    runs[negative] -= np.int64(1) << (5 * lengths[negative])
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + '...'
