"""Checks of COCO annotation files against the config, before any training. No torch here."""

from __future__ import annotations

import contextlib
import gc
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmfinetune.data.check.kinds import KINDS
from mmfinetune.utils.errors import UserError

pass


@dataclass(frozen=True)
class Split:
    """What an annotation file holds.

    Attributes:
        path: The file.
        images: Number of images.
        annotations: Number of annotations, crowd regions included.
        usable: Number of images with at least one annotation that is no crowd region.
        classes: Category names in the file's order, which is that of the labels.
    """

    path: Path
    images: int
    annotations: int
    usable: int
    classes: tuple[str, ...]


def read_split(path: Path, image_root: Path, classes: Sequence[str] | None = None) -> Split:
    """Read an annotation file and check it and the headers of its images.

    Args:
        path: COCO JSON.
        image_root: Folder that the file names are relative to.
        classes: Class names of the config in label order, if it names them.

    Raises:
        UserError: All problems of the first kind found: unreadable file, missing parts, id 0,
            other classes than the config's, missing or unreadable images.
    """
    cure = (
        'make it again with `python tools/prepare_voc.py`, or correct data_root in the '
        'config; `python tools/check_dataset.py` says more'
    )
    if not path.is_file():
        raise UserError(f'There is no annotation file {path}', cure=cure)
    data, problem = load(path)
    if problem:
        code, detail = problem
        raise UserError(
            f'{path} is no COCO annotation file: {detail or KINDS[code].title}', cure=KINDS[code].cure if data else cure
        )
    try:
        images, annotations, categories = (data[k] for k in ('images', 'annotations', 'categories'))
        names = tuple(c['name'] for c in categories)
        with_objects = {a['image_id'] for a in annotations if not a.get('iscrowd', 0)}
        ids_of_zero = [a['image_id'] for a in annotations if a['id'] == 0]
        image_files = {i['id']: (i['file_name'], (i['width'], i['height'])) for i in images}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f'key {error} is missing' if isinstance(error, KeyError) else str(error)
        raise UserError(f'{path} is no COCO annotation file: {what}', cure=cure) from None
    if not images:
        raise UserError(f'{path} lists no images', cure=cure)
    if ids_of_zero:
        raise UserError(
            f'{path}: annotation id 0 (image {ids_of_zero[0]}); COCO evaluation takes it for "no match"',
            cure='number annotations from 1',
        )
    if classes is not None and tuple(classes) != names:
        raise UserError(
            f'{path}: its categories are not the classes of the config, in their order:',
            [f'config: {", ".join(classes)}', f'file:   {", ".join(names)}'],
            'set metainfo.classes to the names in the order of the file, and num_classes to their number',
        )
    problems = []
    for file_name, size in image_files.values():
        problem = name_problem(file_name) or _image_problem(image_root / file_name, size)
        if problem:
            problems.append(problem)
    if problems:
        raise UserError(
            f'{path}: {len(problems)} of {len(images)} images cannot be used:',
            problems,
            'put good copies there, correct data_root, or leave them out '
            '(`python tools/prepare_voc.py --skip-bad` does it for VOC)',
        )
    return Split(path, len(images), len(annotations), len(with_objects & set(image_files)), names)


def _image_problem(path: Path, size: tuple[int, int]) -> str | None:
    """What is wrong with an image, seen from its first and last bytes only."""
    try:
        with Image.open(path) as image:
            found, kind = image.size, image.format
        with path.open('rb') as file:
            file.seek(-min(2048, path.stat().st_size), 2)
            tail = file.read()
    except FileNotFoundError:
        return f'{path}: missing'
    # Pillow's header readers raise many kinds (OSError, SyntaxError, struct.error, …).
    except Exception as error:
        reason = 'not an image' if isinstance(error, UnidentifiedImageError) else error
        return f'{path}: {reason}'
    # Cameras write (height, width) before the EXIF rotation is undone; mmcv undoes it.
    if found not in (size, size[::-1]):
        return f'{path}: is {found[0]}x{found[1]}, the annotation file says {size[0]}x{size[1]}'
    if (kind == 'JPEG' and b'\xff\xd9' not in tail) or (kind == 'PNG' and b'IEND' not in tail):
        return f'{path}: truncated'
    return None


