"""Weights as read from a file of any origin, and the names that all origins share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils.console import wrapped
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import hash_in_name
from mmfinetune.weights.read import USE_OURS

if TYPE_CHECKING:
    import torch

# Statistics on 0..255 inputs. torchvision's are 255 x (0.485, 0.456, 0.406) and 255 x
# (0.229, 0.224, 0.225) on 0..1 inputs, which is the same normalisation: conv1 need not change.
RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Of the models that Caffe2 trained, in caffe style.
BGR_MEAN, ONES = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
BN_EPS = 1e-5  # of every BN layer in MMDetection's ResNet
FC_CLS, FC_REG = 'roi_head.bbox_head.fc_cls.', 'roi_head.bbox_head.fc_reg.'
MASK_LOGITS = 'roi_head.mask_head.conv_logits.'
# Rows of one class in each of the layers that have rows by class.
ROWS = {FC_CLS: 1, FC_REG: 4, MASK_LOGITS: 1}
COCO_COUNT = 80


def coco_classes() -> tuple[str, ...]:
    """COCO's 80 names: row k of a COCO box head's classifier is class k of them."""
    from mmdet.datasets import CocoDataset

    return tuple(CocoDataset.METAINFO['classes'])


@dataclass(eq=False)
class Source:
    """Weights of any supported origin under MMDetection's names.

    Attributes:
        path: The file.
        origin: Name of an :class:`Origin`, 'mmdet run' for a checkpoint with its optimizer, or
            'other'. Names of a 'backbone' (a classification ResNet) and of 'other' models are
            left as they are.
        tensors: On the CPU, fp32 (BN's counts are int64). The rows of ``fc_cls`` are the classes
            and then the background.
        sha256: Of the file, 64 hexadecimal digits; agrees with the file's name.
        classes: Names of the rows; None if unknown.
        style: 'pytorch' (stride in the 3x3 convolution) or 'caffe' (in the first 1x1); None if
            unknown.
        mean: Subtracted from inputs of 0..255, in the channel order of conv1's weights.
        std: The inputs are then divided by it.
        rgb: Whether that order is RGB.
        extra: What MMDetection has no place for, so that torchvision's file can be written
            exactly: ``slots`` (slot of each class), rows of the other slots by their torchvision
            name, ``bn_eps``, and under ``bn.`` BN's numbers before they were folded.
        notes: What was changed or assumed, one sentence each.
    """

    path: Path
    origin: str
    tensors: dict[str, torch.Tensor]
    sha256: str = ''
    classes: tuple[str, ...] | None = None
    style: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rgb: bool | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[Message] = field(default_factory=list)

    @property
    def hash_verdict(self) -> str:
        """What the hash in the file's name says of its content, as a phrase."""
        prefix = hash_in_name(self.path)
        if prefix is None:
            return 'no hash in the file name to check against'
        return f'SHA-256 begins with {prefix}, as its name says'

    @property
    def normalisation(self) -> str:
        """Channel order and statistics of the inputs, as a phrase."""
        if self.mean is None:
            return 'unknown'
        order = {True: 'RGB', False: 'BGR', None: 'channel order unknown'}[self.rgb]
        return f'{order}, mean {numbers(self.mean)}, std {numbers(self.std or ())}'

    def note(self, code: str, **facts: object) -> None:
        """Add to the notes."""
        self.notes.append(Message(code, **facts))

    def lines(self) -> list[str]:
        """For people: what the weights are and what was done to them."""
        names = 'classes not recorded in the file'
        if self.classes:
            more = ', …' if len(self.classes) > 3 else ''
            names = f'{len(self.classes)} classes ({", ".join(self.classes[:3])}{more})'
        count = sum(t.numel() for t in self.tensors.values())
        lines = [
            f'file:    {self.path}: {self.hash_verdict}',
            f'origin:  {self.origin}, {len(self.tensors)} tensors ({count:,} numbers), {names}',
            f'inputs:  style {self.style or "unknown"}, normalisation {self.normalisation}',
            *(f'note:    {note}' for note in self.notes),
        ]
        return [wrapped(line, ' ' * 9) for line in lines]


def numbers(values: Sequence[float]) -> str:
    """``(123.675, 116.28, 103.53)``."""
    return f'({", ".join(f"{v:g}" for v in values)})'


@dataclass(frozen=True)
class Origin:
    """A library whose names of tensors are known; one file each in ``weights/origins/``.

    Attributes:
        name: As in reports.
        signs: Prefixes; a key begins with one of each group.
        convert: Brings `Source.tensors` under MMDetection's names and says how inputs are
            normalised; gets the source, all that the file holds, and the eps of BN if given.
        neck: Prefix of the FPN's tensors; None for weights that are no detector's.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    convert: Callable[[Source, Mapping, float | None], None]
    neck: str | None = None

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether these are the names of this library."""
        return all(any(key.startswith(group) for key in keys) for group in self.signs)


def rename(tensors: Mapping[str, torch.Tensor], table: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename by the longest prefix.

    Returns:
        The renamed tensors, and the keys that fit no prefix.
    """
    prefixes = sorted(table, key=len, reverse=True)
    renamed, left = {}, []
    for key, tensor in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is None:
            left.append(key)
        else:
            renamed[table[prefix] + key[len(prefix) :]] = tensor
    return renamed, left


def rename_all(source: Source, table: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors of a Mask R-CNN under MMDetection's names.

    Raises:
        UserError: A key has no counterpart, or a head is missing.
    """
    tensors, left = rename(source.tensors, table)
    heads = [prefix + end for prefix in ROWS for end in ('weight', 'bias')]
    problems = [Message('weights-unknown-key', key=key) for key in left]
    problems += [
        Message('weights-head-missing', key=key) for key in heads if key not in tensors or not tensors[key].dim()
    ]
    if problems:
        raise UserError('weights-not-plain', problems=problems, hint=USE_OURS, path=source.path, origin=source.origin)
    return tensors
