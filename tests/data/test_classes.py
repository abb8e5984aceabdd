from __future__ import annotations

import json

from mmfinetune.data.classes import VOC_CLASSES, VOC_GROUPS
from tests.builders.classes import COCO_CLASSES, VOC_TO_COCO, coco_name


def test_voc_classes_are_20_in_alphabetical_order():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert sorted(VOC_GROUPS) == sorted(VOC_CLASSES)
    assert set(VOC_GROUPS.values()) == {'person', 'animal', 'vehicle', 'indoor'}


def test_every_voc_class_is_a_coco_class():
    assert len({coco_name(name) for name in VOC_CLASSES} & set(COCO_CLASSES)) == 20
    assert not any(name in COCO_CLASSES for name in VOC_TO_COCO)


def test_coco_classes_are_those_of_coco(real_data):
    path = real_data / 'coco2017_real/annotations/instances_val2017.json'
    assert tuple(category['name'] for category in json.loads(path.read_text())['categories']) == COCO_CLASSES
