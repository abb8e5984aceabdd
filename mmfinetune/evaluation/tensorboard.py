"""What a run looks like in TensorBoard: its sub-runs, names of the curves, hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config
    from tensorboard.compat.proto.summary_pb2 import Summary

# Sub-runs, so that TensorBoard overlays what they share, in a colour each.
TRAIN, VAL = 'train', 'val'
CONFIG, WEIGHTS = 'config', 'weights'
# TensorBoard sorts groups of cards by name: the digits are their order.
LOSS, MAP, LR, OTHER, AR, BEST, TIME = '1_loss', '2_mAP', '3_lr', '4_other', '5_AR', '6_best', '7_time'
TRAIN_BATCH, VAL_IMAGES = '8_images/train_batch', '8_images/val'
_AP_CLASS = {'segm': '9_class_AP', 'bbox': '9_class_AP_bbox'}

_KNOWN = {
    'time': f'{TIME}/iter',
    'data_time': f'{TIME}/data',
    'epoch': f'{TIME}/epoch',
    'eta_hours': f'{TIME}/eta_hours',
    'memory': f'{TIME}/gpu_memory_MB',
    'base_lr': f'{LR}/base',
    'lr': f'{LR}/all',
}
# What has a curve of the best so far, and whether more is better.
HIGHER = {'coco/segm_mAP': True, 'coco/segm_mAP_50': True, 'coco/bbox_mAP': True, 'val/loss': False}


def tags_of(record: Mapping[str, float]) -> dict[str, str]:
    """The tags of one record of MMEngine's logger.

    Args:
        record: Values by MMEngine's names; a record of training steps has ``iter`` among them.

    Returns:
        Tags by name, without ``iter``, which is the x axis, the ``lr`` of the first group where each group has its own,
        and COCO numbers of -1, which have no ground truth.
    """
    left_out = {'iter', 'lr'} if any(name.startswith('lr/') for name in record) else {'iter'}
    left_out |= {name for name, value in record.items() if name.startswith('coco/') and value == -1}
    return {name: tag_of(name) for name in record if name not in left_out}


def tag_of(name: str) -> str:
    """The tag of a scalar by MMEngine's name; the same for training and validation."""
    name = name.removeprefix('val/')
    if name in _KNOWN:
        return _KNOWN[name]
    head, _, rest = name.partition('/')
    kind, _, number = rest.partition('_')
    if head == 'coco' and kind in _AP_CLASS:
        if number.startswith('AP/'):
            return f'{_AP_CLASS[kind]}/{number[3:]}'
        if number.startswith('mAP'):
            return f'{MAP}/{kind}{number[3:]}'
        if number.startswith('AR') and '@' in number:
            return f'{AR}/{kind}{number[2:].replace("@", "_")}'
    if head == 'lr':
        return f'{LR}/{rest}'
    # Terms of the loss; then accuracy, gradient norm, and whatever else a model reports.
    return f'{LOSS if "loss" in name else OTHER}/{name}'


def best_tag(name: str) -> str:
    """``6_best/mAP_segm`` for ``coco/segm_mAP``: the best value so far."""
    group, _, rest = tag_of(name).partition('/')
    return f'{BEST}/{rest if group == LOSS else f"mAP_{rest}"}'


def gap(step: int) -> int:
    """How many steps a point of a training loss at this step is the mean of.

    Every step at first, then 2, 4, 8 …, with 32 to 64 points each time that the step number doubles. TensorBoard leaves
    the highest twentieth of all points out of a chart; of points at equal distances that is the start of a training.
    """
    return 1 << max(0, (step - 1).bit_length() - 6)


def hparams_of(cfg: Config, world_size: int, seed: int, weights: Mapping | None = None) -> dict[str, float | str]:
    """What distinguishes this run from others in the HParams tab.

    Args:
        weights: Facts on the weights that it started from: ``file`` and ``sha256``.
    """
    wrapper = cfg.optim_wrapper
    recipe = cfg.get('weights') or {}
    values = {
        'lr': wrapper.optimizer.lr,
        'optimizer': wrapper.optimizer.type,
        'batch_size': cfg.train_dataloader.get('batch_size'),
        'accumulation': wrapper.get('accumulative_counts', 1),
        'world_size': world_size,
        'epochs': cfg.train_cfg.get('max_epochs'),
        'iterations': cfg.train_cfg.get('max_iters'),
        'seed': seed,
        'head_init': recipe.get('head_init') or 'reinit' if recipe else 'none',
        'weights': Path((weights or {}).get('file') or recipe.get('checkpoint') or '').name or 'none',
        'weights_sha256': weights['sha256'][:8] if weights else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def hparam_summaries(values: Mapping[str, float | str]) -> tuple[Summary, Summary, Summary]:
    """What the HParams tab needs of a run: the head of its table, the run's start and its end."""
    from torch.utils.tensorboard.summary import hparams

    metrics = [*map(tag_of, HIGHER), *map(best_tag, HIGHER)]
    return hparams(dict(values), dict.fromkeys(metrics, 0.0))


def fenced(text: str, language: str = '') -> str:
    """Text as TensorBoard, which reads Markdown, shows it unchanged."""
    return f'~~~~{language}\n{text}\n~~~~'
