"""A weights file compared with the config's model, and the report on it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from mmfinetune.apis import run_weights
from mmfinetune.config import views
from mmfinetune.weights.check import WeightCheck, compare
from mmfinetune.weights.publish import save
from mmfinetune.weights.sources import open_source
from tests.builders.errors import codes, refused
from tests.builders.weights import opened


@pytest.fixture
def cfg(voc_cfg, official_like):
    cfg = copy.deepcopy(voc_cfg)
    cfg.weights.update(checkpoint=str(official_like), url=None, fallbacks=[])
    return cfg


def checked(cfg, file: Path | None = None, weights_cfg: dict | None = None) -> WeightCheck:
    source = opened(Path(cfg.weights.checkpoint) if file is None else file)
    return compare(cfg.model, source, cfg.weights if weights_cfg is None else weights_cfg, views.class_names(cfg))


@pytest.mark.parametrize('head_init', ['reinit', 'remap'])
def test_every_tensor_is_accounted_for(cfg, head_init):
    cfg.weights.head_init = head_init
    check = checked(cfg)
    # The fixture's file names two classes only, as a broken one might; COCO's names are taken.
    rows = check.rows()
    assert not check.problems
    for row in rows:
        assert row['tensors'] == row['loaded'] + row['remapped'] + row['re-init'] + row['untouched']
    assert sum(r['tensors'] for r in rows) == len(check.target)
    kind = 'remapped' if head_init == 'remap' else 're-init'
    assert sum(r[kind] for r in rows) == 6
    assert ('aeroplane <- airplane' in check.text()) == (head_init == 'remap')


def test_report_for_machines(cfg):
    report = json.loads(json.dumps(checked(cfg).as_dict(), allow_nan=False))
    assert report['good_to_train'] and report['problems'] == []
    assert report['origin'] == 'mmdet' and len(report['reinit']) == 6
    assert {'module', 'tensors', 'loaded', 'max_abs'} <= set(report['modules'][0])


def test_style_and_normalisation_are_compared(cfg, official_like, tmp_path):
    """What the shapes do not show."""
    source = open_source(official_like)
    source.style, source.rgb = 'caffe', False
    source.mean, source.std = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
    check = checked(cfg, save(source, tmp_path / 'caffe.pth'))
    with refused('weights-do-not-fit', count=4) as caught:
        check.require_good()
    assert codes(caught.value.problems) == [
        'weights-style',
        'weights-channels',
        'weights-statistics',
        'weights-statistics',
    ]


def test_a_backbone_file_is_reported(voc_cfg, tmp_path):
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / 'r50.pth')
    cfg = copy.deepcopy(voc_cfg)
    check = checked(cfg, tmp_path / 'r50.pth', {'into': 'backbone', 'ignore': ['fc.']})
    assert not check.problems and check.plan.ignored == ['fc.weight', 'fc.bias']
    rows = {row['module']: row for row in check.rows()}
    assert rows['backbone']['loaded'] == rows['backbone']['tensors'] == 318
    assert rows['backbone']['max_abs'] > 0
    assert rows['neck']['untouched'] == 16


def test_what_does_not_fit_is_listed(cfg, official_like, tmp_path):
    file = torch.load(official_like, weights_only=True)
    del file['state_dict']['neck.fpn_convs.0.conv.bias']
    file['state_dict']['neck.extra.weight'] = torch.zeros(1)
    torch.save(file, tmp_path / 'a.pth')
    check = checked(cfg, tmp_path / 'a.pth')
    assert check.plan.keys('missing') == ['neck.fpn_convs.0.conv.bias']
    assert check.plan.unexpected == ['neck.extra.weight']
    neck = next(row for row in check.rows() if row['module'] == 'neck')
    assert (neck['missing'], neck['unexpected']) == (1, 1)
    assert not check.as_dict()['good_to_train']


def test_facts_and_report_come_from_one_object(cfg, official_like):
    check = run_weights.start_of(cfg)
    facts = check.facts()
    assert facts['file'] == str(official_like) and facts['sha256'] == check.source.sha256
    counts = {'loaded': len(check.target) - 6, 'reinit': 6, 'remapped': 0, 'untouched': 0, 'missing': 0}
    assert {key: facts[key] for key in counts} == counts
    assert f'{counts["loaded"]} tensors loaded' in ' '.join(check.summary().split())
