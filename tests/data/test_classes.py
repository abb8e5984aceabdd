from __future__ import annotations

import ast
import importlib.util
import json
import os
from pathlib import Path

import pytest

from mmfinetune.data.classes import COCO_CLASSES, VOC_CLASSES, VOC_SUPERCATEGORIES, VOC_TO_COCO, coco_name
from mmfinetune.utils.errors import UserError


def test_voc_classes_are_20_in_alphabetical_order():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    grouped = [name for names in VOC_SUPERCATEGORIES.values() for name in names]
    assert sorted(grouped) == sorted(VOC_CLASSES)


def test_every_voc_class_is_a_coco_class():
    assert len({coco_name(name) for name in VOC_CLASSES} & set(COCO_CLASSES)) == 20
    assert all(name not in COCO_CLASSES for name in VOC_TO_COCO)
    assert coco_name('tvmonitor') == 'tv'
    assert coco_name('person') == 'person'


def test_unknown_class_is_named_with_a_suggestion():
    with pytest.raises(UserError, match="'aeroplan' is no VOC class; did you mean 'aeroplane'"):
        coco_name('aeroplan')
    with pytest.raises(UserError, match="'airplane' is no VOC class"):
        coco_name('airplane')


def test_coco_classes_are_those_of_mmdet():
    spec = importlib.util.find_spec('mmdet')
    if spec is None:
        pytest.skip('mmdet is not installed')
    # Parsed, not imported: the import takes seconds.
    tree = ast.parse(Path(spec.origin).with_name('datasets').joinpath('coco.py').read_text())
    tuples = [ast.literal_eval(node) for node in ast.walk(tree) if isinstance(node, ast.Tuple) and len(node.elts) == 80]
    assert COCO_CLASSES in tuples


def test_coco_classes_are_those_of_coco():
    root = os.environ.get('MMFINETUNE_REAL_DATA')
    if not root:
        pytest.skip('MMFINETUNE_REAL_DATA is not set')
    path = Path(root, 'coco2017_real', 'annotations', 'instances_val2017.json')
    categories = json.loads(path.read_text())['categories']
    assert tuple(category['name'] for category in categories) == COCO_CLASSES
