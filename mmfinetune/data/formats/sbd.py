"""The Semantic Boundaries Dataset (SBD): masks of VOC's classes on VOC's images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data.classes import VOC_CLASSES, VOC_GROUPS
from mmfinetune.data.formats.folders import read_ids, require_size
from mmfinetune.data.formats.voc import VOID
from mmfinetune.data.formats.voc_devkit import VOC_URL, find_devkit
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import open_regular, reason_of, shown
from mmfinetune.utils.images import MOST_BYTES
from mmfinetune.utils.masks import masks_to_rles

SBD_URL = 'https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz'
TRAIN_NOVAL_URL = 'http://home.bharathh.info/pubs/codes/SBD/train_noval.txt'


class SbdReader(Reader):
    """SBD: masks of 11,355 images of VOC 2012, without a void border.

    Its own train and val cut across VOC's: training on both would be training on images of VOC
    2012 val.
    """

    def __init__(self, root: Path, lists: dict[str, list[str]], notes: list[Message]) -> None:
        super().__init__(root, list(VOC_CLASSES))
        self.supercategories, self.notes = VOC_GROUPS, notes
        self._lists = lists

    @classmethod
    def detect(cls, root: Path) -> str | None:
        folder = _sbd_folder(root)
        found = folder and next((folder / 'inst').glob('*.mat'), None)
        return f'{folder} has inst/*.mat and img/' if found else None

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> SbdReader:
        """See `Reader.open`. Options: `sbd_split`, `voc` (a devkit, for VOC 2012's val list).

        `sbd_split` is 'train_noval' (the published list; where that is missing but `voc` is given,
        the next one), 'trainval_noval' (train and val without VOC 2012 val) or 'official'.
        """
        folder = _sbd_folder(root)
        if not folder:
            raise UserError('sbd-missing', problems=map(str, _sbd_places(root)), path=root, url=SBD_URL)
        wanted, devkit = options.get('sbd_split') or 'train_noval', options.get('voc')
        notes = []
        if wanted == 'train_noval' and not (folder / 'train_noval.txt').is_file() and devkit:
            wanted = 'trainval_noval'
            notes.append(Message('sbd-other-list'))
        if wanted == 'train_noval':
            hint = (
                f'download {TRAIN_NOVAL_URL} into {folder}, name a VOC 2012 devkit with --voc, or use '
                '--sbd-split official if you do not evaluate on VOC 2012 val'
            )
            return cls(folder, {'train': _ids(folder / 'train_noval.txt', hint)}, notes)
        lists = {split: _ids(folder / f'{split}.txt', f'unpack {SBD_URL} again') for split in ('train', 'val')}
        if wanted == 'trainval_noval':
            if not devkit:
                raise UserError('sbd-needs-voc')
            val = find_devkit(devkit) / 'ImageSets/Segmentation/val.txt'
            held_out = set(_ids(val, f'unpack {VOC_URL} again'))
            both = set(lists['train'] + lists['val'])
            lists = {'train': sorted(both - held_out)}
            notes.append(Message('sbd-val-left-out', count=len(both & held_out)))
        return cls(folder, lists, notes)

    def items(self) -> list[Item]:
        return [
            Item(image_id, self.root / f'img/{image_id}.jpg', self.root / f'inst/{image_id}.mat', split)
            for split, ids in self._lists.items()
            for image_id in ids
        ]

    def read(self, item: Item) -> Record:
        record = self.start(item)
        name = shown(item.label, self.root)
        with record.collecting(name):
            objects, labels = _read_mat(item.label)
            if not record.problems:
                require_size(objects, record, self.root)
        if record.problems:
            return record
        numbers = [number for number in np.unique(objects).tolist() if number not in (0, VOID)]
        beyond = [number for number in numbers if number > len(labels)]
        record.problems = [Message('sbd-no-class', place=name, number=n, count=len(labels)) for n in beyond]
        for number, label in enumerate(labels, start=1):
            if not 1 <= label <= len(VOC_CLASSES):
                record.problems.append(Message('sbd-class-number', place=name, number=number, label=label))
        if record.problems:
            return record
        if absent := len(labels) - len(numbers):
            record.notes.append(Message('sbd-no-pixel', place=name, absent=absent, count=len(labels)))
        record.instances = [
            Instance(VOC_CLASSES[labels[number - 1] - 1], rle, place=f'object {number}')
            for number, rle in zip(numbers, masks_to_rles(objects, numbers), strict=True)
        ]
        return record


def _sbd_places(root: Path) -> list[Path]:
    return [root, root / 'dataset', root / 'benchmark_RELEASE' / 'dataset']


def _sbd_folder(root: Path) -> Path | None:
    return next((place for place in _sbd_places(root) if (place / 'inst').is_dir() and (place / 'img').is_dir()), None)


def _ids(path: Path, advice: str) -> list[str]:
    """The image ids of a list.

    Raises:
        UserError: It is missing or unreadable, or a line is not an id or is duplicated.
    """
    try:
        ids, bad = read_ids(path)
    except Problem as problem:
        bad = [problem.message]
    if bad:
        raise UserError('sbd-list', problems=bad, path=path, advice=advice)
    return ids


def _read_mat(path: Path) -> tuple[np.ndarray, list[int]]:
    """Object numbers (height, width) and the class number of each object, from 1.

    Raises:
        Problem: The file is missing, damaged or something else.
    """
    from scipy.io import loadmat

    try:
        # Boundaries next to them are many sparse matrices that nothing here needs.
        with open_regular(path, MOST_BYTES) as file:
            found = loadmat(file, squeeze_me=True, struct_as_record=False, variable_names=['GTinst'])['GTinst']
        objects, labels = np.asarray(found.Segmentation), np.atleast_1d(found.Categories)
    except FileNotFoundError:
        raise Problem('sbd-mat-missing') from None
    # scipy's reader raises many kinds on damaged files.
    except Exception as error:
        raise Problem('sbd-mat-unreadable', type=type(error).__name__, reason=reason_of(error)) from None
    if objects.ndim != 2 or objects.dtype.kind not in 'ui' or labels.dtype.kind not in 'ui':
        raise Problem('sbd-mat-type')
    return objects, [int(label) for label in labels]
