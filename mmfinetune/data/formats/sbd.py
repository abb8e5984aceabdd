"""Data sets with PASCAL VOC's classes: the VOC devkit, and SBD on VOC's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.data.formats import voc
from mmfinetune.data.formats.folders import require_size, start_record
from mmfinetune.data.formats.voc import GROUPS
from mmfinetune.data.formats.voc_devkit import VOC_URL, find_devkit
from mmfinetune.data.records import Instance, Item, Record
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import read_text, shown
from mmfinetune.utils.masks import masks_to_rles

SBD_URL = 'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz'
TRAIN_NOVAL_URL = 'http://home.bharathh.info/pubs/codes/SBD/train_noval.txt'


class SbdSource:
    """The Semantic Boundaries Dataset: masks of 11,355 images of VOC 2012, without a void border.

    Its own train and val cut across VOC's: training on both would be training on images of VOC
    2012 val.
    """

    kind = 'sbd'

    def __init__(self, root: Path, lists: dict[str, list[str]], notes: list[str]) -> None:
        self.root, self.classes = root, list(VOC_CLASSES)
        self.supercategories, self.notes = GROUPS, notes
        self._lists = lists

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """See `Source.recognise`."""
        try:
            folder = _sbd_folder(root)
            if folder and next((folder / 'inst').glob('*.mat'), None):
                return f'{folder} has inst/*.mat and img/'
        except OSError:
            pass
        return None

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> SbdSource:
        """See `Source.open`. Options: `sbd_split`, `voc` (a devkit, for VOC 2012's val list).

        `sbd_split` is 'train_noval' (the published list; where that is missing but `voc` is given,
        as the next), 'trainval_noval' (train and val without VOC 2012 val) or 'official'.
        """
        folder = _sbd_folder(root)
        if not folder:
            raise UserError(
                f'{root}: no SBD here. Looked for inst/ and img/ in',
                [str(place) for place in _sbd_places(root)],
                f'unpack {SBD_URL} and name its folder',
            )
        wanted, devkit = options.get('sbd_split') or 'train_noval', options.get('voc')
        notes = []
        if wanted == 'train_noval' and not (folder / 'train_noval.txt').is_file() and devkit:
            wanted = 'trainval_noval'
            notes.append('no train_noval.txt; took train and val without VOC 2012 val')
        if wanted == 'train_noval':
            lists = {
                'train': _ids(
                    folder / 'train_noval.txt',
                    (
                        f'fetch {TRAIN_NOVAL_URL} into {folder}, give a VOC 2012 devkit by --voc, or take '
                        '--sbd-split official if you do not evaluate on VOC 2012 val'
                    ),
                )
            }
        else:
            lists = {split: _ids(folder / f'{split}.txt', f'unpack {SBD_URL} anew') for split in ('train', 'val')}
        if wanted == 'trainval_noval':
            if not devkit:
                raise UserError(
                    '--sbd-split trainval_noval needs the list of VOC 2012 val', cure='give a VOC 2012 devkit by --voc'
                )
            val = find_devkit(devkit) / 'ImageSets/Segmentation/val.txt'
            held_out = set(_ids(val, f'unpack {VOC_URL} anew'))
            both = dict.fromkeys(lists['train'] + lists['val'])
            lists = {'train': sorted(image_id for image_id in both if image_id not in held_out)}
            notes.append(f'{len(both) - len(lists["train"])} images of VOC 2012 val left out')
        return cls(folder, lists, notes)

    def items(self) -> list[Item]:
        """See `Source.items`."""
        return [
            Item(image_id, self.root / 'img' / f'{image_id}.jpg', self.root / 'inst' / f'{image_id}.mat', split)
            for split, ids in self._lists.items()
            for image_id in ids
        ]

    def read(self, item: Item) -> Record:
        """See `Source.read`."""
        record = start_record(item, self.root)
        name = shown(item.label, self.root)
        try:
            objects, labels = _read_mat(item.label)
            if not record.problems:
                require_size(objects, record, self.root)
        except ValueError as error:
            record.problems.append(f'{name}: {error}')
        if record.problems:
            return record
        numbers = [number for number in np.unique(objects).tolist() if number not in (0, voc.VOID)]
        strange = [
            f'{name}: object {number} has no class; Categories has {len(labels)}'
            for number in numbers
            if number > len(labels)
        ]
        strange += [
            f'{name}: object {number} has the class {label}, not one of 1 to 20'
            for number, label in enumerate(labels, start=1)
            if not 1 <= label <= len(VOC_CLASSES)
        ]
        if strange:
            record.problems += strange
            return record
        absent = len(labels) - len(numbers)
        if absent:
            record.notes.append(f'{name}: {absent} of {len(labels)} objects have no pixel')
        record.instances = [
            Instance(VOC_CLASSES[labels[number - 1] - 1], rle, place=f'object {number}')
            for number, rle in zip(numbers, masks_to_rles(objects, numbers), strict=True)
        ]
        return record


def _sbd_places(root: Path) -> list[Path]:
    return [root, root / 'dataset', root / 'benchmark_RELEASE' / 'dataset']


def _sbd_folder(root: Path) -> Path | None:
    return next((place for place in _sbd_places(root) if (place / 'inst').is_dir() and (place / 'img').is_dir()), None)


def _ids(path: Path, cure: str) -> list[str]:
    """The image ids of a list, one a line.

    Raises:
        UserError: It is missing or unreadable, or a line is no id or comes twice.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except ValueError as error:
        raise UserError(f'{path}: {error}', cure=cure) from None
    first: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        if line and (len(line.split()) > 1 or '/' in line or '\\' in line):
            problems.append(f"line {number}: '{line}' is not one image id")
        elif line and first.setdefault(line, number) != number:
            problems.append(f"line {number}: '{line}' is listed twice")
    if problems or not first:
        raise UserError(f'{path}: not a list of image ids', problems or ['no image id in it'], cure)
    return list(first)


def _read_mat(path: Path) -> tuple[np.ndarray, list[int]]:
    """Object numbers (height, width) and the class number of each object, from 1.

    Raises:
        ValueError: With a short reason.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise ValueError('missing')
    try:
        # Boundaries beside them are many sparse matrices that nothing here needs.
        found = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=['GTinst'])['GTinst']
        objects, labels = np.asarray(found.Segmentation), np.atleast_1d(found.Categories)
    # scipy's reader raises many kinds on damaged files.
    except Exception as error:
        raise ValueError(f'unreadable ({type(error).__name__}: {error})') from None
    if objects.ndim != 2 or objects.dtype.kind not in 'ui' or labels.dtype.kind not in 'ui':
        raise ValueError('GTinst.Segmentation is no image of integers')
    return objects, [int(label) for label in labels]
