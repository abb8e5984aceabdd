"""What every reader of a data set hands over, and what readers share. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


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
