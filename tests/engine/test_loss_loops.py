"""Validation loss: against a computation by hand, and that it disturbs nothing."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData

from mmfinetune.config import load as config_load
from mmfinetune.engine import loss_loops
from mmfinetune.evaluation import history
from tests.builders.runs import DEVKIT, VAL_IMAGES, copy_site, forget_runs, inside, train_tool, write_tiny_config

TERMS = ('loss', 'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask', 'acc')
WIDE = """
_wide = dict(type='Resize', scale=(160, 96), keep_ratio=False)
_pack = dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                              'scale_factor'))
val_dataloader = dict(batch_size={batch}, dataset=dict(
    pipeline=[dict(type='LoadImage'), _wide, _annotations, _pack]))
test_dataloader = val_dataloader
"""


def runner_of(cfg, work_dir: str):
    """A runner for validation alone."""
    from mmengine.runner import Runner

    forget_runs()
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = work_dir
    for key in (
        'train_dataloader',
        'train_cfg',
        'optim_wrapper',
        'param_scheduler',
        'test_dataloader',
        'test_cfg',
        'test_evaluator',
        'auto_scale_lr',
        'visualizer',
        'default_hooks',
        'custom_hooks',
    ):
        cfg.pop(key, None)
    cfg.default_hooks = dict(checkpoint=None)
    return Runner.from_cfg(cfg)


def by_hand(model, cfg) -> dict[str, float]:
    """The same number without the loop: training's order of transforms, one image at a time."""
    from mmdet.registry import DATASETS
    from mmengine.dataset import pseudo_collate

    dataset = copy.deepcopy(cfg.val_dataloader.dataset)
    pack = dataset.pipeline[-1]
    resize = next(t for t in dataset.pipeline if t['type'] == 'Resize')
    load = next(t for t in dataset.pipeline if t['type'] == 'LoadAnnotations')
    dataset.pipeline = [dict(type='LoadImage'), load, resize, pack]
    dataset = DATASETS.build(dataset)
    model.eval()
    rows = []
    with torch.no_grad():
        for i in range(len(dataset)):
            data = model.data_preprocessor(pseudo_collate([dataset[i]]), True)
            torch.manual_seed(zlib.crc32(str(data['data_samples'][0].img_id).encode()))
            losses = model.loss(data['inputs'], data['data_samples'])
            total = sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if 'loss' in k)
            row = {k: float(sum(v) if isinstance(v, list) else v) for k, v in losses.items()}
            rows.append({**row, 'loss': float(total)})
    return {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}


@pytest.mark.parametrize('batch', (1, 3))
def test_equals_hand_written_computation(site, tmp_path, batch):
    # Stretched, so that a scale taken for the other axis would show.
    path = write_tiny_config(site / f'wide{batch}.py', extra=WIDE.format(batch=batch))
    with inside(site):
        cfg = config_load.load(path)
        runner = runner_of(cfg, str(tmp_path / 'w'))
        found = runner.val()
        again = runner.val()
        expected = by_hand(runner.model, cfg)
    assert set(expected) == set(TERMS)
    # A GPU convolves in TF32, and adds up batches of other sizes in another order.
    near = {'rel': 1e-3} if torch.cuda.is_available() else {'abs': 1e-5}
    for term in TERMS:
        assert found[f'val/{term}'] == pytest.approx(expected[term], **near), term
        assert found[f'val/{term}'] == again[f'val/{term}']
    assert expected['loss'] > 1


def test_metrics_are_those_of_the_plain_loop(site, tmp_path):
    with inside(site):
        cfg = config_load.load(site / 'tiny.py')
        torch.manual_seed(0)
        runner = runner_of(cfg, str(tmp_path / 'w'))
        with_loss = runner.val()
        plain = copy.deepcopy(cfg)
        plain.val_cfg = dict(type='ValLoop')
        other = runner_of(plain, str(tmp_path / 'v'))
        other.model.load_state_dict(runner.model.state_dict())
        without = other.val()
    for key, value in without.items():
        assert with_loss[key] == value, key
    assert {k for k in with_loss if k not in without} == {f'val/{t}' for t in TERMS}


def test_training_is_the_same_with_and_without(site, tmp_path):
    copy_site(site, tmp_path)
    finals, losses = [], []
    for switch in ('True', 'False'):
        with inside(tmp_path):
            done = train_tool(
                'tiny.py', '--train', '--work-dir', f'w{switch}', '--cfg-options', f'val_cfg.loss={switch}'
            )
            assert done.code == 0, done.err
            state = torch.load(f'w{switch}/epoch_2.pth', weights_only=False)
        finals.append(state['state_dict'])
        log = next((tmp_path / f'w{switch}').glob('*/vis_data/scalars.json')).read_text()
        losses.append([r['val/loss'] for r in map(json.loads, log.splitlines()) if 'val/loss' in r])
    recorded = history.History.from_csv((tmp_path / 'wTrue/results.csv').read_bytes())
    # The log has the values, and not their mean over the epochs so far.
    assert losses[0] == [row['val/loss'] for row in recorded.rows]
    # Running statistics of BN are among the tensors.
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])
    assert len(losses[0]) == 2 and losses[1] == []


