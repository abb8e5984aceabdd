"""Weights as read from a file of any origin, and the names all origins share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import UserError
from mmfinetune.weights.read import CURE

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Source:
    """Weights of any supported origin under MMDetection's names.

    Attributes:
        path: The file.
        kind: One of `KINDS`. A 'backbone' is a classification ResNet; its names stay as they
            are, and so do those of 'other' models.
        tensors: On the CPU, fp32 (BN's counts are int64). The rows of ``fc_cls`` are the classes
            and then the background.
        classes: Names of the rows; None where nothing tells them.
        style: 'pytorch' (stride in the 3x3 convolution) or 'caffe' (in the first 1x1); None where
            it cannot be told.
        mean: Subtracted from inputs of 0..255, in the channel order of conv1's weights.
        std: The inputs are then divided by it.
        rgb: Whether that order is RGB.
        extra: What MMDetection has no place for, so that :func:`to_torchvision` is exact:
            ``slots`` (slot of each class), rows of the other slots by their torchvision name,
            ``bn_eps``, and under ``bn.`` BN's numbers before they were folded.
        notes: What was changed or assumed, one sentence each.
    """

    path: Path
    kind: str
    tensors: dict[str, torch.Tensor]
    classes: tuple[str, ...] | None = None
    style: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rgb: bool | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: what the weights are and what was done to them."""
        norm = 'not told by the file'
        if self.mean is not None and self.std is not None:
            order = {True: 'RGB', False: 'BGR', None: 'channel order unknown'}[self.rgb]
            norm = f'{order}, mean {list(self.mean)}, std {list(self.std)}'
        names = 'not told by the file'
        if self.classes:
            names = f'{len(self.classes)}: {", ".join(self.classes[:3])}'
            names += ', …' if len(self.classes) > 3 else ''
        numbers = sum(t.numel() for t in self.tensors.values())
        return [
            f'source:        {self.path}',
            f'kind:          {self.kind}',
            f'tensors:       {len(self.tensors)} ({numbers:,} numbers)',
            f'classes:       {names}',
            f'style:         {self.style or "not told by the file"}',
            f'normalisation: {norm}',
            *(f'note:          {note}' for note in self.notes),
        ]


# Statistics on 0..255 inputs. torchvision's are 255 x (0.485, 0.456, 0.406) and 255 x
# (0.229, 0.224, 0.225) on 0..1 inputs, which is the same normalisation: conv1 need not change.
RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

BN_EPS = 1e-5  # of every BN layer in MMDetection's ResNet

FC_CLS, FC_REG = 'roi_head.bbox_head.fc_cls.', 'roi_head.bbox_head.fc_reg.'
MASK_LOGITS = 'roi_head.mask_head.conv_logits.'
# Rows of one class in each of the layers that have rows by class.
ROWS = {FC_CLS: 1, FC_REG: 4, MASK_LOGITS: 1}


def _rename(tensors: Mapping[str, torch.Tensor], table: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Rename by the longest prefix.

    Returns:
        The renamed, and the keys that fit no prefix.
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


def renamed(source: Source, table: Mapping[str, str]) -> dict[str, torch.Tensor]:
    tensors, left = _rename(source.tensors, table)
    left += [f'{p}{end} is not there' for p in ROWS for end in ('weight', 'bias') if p + end not in tensors]
    if left:
        raise UserError(f'{source.path} has names of {source.kind}, but is no plain Mask R-CNN R50-FPN:', left, CURE)
    return tensors
