"""Detectron2's weights fill every tensor under MMDetection's names."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfinetune.weights.sources import open_source
from tests.builders.classes import COCO_CLASSES


def detectron2_state() -> dict[str, np.ndarray]:
    """Names and shapes of Detectron2's mask_rcnn_R_50_FPN, written without our table."""
    rng = np.random.default_rng(4)
    state = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        state[f'{name}.weight'] = rng.standard_normal(shape, np.float32)
        if bias:
            state[f'{name}.bias'] = rng.standard_normal(shape[1 if 'deconv' in name else 0], np.float32)

    def conv_bn(name: str, *shape: int) -> None:
        add(name, *shape, bias=False)
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            state[f'{name}.norm.{part}'] = rng.random(shape[0], np.float32) + 0.1

    up = 'backbone.bottom_up'
    conv_bn(f'{up}.stem.conv1', 64, 3, 7, 7)
    before = 64
    for stage, blocks, width in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        for block in range(blocks):
            name = f'{up}.res{stage}.{block}'
            if block == 0:
                conv_bn(f'{name}.shortcut', 4 * width, before, 1, 1)
            conv_bn(f'{name}.conv1', width, before, 1, 1)
            conv_bn(f'{name}.conv2', width, width, 3, 3)
            conv_bn(f'{name}.conv3', 4 * width, width, 1, 1)
            before = 4 * width
        add(f'backbone.fpn_lateral{stage}', 256, before, 1, 1)
        add(f'backbone.fpn_output{stage}', 256, 256, 3, 3)
    add('proposal_generator.rpn_head.conv', 256, 256, 3, 3)
    add('proposal_generator.rpn_head.objectness_logits', 3, 256, 1, 1)
    add('proposal_generator.rpn_head.anchor_deltas', 12, 256, 1, 1)
    for level in range(5):
        state[f'proposal_generator.anchor_generator.cell_anchors.{level}'] = np.zeros((3, 4), np.float32)
    add('roi_heads.box_head.fc1', 1024, 12544)
    add('roi_heads.box_head.fc2', 1024, 1024)
    add('roi_heads.box_predictor.cls_score', 81, 1024)
    add('roi_heads.box_predictor.bbox_pred', 320, 1024)
    for i in range(4):
        add(f'roi_heads.mask_head.mask_fcn{i + 1}', 256, 256, 3, 3)
    add('roi_heads.mask_head.deconv', 256, 256, 2, 2)
    add('roi_heads.mask_head.predictor', 80, 256, 1, 1)
    return state


@pytest.fixture(scope='module')
def arrays() -> dict[str, np.ndarray]:
    return detectron2_state()


@pytest.fixture(scope='module')
def model_final(arrays, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('detectron2') / 'model_final_f10217.pkl'
    path.write_bytes(pickle.dumps({'model': arrays, '__author__': 'Detectron2 Model Zoo'}, protocol=2))
    return path


def test_detectron2_fills_every_tensor(model_final, arrays, coco_model):
    source = open_source(model_final)
    target = {k: v for k, v in coco_model().state_dict().items() if not k.endswith('num_batches_tracked')}
    assert {k: v.shape for k, v in source.tensors.items()} == {k: v.shape for k, v in target.items()}
    assert source.origin == 'detectron2'
    assert source.classes == COCO_CLASSES
    assert (source.style, source.rgb, source.std) == ('caffe', False, (1.0, 1.0, 1.0))
    assert source.mean == (103.53, 116.28, 123.675)
    for ours, theirs in (
        ('backbone.bn1.running_var', 'backbone.bottom_up.stem.conv1.norm.running_var'),
        ('backbone.layer3.5.conv2.weight', 'backbone.bottom_up.res4.5.conv2.weight'),
        ('backbone.layer1.0.downsample.1.bias', 'backbone.bottom_up.res2.0.shortcut.norm.bias'),
        ('neck.lateral_convs.3.conv.weight', 'backbone.fpn_lateral5.weight'),
        ('neck.fpn_convs.0.conv.bias', 'backbone.fpn_output2.bias'),
        ('rpn_head.rpn_reg.weight', 'proposal_generator.rpn_head.anchor_deltas.weight'),
        ('roi_head.bbox_head.shared_fcs.1.bias', 'roi_heads.box_head.fc2.bias'),
        ('roi_head.bbox_head.fc_cls.weight', 'roi_heads.box_predictor.cls_score.weight'),
        ('roi_head.mask_head.convs.3.conv.bias', 'roi_heads.mask_head.mask_fcn4.bias'),
    ):
        assert torch.equal(source.tensors[ours], torch.from_numpy(arrays[theirs])), ours


def small(state: dict, width: int = 2) -> dict:
    """The same names with small tensors; rows by class stay."""
    return {
        k: torch.as_tensor(v)[(slice(None), *[slice(0, width)] * (v.ndim - 1))].clone()
        if 'predictor' in k
        else torch.as_tensor(v).flatten()[:width].clone()
        for k, v in state.items()
    }


def test_detectron2_as_torch_file_and_safetensors(arrays, tmp_path):
    from safetensors.torch import save_file

    state = small(arrays)
    state['pixel_mean'] = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
    state['pixel_std'] = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)
    torch.save({'model': state, 'iteration': 1, 'optimizer': {}}, tmp_path / 'model_final.pth')
    save_file(state, tmp_path / 'model.safetensors')
    for name in ('model_final.pth', 'model.safetensors'):
        source = open_source(tmp_path / name)
        # What the file tells comes before the zoo's habits.
        assert (source.style, source.rgb) == ('pytorch', True)
        assert source.mean == (123.675, 116.28, 103.53)
        [note] = [n for n in source.notes if n.code == 'weights-left-out']
        assert {'pixel_mean', 'pixel_std'} <= set(note.facts['keys'].split(', '))
        assert not any('anchor' in k or 'pixel' in k for k in source.tensors)
