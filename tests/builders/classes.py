"""COCO's classes as MMDetection has them, read without the seconds that importing it takes."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def _coco_classes() -> tuple[str, ...]:
    spec = importlib.util.find_spec('mmdet')
    assert spec and spec.origin
    tree = ast.parse(Path(spec.origin).with_name('datasets').joinpath('coco.py').read_text())
    tuples = (ast.literal_eval(node) for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) == 80)
    return next(names for names in tuples if isinstance(names[0], str))


COCO_CLASSES = _coco_classes()
# Only the names that differ; the other 14 VOC classes have the same name in COCO.
VOC_TO_COCO = {
    'aeroplane': 'airplane',
    'diningtable': 'dining table',
    'motorbike': 'motorcycle',
    'pottedplant': 'potted plant',
    'sofa': 'couch',
    'tvmonitor': 'tv',
}


def coco_name(voc_name: str) -> str:
    """The COCO name of a VOC class."""
    return VOC_TO_COCO.get(voc_name, voc_name)