def read_coco(path: Path) -> dict[str, Any]:
    """Read a COCO annotation file as far as splitting and counting rely on it.

    Raises:
        UserError: It is missing or malformed, or ids in it point nowhere or at two things.
    """
    cure = '`python tools/check_dataset.py` lists all that is wrong with a file; --fix mends a copy'
    if not path.is_file():
        raise UserError(
            f'There is no annotation file {path}', cure='make one with `python tools/prepare_data.py SRC OUT`'
        )
    # The collector would look through millions of new objects again and again: twice the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        data = json.loads(path.read_bytes())
        images = [(i['id'], i['file_name']) for i in data['images']]
        categories = [(c['id'], c['name']) for c in data['categories']]
        used = [(a['image_id'], a['category_id']) for a in data['annotations']]
        names, labels = dict(images), dict(categories)
        lost = sorted({i for i, _ in used if i not in names}, key=str)
        unknown = sorted({c for _, c in used if c not in labels}, key=str)
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        what = f'key {error} is missing' if isinstance(error, KeyError) else str(error)
        raise UserError(f'{path} is no COCO annotation file: {what}', cure=cure) from None
    finally:
        if collecting:
            gc.enable()
    problems = [
        f'two {kind} have the same {what}: {value!r}'
        for kind, what, values in (
            ('images', 'id', [i for i, _ in images]),
            ('images', 'file_name', [n for _, n in images]),
            ('categories', 'id', [i for i, _ in categories]),
            ('categories', 'name', [n for _, n in categories]),
        )
        for value in _repeated(values)
    ]
    problems += [f'file_name of image {i!r} is no text: {n!r}' for i, n in images if not isinstance(n, str)]
    problems += [f'name of category {i!r} is no text: {n!r}' for i, n in categories if not isinstance(n, str)]
    problems += [f'annotations of an image that is not listed: id {i!r}' for i in lost]
    problems += [f'annotations of a category that is not listed: id {c!r}' for c in unknown]
    if problems:
        raise UserError(f'{path} contradicts itself:', problems, cure)
    if not images:
        raise UserError(f'{path} lists no images', cure=cure)
    return data


def _repeated(values: list) -> list:
    """The values that occur more than once; those that cannot be hashed are reported elsewhere."""
    seen, twice = set(), {}
    for value in values:
        if isinstance(value, (str, int, float)):
            twice.update({value: None} if value in seen else {})
            seen.add(value)
    return list(twice)


def load(path: Path, compact: bool = False) -> tuple[dict | None, tuple[str, str] | None]:
    """Read JSON as pycocotools does, and say what is wrong with it.

    Args:
        path: The file.
        compact: Polygons become arrays of doubles, a quarter of the memory.

    Returns:
        The top object, and code and detail of a problem. Both where the file can be read, but
        not by pycocotools.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None, ('no-file', '')
    except (OSError, ValueError) as error:
        return None, ('file-unreadable', getattr(error, 'strerror', None) or str(error))
    encoding = json.detect_encoding(content)
    problem = None if encoding == 'utf-8' else ('encoding', encoding.replace('-sig', ' with a byte order mark'))
    # Millions of objects are made, none of them in a cycle: collecting would double the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        text = content.decode(encoding)
        del content
        data = json.loads(text, object_hook=_compact if compact else None)
    except UnicodeDecodeError as error:
        return None, ('encoding', f'byte {error.start} is no {encoding}')
    except RecursionError:
        return None, ('nesting', '')
    except ValueError as error:
        # Also for integers of more digits than Python converts.
        return None, ('not-json', str(error))
    finally:
        if collecting:
            gc.enable()
    if not isinstance(data, dict):
        return None, ('top-level', f'it is {json_kind(data)}')
    return data, problem


def _compact(entry: dict) -> dict:
    segmentation = entry.get('segmentation')
    if type(segmentation) is list:
        # Otherwise they are not polygons of numbers, and the check of the masks says so.
        with contextlib.suppress(TypeError, OverflowError):
            entry['segmentation'] = [array('d', polygon) for polygon in segmentation]
    return entry


def json_kind(value: object) -> str:
    names = {
        dict: 'an object',
        list: 'a list',
        str: 'a string',
        bool: 'a truth value',
        int: 'a number',
        float: 'a number',
        type(None): 'null',
        array: 'a polygon',
    }
    return names.get(type(value), type(value).__name__)


def shown_value(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + '…'


def name_problem(name: object) -> str:
    """Why a ``file_name`` can be that of no file; empty if it can."""
    if not isinstance(name, str):
        return f'file_name {shown_value(name)}'
    if not name.strip():
        return 'file_name is empty'
    if '\0' in name:
        return 'file_name has a NUL character'
    return '' if is_text(name) else 'file_name is no valid Unicode'


def is_text(name: str) -> bool:
    # A lone surrogate is valid JSON, but can be neither printed nor be in the name of a file.
    return not any('\ud800' <= c <= '\udfff' for c in name)
