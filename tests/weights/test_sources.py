"""Weights files of any format and origin are opened as data, or refused for their own reason."""

from __future__ import annotations

import contextlib
import pickle

import numpy as np
import pytest
import torch

from mmfinetune.utils.errors import UserError
from mmfinetune.weights.publish import save
from mmfinetune.weights.sources import open_source
from tests.builders.errors import codes, refused
from tests.builders.weights import mmdet_state, only, same, same_source, torchvision_state, without


def test_safetensors_of_the_other_names(official_like, tmp_path):
    from safetensors.torch import save_file

    official = torch.load(official_like, weights_only=True)['state_dict']
    save_file(torchvision_state(91), tmp_path / 'tv.safetensors')
    save_file(official, tmp_path / 'mmdet.safetensors')
    assert open_source(tmp_path / 'tv.safetensors').origin == 'torchvision'
    mmdet = open_source(tmp_path / 'mmdet.safetensors')
    assert mmdet.origin == 'mmdet'
    same(mmdet.tensors, official)
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'mmdet.safetensors').read_bytes()[:-100])
    with refused('weights-unreadable', path=tmp_path / 'cut.safetensors'):
        open_source(tmp_path / 'cut.safetensors')


def test_backbone_passes_unchanged(tmp_path):
    from torchvision.models import resnet18

    path = tmp_path / 'resnet.pth'
    state = resnet18().state_dict()
    torch.save(state, path)
    source = open_source(path)
    assert (source.origin, source.classes, source.style) == ('backbone', None, 'pytorch')
    same(source.tensors, dict(state))
    same_source(open_source(save(source, tmp_path / 'again.pth')), source)


@pytest.mark.parametrize(
    ('dtype', 'change'), [(torch.float16, 'widened'), (torch.bfloat16, 'widened'), (torch.float64, 'rounded')]
)
def test_other_precision_and_wrapper(dtype, change, tmp_path):
    state = mmdet_state(3)
    torch.save({'state_dict': {f'module.{k}': v.to(dtype) for k, v in state.items()}}, tmp_path / 'x.pth')
    source = open_source(tmp_path / 'x.pth')
    assert set(source.tensors) == set(state)
    assert {t.dtype for t in source.tensors.values()} == {torch.float32}
    assert codes(source.notes) == ['weights-prefix', 'weights-precision']
    assert (f'torch.{source.notes[1].facts["dtype"]}', source.notes[1].facts['change']) == (str(dtype), change)
    assert source.classes is None


def nan_state() -> dict:
    state = mmdet_state(3)
    state['rpn_head.rpn_conv.weight'][0, 0, 0, :2] = float('nan')
    state['roi_head.bbox_head.fc_cls.bias'][1] = float('inf')
    return state


def with_keys(*keys: str) -> dict:
    return mmdet_state(3) | {k: torch.zeros(1) for k in keys}


