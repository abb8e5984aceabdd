"""What every reader of a data set hands over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfinetune.utils.errors import Message, Problem
from mmfinetune.utils.files import shown
from mmfinetune.utils.images import image_size


@dataclass
class Instance:
    """One object of an image.

    Attributes:
        category: Name of its class.
        segmentation: Polygons as flat lists x, y, x, y, ... in pixels, or a COCO RLE
            `{'size': [height, width], 'counts': str or list}`; unchecked.
        iscrowd: Whether it is a group that evaluation ignores.
        place: Where it is in the label file, for messages: 'annotation 17', 'shape 3'.
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
        width: In pixels, as training reads the image: EXIF orientation applied. So is `height`.
        instances: Its objects; meaningless if there are problems.
        problems: Why the image cannot be used.
        notes: What was left out or fixed in a usable image.
        image_id: Id to keep; all images of a split have one or none has.
        extra: Further keys of the image with JSON values, such as `license`.
    """

    image: Path
    width: int
    height: int
    instances: list[Instance] = field(default_factory=list)
    problems: list[Message] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)
    image_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def collecting(self, place: str) -> Iterator[None]:
        """Make a Problem raised in the block one of the image, with the place in front."""
        try:
            yield
        except Problem as problem:
            self.problems.append(problem.message.at(place))


@dataclass
class Item:
    """One image before it is read.

    Attributes:
        key: Unique name of the item, shown in messages.
        label: Whatever the reader needs to find the labels: a path, numbers, a list of paths.
        split: 'train', 'val', 'test' or None.
    """

    key: str
    image: Path
    label: Any = None
    split: str | None = None


class Reader:
    """A data set of one format; picklable, since it is sent to worker processes.

    Attributes:
        hint: How to fix problems of this format.
        classes: Names of all classes in label order.
        problems: What belongs to no single image but forbids the data set.
        notes: The same of what does not forbid it.
        category_ids: Ids to keep, by class name; may be empty.
        supercategories: By class name.
        headers: `info` and `licenses` by split.
        overlapping: Whether an image may be in several splits.
    """

    hint = 'fix these files'
    overlapping = False

    def __init__(self, root: Path, classes: list[str]) -> None:
        self.root, self.classes = root, classes
        self.problems: list[Message] = []
        self.notes: list[Message] = []
        self.category_ids: dict[str, int] = {}
        self.supercategories: dict[str, str] = {}
        self.headers: dict[str | None, dict[str, Any]] = {}

    @classmethod
    def detect(cls, root: Path) -> str | None:
        """Why `root` seems to be of this format, or None; looks at few files.

        Raises:
            OSError, ValueError, UserError: All mean None.
        """
        raise NotImplementedError

    @classmethod
    def open(cls, root: Path, options: dict[str, Any]) -> Reader:
        """The data set at `root`.

        Raises:
            UserError: It cannot be used, with all problems.
        """
        raise NotImplementedError

    def items(self) -> list[Item]:
        """All images, always in the same order."""
        raise NotImplementedError

    def read(self, item: Item) -> Record:
        """Read one image; what is wrong with it goes into `Record.problems` and is never raised."""
        raise NotImplementedError

    def start(self, item: Item) -> Record:
        """A record with the image's size, or with the problem that its file has."""
        record = Record(item.image, 0, 0)
        with record.collecting(shown(item.image, self.root)):
            record.width, record.height = image_size(item.image)
        return record
