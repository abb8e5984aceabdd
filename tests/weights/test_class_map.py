"""Classes matched by name, and the rows of the heads that follow."""

from __future__ import annotations

import copy

import pytest
import torch

from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.weights.class_map import SYNONYMS, match_classes
from mmfinetune.weights.transfer import plan_transfer
from tests.builders.classes import COCO_CLASSES, VOC_TO_COCO
from tests.builders.errors import refused
from tests.builders.weights import HEADS, source_of, transfer


def sources(targets, **options) -> list[str | None]:
    found = match_classes(targets, COCO_CLASSES, **options)
    return [None if i is None else COCO_CLASSES[i] for i in found.indices]


def test_all_voc_classes_are_found():
    assert sources(VOC_CLASSES) == [VOC_TO_COCO.get(name, name) for name in VOC_CLASSES]


@pytest.mark.parametrize(
    ('name', 'source'),
    [
        ('Dining_Table', 'dining table'),
        ('TV', 'tv'),
        ('tv-monitor', 'tv'),
        ('CAR', 'car'),
        ('cellphone', 'cell phone'),
        ('Television Set', 'tv'),
        ('pedestrian', 'person'),
        ('scratch', None),
        ('', None),
        ('carpet', None),
    ],
)
def test_spelling_and_synonyms(name, source):
    assert sources([name]) == [source]


def test_synonyms_work_both_ways():
    found = match_classes(['couch', 'airplane', 'tv'], ['sofa', 'aeroplane', 'tvmonitor'])
    assert found.indices == (0, 1, 2)


def test_synonyms_name_coco_classes():
    assert set(SYNONYMS.values()) <= set(COCO_CLASSES)


def test_aliases_win():
    assert sources(['lorry', 'cat', 'dog'], aliases={'lorry': 'truck', 'cat': 'dog', 'dog': None}) == [
        'truck',
        'dog',
        None,
    ]


def test_wrong_aliases_are_told_together():
    with refused('weights-aliases') as caught:
        match_classes(['lorry'], COCO_CLASSES, {'lory': 'car', 'lorry': 'trukc'})
    alias, source = caught.value.problems
    assert (alias.code, alias.facts['alias']) == ('alias-class', 'lory') and 'lorry?' in alias.facts['near']
    assert (source.code, source.facts['source']) == ('alias-source', 'trukc') and 'truck?' in source.facts['near']


def test_rows_of_each_kind():
    found = match_classes(['b', 'x', 'a'], ['a', 'b'])
    assert found.rows(3, 2) == [(0, 1), (2, 0)]
    assert found.rows(4, 3) == [(0, 1), (2, 0), (3, 2)]
    assert found.rows(12, 8) == [(0, 4), (1, 5), (2, 6), (3, 7), (8, 0), (9, 1), (10, 2), (11, 3)]
    assert found.rows(3, 3) is None
    assert found.rows(5, 3) is None


def test_one_class():
    found = match_classes(['car'], COCO_CLASSES)
    assert found.rows(2, 81) == [(0, 2), (1, 80)]
    assert found.rows(4, 320) == [(k, 8 + k) for k in range(4)]
    assert found.rows(1, 80) == [(0, 2)]


@pytest.fixture(scope='module')
def moved(build_model, official_like):
    model = build_model()
    plan = transfer(model, official_like, VOC_CLASSES, reinit=HEADS, head_init='remap')
    return model, plan, torch.load(official_like, weights_only=True)['state_dict']


def test_remapped_heads_give_the_logits_of_the_original_rows(moved):
    """Exactly: a row of a linear layer does not depend on the others."""
    model, plan, file = moved
    rows = [COCO_CLASSES.index(VOC_TO_COCO.get(n, n)) for n in VOC_CLASSES]
    boxes, masks = model.roi_head.bbox_head, model.roi_head.mask_head
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 1024, generator=generator)
    pixels = torch.randn(2, 256, 14, 14, generator=generator)

    def original(name, rows):
        return tuple(file[f'roi_head.{name}.{kind}'][rows] for kind in ('weight', 'bias'))

    with torch.no_grad():
        torch.testing.assert_close(
            boxes.fc_cls(features),
            torch.nn.functional.linear(features, *original('bbox_head.fc_cls', [*rows, 80])),
            rtol=0,
            atol=0,
        )
        deltas = [4 * r + k for r in rows for k in range(4)]
        torch.testing.assert_close(
            boxes.fc_reg(features),
            torch.nn.functional.linear(features, *original('bbox_head.fc_reg', deltas)),
            rtol=0,
            atol=0,
        )
        torch.testing.assert_close(
            masks.conv_logits(pixels),
            torch.nn.functional.conv2d(pixels, *original('mask_head.conv_logits', rows)),
            rtol=0,
            atol=0,
        )
    assert len(plan.keys('remapped')) == 6 and not plan.keys('reinit') and not plan.dropped


def test_class_without_a_source_is_drawn(build_model, official_like):
    classes = ['scratch', *VOC_CLASSES[1:]]
    drawn, remapped = build_model(), build_model()
    transfer(drawn, official_like, classes, reinit=HEADS)
    transfer(remapped, official_like, classes, reinit=HEADS, head_init='remap')
    one, other = drawn.roi_head.bbox_head.fc_cls, remapped.roi_head.bbox_head.fc_cls
    assert torch.equal(one.weight[0], other.weight[0]) and other.bias[0] == 0
    assert not torch.equal(one.weight[1], other.weight[1])


def test_eighty_classes_of_ones_own_are_not_kept(voc_cfg, official_like):
    """Every shape fits then, and MMEngine alone would keep the COCO head without a word."""
    from mmdet.registry import MODELS

    cfg = copy.deepcopy(voc_cfg.model)
    cfg.roi_head.bbox_head.num_classes = cfg.roi_head.mask_head.num_classes = 80
    model = MODELS.build(cfg)
    transfer(model, official_like, [f'defect {k}' for k in range(80)], reinit=HEADS)
    head = model.roi_head.bbox_head.fc_cls
    assert head.weight.detach().std() == pytest.approx(0.01, rel=0.05) and not head.bias.any()


def test_what_cannot_be_remapped_is_told(build_model, official_like):
    model = build_model()
    with refused('weights-remap-classes', owner='the data'):
        transfer(model, official_like, reinit=HEADS, head_init='remap')
    with refused('weights-head-init', head_init='remapp'):
        transfer(model, official_like, VOC_CLASSES, reinit=HEADS, head_init='remapp')


def test_layers_without_rows_by_class_cannot_be_remapped():
    head = {'head.weight': torch.zeros(3, 2), 'head.norm.weight': torch.zeros(3)}
    source = source_of({'head.weight': torch.zeros(5, 2)}, classes=('a', 'b'))
    plan = plan_transfer(head, source, {'reinit': {'head': {'std': 1}}, 'head_init': 'remap'}, ['a'])
    assert plan.fates == {'head.weight': 'mismatched', 'head.norm.weight': 'reinit'}
    [problem] = plan.problems
    assert problem.code == 'weights-rows' and problem.facts['key'] == 'head.weight'
