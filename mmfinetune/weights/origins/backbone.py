"""Weights of a classification ResNet, for the backbone alone; their names stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

from mmfinetune.weights.source import RGB_MEAN, RGB_STD, Origin, Source


def _convert(source: Source, _loaded: Mapping, _bn_eps: float | None) -> None:
    if 'fc.weight' in source.tensors:  # torchvision's own; others leave the classifier out
        source.style, source.rgb = 'pytorch', True
        source.mean, source.std = RGB_MEAN, RGB_STD


ORIGIN = Origin('backbone', (('conv1.weight',), ('layer1.0.conv1.',)), _convert)
