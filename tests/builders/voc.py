"""A VOC devkit's annotation files, made as `tools/prepare_voc.py` makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmfinetune.data.prepare import Summary, prepare


def convert(devkit: Path, out: Path, **options: Any) -> Summary:
    """Write `instances_<split>.json` into `out`, with image names relative to the devkit."""
    return prepare(devkit, out, 'voc', 'in-place', **{'workers': 1, 'progress': False, **options})


def annotation_paths(out: Path) -> dict[str, Path]:
    """The files of train and val."""
    return {split: out / f'instances_{split}.json' for split in ('train', 'val')}
