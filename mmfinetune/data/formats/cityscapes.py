"""Cityscapes: fine annotations of street scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data.formats.folders import require_size
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import natural_key, shown
from mmfinetune.utils.images import read_pixels
from mmfinetune.utils.masks import masks_to_rles

# Label ids and names of the classes with instances that are evaluated (cityscapesScripts,
# helpers/labels.py); caravan (29) and trailer (30) have instances, but evaluation ignores them.
CLASSES = {24: 'person', 25: 'rider', 26: 'car', 27: 'truck', 28: 'bus', 31: 'train', 32: 'motorcycle', 33: 'bicycle'}

_GROUPS = {name: 'human' if label < 26 else 'vehicle' for label, name in CLASSES.items()}
_PER_LABEL = 1000  # an object's value is its label id times this, plus its number
_IMAGE_END, _LABEL_END = '_leftImg8bit.png', '_gtFine_instanceIds.png'


class CityscapesReader(Reader):
    """`leftImg8bit/` and `gtFine/` of Cityscapes, train and val; the labels of test are withheld.

    An object is the pixels of one value in `*_gtFine_instanceIds.png`. A value that is a bare label
    id marks a group in which objects could not be told apart: it becomes a crowd region.
    """

    def __init__(self, root: Path, images: dict[str, list[Path]]) -> None:
        super().__init__(root, list(CLASSES.values()))
        self.supercategories, self._images = _GROUPS, images

    @classmethod
    def detect(cls, root: Path) -> str | None:
        found = (root / 'leftImg8bit').is_dir() and (root / 'gtFine').is_dir()
        return 'leftImg8bit/ next to gtFine/' if found else None

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> CityscapesReader:  # noqa: ARG003
        missing = [f'{name}/' for name in ('leftImg8bit', 'gtFine') if not (root / name).is_dir()]
        found = []
        for name, end in (('leftImg8bit', _IMAGE_END), ('gtFine', _LABEL_END)):
            paths = {s: sorted((root / name / s).glob(f'*/*{end}'), key=natural_key) for s in ('train', 'val')}
            found.append({split: listed for split, listed in paths.items() if listed})
            if not found[-1]:
                missing.append(f'{name}/{{train,val}}/CITY/*{end}')
        if missing:
            raise UserError('cityscapes-incomplete', problems=missing, path=root)
        images, labels = found
        reader = cls(root, images)
        wanted = {_label_of(root, path) for paths in images.values() for path in paths}
        spare = (path for split in images for path in labels.get(split, ()) if path not in wanted)
        reader.problems = [Message('cityscapes-no-image', place=shown(path, root)) for path in spare]
        return reader

    def items(self) -> list[Item]:
        return [
            Item(path.name.removesuffix(_IMAGE_END), path, _label_of(self.root, path), split)
            for split, paths in self._images.items()
            for path in paths
        ]

    def read(self, item: Item) -> Record:
        record = self.start(item)
        with record.collecting(shown(item.label, self.root)):
            values, mode, _ = read_pixels(item.label)
            if mode not in ('I', 'I;16', 'I;16B', 'L'):
                raise Problem('cityscapes-mode', mode=mode)
            if not record.problems:
                require_size(values, record, self.root)
                self._read_objects(values.astype(np.int32), record)
        return record

    def _read_objects(self, values: np.ndarray, record: Record) -> None:
        present = np.unique(values).tolist()
        unknown = [value for value in present if _label_id(value) > max(CLASSES)]
        if unknown:
            raise Problem('cityscapes-value', value=unknown[0])
        numbers = [value for value in present if _label_id(value) in CLASSES]
        record.instances = [
            Instance(CLASSES[_label_id(value)], rle, iscrowd=value < _PER_LABEL, place=f'value {value}')
            for value, rle in zip(numbers, masks_to_rles(values, numbers), strict=True)
        ]


def _label_of(root: Path, image: Path) -> Path:
    split, city = image.parts[-3:-1]
    return root / 'gtFine' / split / city / (image.name.removesuffix(_IMAGE_END) + _LABEL_END)


def _label_id(value: int) -> int:
    return value // _PER_LABEL if value >= _PER_LABEL else value