OTHER, NOT_ONE = 'weights-other-model', 'weights-no-mask-rcnn'
# Content, the code of the error, and what its text must name besides the file.
BAD = {
    'empty': ({'state_dict': {}}, 'weights-no-tensors', ''),
    'empty dict': ({}, 'weights-no-tensors', ''),
    'optimizer': ({'optimizer': {'state': {}, 'param_groups': []}}, 'weights-optimizer', ''),
    'optimizer bare': ({'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': []}, 'weights-optimizer', ''),
    'no tensors': ({'epoch': 3, 'note': 'x'}, 'weights-none-inside', 'epoch, note'),
    'nan': (nan_state(), 'weights-not-finite', 'rpn_head.rpn_conv.weight'),
    'r101': (with_keys('backbone.layer3.22.conv1.weight'), OTHER, 'ResNet-101'),
    'r101 detectron2': (only('backbone.bottom_up.res4.22.conv1.weight'), OTHER, 'ResNet-101'),
    'c4': (with_keys('roi_head.shared_head.layer4.0.conv1.weight'), OTHER, 'C4'),
    'c4 detectron2': (
        only(
            'backbone.res4.0.conv1.weight', 'roi_heads.res5.0.conv1.weight', 'proposal_generator.rpn_head.conv.weight'
        ),
        OTHER,
        'C4',
    ),
    'no fpn': (without(mmdet_state(3), 'neck'), OTHER, 'without an FPN'),
    'no masks': (without(mmdet_state(3), 'mask_head'), OTHER, 'without masks'),
    'no masks torchvision': (without(torchvision_state(91), 'mask'), OTHER, 'without masks'),
    'cascade': (with_keys('roi_head.bbox_head.0.fc_cls.weight'), OTHER, 'Cascade'),
    'v2': (torchvision_state(91) | only('rpn.head.conv.1.0.weight'), OTHER, 'second version (v2)'),
    'retinanet': (only('backbone.conv1.weight', 'neck.x', 'bbox_head.retina_cls.weight'), OTHER, 'RetinaNet'),
    'retinanet torchvision': (
        only('backbone.body.conv1.weight', 'head.classification_head.cls_logits.weight'),
        OTHER,
        'RetinaNet',
    ),
    'detr': (only('transformer.encoder.layers.0.linear1.weight', 'class_embed.weight'), OTHER, 'DETR-like'),
    'detr mmdet': (
        only('backbone.conv1.weight', 'encoder.layers.0.ffn.weight', 'bbox_head.fc_cls.weight'),
        OTHER,
        'DETR-like',
    ),
    'yolo': (only('model.0.conv.weight', 'model.22.cv2.0.0.conv.weight'), OTHER, 'YOLO-like'),
    'one stage': (only('backbone.conv1.weight', 'bbox_head.conv_cls.weight'), OTHER, 'one-stage'),
    'mmdet 1.x': (only('backbone.conv1.weight', 'bbox_head.fc_cls.weight'), OTHER, '1.x'),
    'other': (only('embed.weight', 'lm_head.weight'), NOT_ONE, 'embed.weight, lm_head.weight'),
    'unknown key': (
        torchvision_state(91) | only('backbone.fpn.more.weight'),
        'weights-not-plain',
        'backbone.fpn.more.weight',
    ),
    'missing head': (
        without(torchvision_state(91), 'cls_score.bias'),
        'weights-not-plain',
        'roi_head.bbox_head.fc_cls.bias',
    ),
    'heads disagree': (
        torchvision_state(91) | {'roi_heads.box_predictor.bbox_pred.weight': torch.zeros(8, 4)},
        'weights-heads-disagree',
        'roi_head.bbox_head.fc_reg.weight: 8',
    ),
    'sparse': (mmdet_state(3) | {'x': torch.zeros(3).to_sparse()}, 'weights-not-dense', 'x'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_contents_have_their_own_message(name, tmp_path):
    content, code, named = BAD[name]
    path = tmp_path / 'bad.pth'
    torch.save(content, path)
    with refused(code, path=path) as caught:
        open_source(path)
    assert str(path) in str(caught.value) and named in str(caught.value)
    assert caught.value.hint


def test_tensors_that_are_not_finite_are_counted(tmp_path):
    torch.save(nan_state(), tmp_path / 'bad.pth')
    with refused('weights-not-finite') as caught:
        open_source(tmp_path / 'bad.pth')
    assert [problem.facts for problem in caught.value.problems] == [
        {'key': 'rpn_head.rpn_conv.weight', 'count': 2, 'total': 144},
        {'key': 'roi_head.bbox_head.fc_cls.bias', 'count': 1, 'total': 4},
    ]


def test_another_model_is_taken_as_it_is_where_it_may_be(tmp_path):
    state = with_keys('roi_head.bbox_head.0.fc_cls.weight')
    torch.save(state, tmp_path / 'cascade.pth')
    source = open_source(tmp_path / 'cascade.pth', any_model=True)
    assert source.origin == 'other' and source.notes[0].code == OTHER
    same(source.tensors, state)


@pytest.mark.parametrize(
    ('name', 'data', 'code'),
    [
        ('x.pth', b'<!DOCTYPE html><html>login</html>', 'weights-text'),
        ('x.pkl', b'version https://git-lfs.github.com/spec/v1\noid', 'weights-text'),
        ('x.pth', b'', 'weights-empty'),
        ('x.pth', b'PK\x03\x04' + bytes(500), 'weights-unreadable'),
        ('x-0123abcd.pth', b'PK\x03\x04' + bytes(500), 'weights-damaged'),
        ('x.pkl', b'\x80\x04junk', 'weights-unreadable'),
        ('x.pkl', pickle.dumps([1, 2]), 'weights-not-a-dict'),
        ('x.pkl', pickle.dumps({'model': {}}), 'weights-no-tensors'),
        ('x.pkl', pickle.dumps({'blobs': {'conv1_w': np.zeros(2)}}), 'weights-none-inside'),
    ],
)
def test_bad_files_have_their_own_message(name, data, code, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with refused(code, path=path):
        open_source(path)


@pytest.mark.parametrize('key', ['origin', 'style', 'rgb', 'mean', 'std', 'notes'])
@pytest.mark.parametrize('value', [torch.ones(3, 2), 10**400, [[]], {'a': 1}], ids=['tensor', 'huge', 'list', 'dict'])
def test_a_changed_record_of_a_published_file_is_read_or_refused(tmp_path, key, value):
    torch.save(mmdet_state(3), tmp_path / 'a.pth')
    save(open_source(tmp_path / 'a.pth'), tmp_path / 'b.pth')
    content = torch.load(tmp_path / 'b.pth', weights_only=True)
    content['meta'][key] = value
    torch.save(content, tmp_path / 'changed.pth')
    with contextlib.suppress(UserError):
        open_source(tmp_path / 'changed.pth')


def test_file_of_an_earlier_release_keeps_its_notes(tmp_path):
    torch.save(mmdet_state(3), tmp_path / 'a.pth')
    save(open_source(tmp_path / 'a.pth'), tmp_path / 'b.pth')
    content = torch.load(tmp_path / 'b.pth', weights_only=True)
    content['meta']['notes'] = ['a sentence with {braces}']
    torch.save(content, tmp_path / 'old.pth')
    [note] = open_source(tmp_path / 'old.pth').notes
    assert note.facts == {'note': 'a sentence with {braces}'} and 'with {braces}' in str(note)
