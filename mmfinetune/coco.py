"""Checks of COCO annotation files against the config, before any training. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from mmfinetune.check_table import load, name_problem
from mmfinetune.errors import UserError
from mmfinetune.finding_kinds import KINDS


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
    cure = 'make it again with `python tools/prepare_voc.py`, or correct data_root in the ' \
        'config; `python tools/check_dataset.py` says more'
    if not path.is_file():
        raise UserError(f'There is no annotation file {path}', cure=cure)
    data, problem = load(path)
    if problem:
        code, detail = problem
        raise UserError(f'{path} is no COCO annotation file: {detail or KINDS[code].title}',
                        cure=KINDS[code].cure if data else cure)
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
        raise UserError(f'{path}: annotation id 0 (image {ids_of_zero[0]}); COCO evaluation takes '
                        'it for "no match"', cure='number annotations from 1')
    if classes is not None and tuple(classes) != names:
        raise UserError(
            f'{path}: its categories are not the classes of the config, in their order:',
            [f'config: {", ".join(classes)}', f'file:   {", ".join(names)}'],
            'set metainfo.classes to the names in the order of the file, and num_classes to their '
            'number')
    problems = []
    for file_name, size in image_files.values():
        problem = name_problem(file_name) or _image_problem(image_root / file_name, size)
        if problem:
            problems.append(problem)
    if problems:
        raise UserError(f'{path}: {len(problems)} of {len(images)} images cannot be used:',
                        problems, 'put good copies there, correct data_root, or leave them out '
                        '(`python tools/prepare_voc.py --skip-bad` does it for VOC)')
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
    if kind == 'JPEG' and b'\xff\xd9' not in tail or kind == 'PNG' and b'IEND' not in tail:
        return f'{path}: truncated'
    return None
