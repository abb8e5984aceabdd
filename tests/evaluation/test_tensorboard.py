from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from mmengine.config import Config

from mmfinetune.evaluation import tensorboard as curves

NUMBERS = [
    'mAP',
    'mAP_50',
    'mAP_75',
    'mAP_s',
    'mAP_m',
    'mAP_l',
    'AR@1',
    'AR@10',
    'AR@100',
    'AR_s@100',
    'AR_m@100',
    'AR_l@100',
]
TRAINING = {
    'base_lr': 0.02,
    'lr': 0.002,
    'data_time': 0.01,
    'lr/backbone': 0.002,
    'lr/neck': 0.01,
    'loss': 2.0,
    'loss_rpn_cls': 0.5,
    'acc': 90.0,
    'grad_norm': 3.0,
    'eta_hours': 1.5,
    'time': 0.3,
    'epoch': 1,
    'memory': 900,
    'iter': 20,
    'aux/depth': 7.0,
}
VALIDATION = {
    'coco/bbox_mAP': 0.3,
    'coco/segm_mAP': 0.2,
    'coco/segm_mAP_50': 0.4,
    'coco/segm_mAP_l': -1.0,
    'coco/segm_AR@100': 0.5,
    'coco/segm_AR_s@100': 0.1,
    'coco/segm_AP/tv/monitor': 0.6,
    'coco/bbox_AP/cat': 0.7,
    'val/loss': 1.0,
    'val/loss_mask': 0.4,
    'val/acc': 95.0,
    'data_time': 0.02,
    'time': 0.6,
    'mine': -1.0,
    'panoptic/PQ': 50.0,
}


def values_of(record: dict[str, float]) -> dict[str, float]:
    return {tag: record[name] for name, tag in curves.tags_of(record).items()}


def test_record_of_training_steps():
    assert values_of(TRAINING) == {
        '1_loss/loss': 2.0,
        '1_loss/loss_rpn_cls': 0.5,
        '3_lr/base': 0.02,
        '3_lr/backbone': 0.002,
        '3_lr/neck': 0.01,
        '4_other/acc': 90.0,
        '4_other/grad_norm': 3.0,
        '4_other/aux/depth': 7.0,
        '7_time/data': 0.01,
        '7_time/iter': 0.3,
        '7_time/eta_hours': 1.5,
        '7_time/epoch': 1,
        '7_time/gpu_memory_MB': 900,
    }


def test_record_of_a_validation():
    assert values_of(VALIDATION) == {
        '1_loss/loss': 1.0,
        '1_loss/loss_mask': 0.4,
        '2_mAP/bbox': 0.3,
        '2_mAP/segm': 0.2,
        '2_mAP/segm_50': 0.4,
        '4_other/acc': 95.0,
        '4_other/mine': -1.0,
        '4_other/panoptic/PQ': 50.0,
        '5_AR/segm_100': 0.5,
        '5_AR/segm_s_100': 0.1,
        '7_time/data': 0.02,
        '7_time/iter': 0.6,
        '9_class_AP/tv/monitor': 0.6,
        '9_class_AP_bbox/cat': 0.7,
    }


def test_lr_of_a_single_group_is_kept():
    assert values_of({'lr': 0.1, 'iter': 1}) == {'3_lr/all': 0.1}


def test_single_scalar_is_found_by_its_name():
    names = ('loss', 'val/loss', 'time', 'coco/segm_mAP', 'my_own', 'a/b')
    assert [curves.tag_of(name) for name in names] == [
        '1_loss/loss',
        '1_loss/loss',
        '7_time/iter',
        '2_mAP/segm',
        '4_other/my_own',
        '4_other/a/b',
    ]


def test_all_coco_numbers_have_a_tag_of_their_own():
    names = [f'coco/{kind}_{stat}' for kind in ('bbox', 'segm') for stat in NUMBERS]
    tags = {curves.tag_of(name) for name in names}
    assert len(tags) == 24
    assert {tag.partition('/')[0] for tag in tags} == {'2_mAP', '5_AR'}


def test_other_numbers_called_coco_keep_their_name():
    names = ['coco/proposal_AR@100', 'coco/segm_speed', 'coco/segm_AR']
    assert [curves.tag_of(name) for name in names] == [f'4_other/{name}' for name in names]


def test_groups_are_in_the_order_of_reading():
    groups = {tag.partition('/')[0] for record in (TRAINING, VALIDATION) for tag in curves.tags_of(record).values()}
    groups |= {curves.best_tag(name).partition('/')[0] for name in curves.HIGHER}
    groups |= {tag.partition('/')[0] for tag in (curves.TRAIN_BATCH, curves.VAL_IMAGES)}
    assert [group[2:] for group in sorted(groups)] == [
        *('loss', 'mAP', 'lr', 'other', 'AR', 'best', 'time', 'images', 'class_AP', 'class_AP_bbox')
    ]


def test_best_so_far():
    assert [curves.best_tag(name) for name in curves.HIGHER] == [
        *('6_best/mAP_segm', '6_best/mAP_segm_50', '6_best/mAP_bbox', '6_best/loss')
    ]


@pytest.mark.parametrize('steps', [100, 180, 3000, 30_000, 300_000])
def test_outlier_clipping_hides_only_the_first_steps(steps):
    """TensorBoard scales a chart to what lies between the 5th and the 95th percentile of all points."""
    points = [step for step in range(1, steps + 1) if step % curves.gap(step) == 0]
    assert points[:64] == [*range(1, 65)] and len(points) < 600
    assert points[math.ceil(len(points) / 20)] <= 25
    # And a point stands for the steps since the one before.
    assert all(b - a == curves.gap(b) for a, b in itertools.pairwise(points))


def test_hyperparameters(voc_cfg):
    assert curves.hparams_of(voc_cfg, world_size=4, seed=3) == {
        'lr': 0.002,
        'optimizer': 'SGD',
        'batch_size': 2,
        'accumulation': 1,
        'world_size': 4,
        'epochs': 40,
        'seed': 3,
        'head_init': 'reinit',
        'weights': Path(voc_cfg.weights.checkpoint).name,
    }


def test_hyperparameters_without_weights():
    cfg = Config(
        {
            'optim_wrapper': {'optimizer': {'type': 'AdamW', 'lr': 1e-4}, 'accumulative_counts': 4},
            'train_cfg': {'max_iters': 90},
            'train_dataloader': {'batch_size': 8},
        }
    )
    assert curves.hparams_of(cfg, 1, 0) == {
        'lr': 1e-4,
        'optimizer': 'AdamW',
        'batch_size': 8,
        'accumulation': 4,
        'world_size': 1,
        'iterations': 90,
        'seed': 0,
        'head_init': 'none',
        'weights': 'none',
    }


def test_text_is_shown_as_it_is():
    from tensorboard.plugin_util import markdown_to_safe_html

    html = markdown_to_safe_html(curves.fenced('a = 1\n# b\n*c* <d>', 'python'))
    assert html.count('<code') == 1
    assert 'a = 1\n# b\n*c* &lt;d&gt;' in html