def test_test_run_writes_its_loss(site, tmp_path):
    copy_site(site, tmp_path)
    with inside(tmp_path):
        done = train_tool('tiny.py', '--test', '--head-init', 'reinit', '--work-dir', 'w')
        assert done.code == 0, done.err
        first = json.loads(Path('w/zero_shot.json').read_text())['metrics']
        train_tool('tiny.py', '--test', '--head-init', 'reinit', '--work-dir', 'w')
        second = json.loads(Path('w/zero_shot.json').read_text())['metrics']
    assert {f'test/{t}' for t in TERMS} <= set(first)
    assert first == second


def test_pipeline_without_annotations_has_no_loss(site, tmp_path):
    with inside(site):
        cfg = config_load.load(site / 'tiny.py')
        cfg.val_dataloader.dataset.pipeline = [
            t for t in cfg.val_dataloader.dataset.pipeline if t['type'] != 'LoadAnnotations'
        ]
        metrics = runner_of(cfg, str(tmp_path / 'w')).val()
    assert 'coco/segm_mAP' in metrics
    assert not [k for k in metrics if k.startswith('val/')]
    assert 'loads no annotations' in next((tmp_path / 'w').glob('*/*.log')).read_text()


def truth_of(masks, boxes, ori, img, scale) -> DetDataSample:
    sample = DetDataSample(
        metainfo=dict(ori_shape=ori, img_shape=img, scale_factor=scale, batch_input_shape=(64, 96), img_id=1)
    )
    fields = dict(bboxes=torch.tensor(boxes), labels=torch.tensor([0]))
    sample.gt_instances = InstanceData(**fields, **({'masks': masks} if masks else {}))
    return sample


def test_truth_is_scaled_once():
    original = truth_of(
        BitmapMasks(np.ones((1, 20, 40), np.uint8), 20, 40), [[10.0, 5.0, 41.0, 20.0]], (20, 40), (40, 80), (2.0, 2.0)
    )
    once = loss_loops.resized_truth(original)
    assert once.gt_instances.bboxes.tolist() == [[20.0, 10.0, 80.0, 40.0]]
    assert once.gt_instances.masks.masks.shape == (1, 64, 96)
    assert once.gt_instances.masks.masks.sum() == 40 * 80
    # Annotations loaded before Resize are in the input's coordinates already.
    scaled = truth_of(
        BitmapMasks(np.ones((1, 40, 80), np.uint8), 40, 80), [[20.0, 10.0, 80.0, 40.0]], (20, 40), (40, 80), (2.0, 2.0)
    )
    assert loss_loops.resized_truth(scaled).gt_instances.bboxes.tolist() == [[20.0, 10.0, 80.0, 40.0]]
    assert original.gt_instances.bboxes.tolist() == [[10.0, 5.0, 41.0, 20.0]]


def test_truth_of_polygons_and_boxes_only():
    polygon = PolygonMasks([[np.array([0.0, 0, 10, 0, 10, 10])]], 20, 40)
    scaled = loss_loops.resized_truth(truth_of(polygon, [[0.0, 0.0, 10.0, 10.0]], (20, 40), (40, 80), (2.0, 2.0)))
    assert scaled.gt_instances.masks.masks[0][0].tolist() == [0, 0, 20, 0, 20, 20]
    boxes = loss_loops.resized_truth(truth_of(None, [[0.0, 0.0, 10.0, 10.0]], (20, 40), (40, 80), (2.0, 2.0)))
    assert boxes.gt_instances.bboxes.tolist() == [[0.0, 0.0, 20.0, 20.0]]
    assert loss_loops.resized_truth(DetDataSample()) is None


def test_image_without_objects_counts(site, tmp_path):
    copy_site(site, tmp_path)
    path = tmp_path / DEVKIT / 'annotations/instances_val.json'
    data = json.loads(path.read_text())
    empty = data['images'][0]['id']
    data['annotations'] = [a for a in data['annotations'] if a['image_id'] != empty]
    path.write_text(json.dumps(data))
    with inside(tmp_path):
        cfg = config_load.load('tiny.py')
        runner = runner_of(cfg, 'w')
        metrics = runner.val()
        expected = by_hand(runner.model, cfg)
    assert len(data['images']) == VAL_IMAGES
    assert metrics['val/loss'] == pytest.approx(expected['loss'], abs=1e-5)
