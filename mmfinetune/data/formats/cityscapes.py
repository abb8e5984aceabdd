"""Cityscapes: fine annotations of street scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmfinetune.data.formats.folders import require_size, start_record
from mmfinetune.data.records import Instance, Item, Record
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import natural_key, shown
from mmfinetune.utils.masks import masks_to_rles

# Label ids and names of the classes with instances that are evaluated (cityscapesScripts,
# helpers/labels.py); caravan (29) and trailer (30) have instances, but evaluation ignores them.
CLASSES = {24: 'person', 25: 'rider', 26: 'car', 27: 'truck', 28: 'bus', 31: 'train', 32: 'motorcycle', 33: 'bicycle'}

_GROUPS = {name: 'human' if label < 26 else 'vehicle' for label, name in CLASSES.items()}
_PER_LABEL = 1000  # an object's value is its label id times this, plus its number
_IMAGE_END, _LABEL_END = '_leftImg8bit.png', '_gtFine_instanceIds.png'
_CURE = 'unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip side by side'


class CityscapesSource:
    """`leftImg8bit/` and `gtFine/` of Cityscapes, train and val; the labels of test are withheld.

    An object is the pixels of one value in `*_gtFine_instanceIds.png`. A value that is a bare label
    id marks a group in which objects could not be told apart: it becomes a crowd region.
    """

    kind = 'cityscapes'

    def __init__(self, root: Path, images: dict[str, list[Path]], problems: list[str]) -> None:
        self.root, self.classes = root, list(CLASSES.values())
        self.supercategories, self.problems, self._images = _GROUPS, problems, images

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """See `Source.recognise`."""
        if (root / 'leftImg8bit').is_dir() and (root / 'gtFine').is_dir():
            return 'leftImg8bit/ beside gtFine/'
        return None

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> CityscapesSource:
        """See `Source.open`."""
        missing = [f'{name}/' for name in ('leftImg8bit', 'gtFine') if not (root / name).is_dir()]
        images = {
            split: sorted((root / 'leftImg8bit' / split).glob(f'*/*{_IMAGE_END}'), key=natural_key)
            for split in ('train', 'val')
        }
        images = {split: paths for split, paths in images.items() if paths}
        if not images:
            missing.append(f'leftImg8bit/{{train,val}}/CITY/*{_IMAGE_END}')
        if missing:
            raise UserError(f'{root}: not a whole Cityscapes. Missing:', missing, _CURE)
        labels = {
            split: sorted((root / 'gtFine' / split).glob(f'*/*{_LABEL_END}'), key=natural_key) for split in images
        }
        if not any(labels.values()):
            raise UserError(f'{root}: no gtFine/{{train,val}}/CITY/*{_LABEL_END}', cure=_CURE)
        wanted = {_label_of(root, path) for paths in images.values() for path in paths}
        return cls(
            root,
            images,
            [
                f'{shown(path, root)}: its image is missing'
                for paths in labels.values()
                for path in paths
                if path not in wanted
            ],
        )

    def items(self) -> list[Item]:
        """See `Source.items`."""
        return [
            Item(path.name.removesuffix(_IMAGE_END), path, _label_of(self.root, path), split)
            for split, paths in self._images.items()
            for path in paths
        ]

    def read(self, item: Item) -> Record:
        """See `Source.read`."""
        record = start_record(item, self.root)
        name = shown(item.label, self.root)
        try:
            values = _read_values(item.label)
            if not record.problems:
                require_size(values, record, self.root)
        except ValueError as error:
            record.problems.append(f'{name}: {error}')
        if record.problems:
            return record
        present = np.unique(values).tolist()
        numbers = [value for value in present if _label_id(value) in CLASSES]
        unknown = [value for value in present if _label_id(value) > max(CLASSES)]
        if unknown:
            record.problems.append(
                f'{name}: the value {unknown[0]} is no label id of Cityscapes (0 to 33); a file of another kind?'
            )
            return record
        record.instances = [
            Instance(CLASSES[_label_id(value)], rle, iscrowd=value < _PER_LABEL, place=f'value {value}')
            for value, rle in zip(numbers, masks_to_rles(values, numbers), strict=True)
        ]
        return record


def _label_of(root: Path, image: Path) -> Path:
    split, city = image.parts[-3:-1]
    return root / 'gtFine' / split / city / (image.name.removesuffix(_IMAGE_END) + _LABEL_END)


def _label_id(value: int) -> int:
    return value // _PER_LABEL if value >= _PER_LABEL else value


def _read_values(path: Path) -> np.ndarray:
    """The values of an instanceIds PNG, int32 (height, width).

    Raises:
        ValueError: With a short reason.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ('I', 'I;16', 'I;16B', 'L'):
                raise ValueError(f'mode {image.mode} where 16-bit grey values belong')
            return np.asarray(image).astype(np.int32)
    except FileNotFoundError:
        raise ValueError('missing') from None
    except ValueError:
        raise
    # Pillow's decoders raise many kinds on damaged files.
    except Exception as error:
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise ValueError(f'unreadable ({reason})') from None
