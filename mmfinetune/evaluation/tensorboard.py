"""What a run looks like in TensorBoard: names of the curves, charts, hyperparameters, resuming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils import event_files

if TYPE_CHECKING:
    from mmengine.config import Config
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary


CONFIG, WEIGHTS = 'config', 'weights'
TRAIN_BATCH, VAL_IMAGES = 'images/train_batch', 'images/val'
EPOCH_LOSS = 'loss/train_epoch'

_COMMON = {
    'loss': 'loss/train',
    'val/loss': 'loss/val',
    'eta_hours': 'time/eta_hours',
    'memory': 'gpu/memory_MB',
    'base_lr': 'lr/base',
}
_TIMES = {
    'train': {'time': 'time/iter', 'data_time': 'time/data', 'epoch': 'time/epoch'},
    'val': {'time': 'time/val_iter', 'data_time': 'time/val_data'},
}
_AP_CLASS = {'segm': 'AP_class', 'bbox': 'AP_class_bbox'}

# The x axis of each tag, by how the tag begins: it says which points a resumed run writes again.
_METRICS = ('val/', 'mAP/', 'AR/', 'AP_class/', 'AP_class_bbox/', 'best/')
_BY_EPOCH = (*_METRICS, 'time/val_', 'loss/val', EPOCH_LOSS, VAL_IMAGES)
_BY_STEP = ('train/', 'lr/', 'time/', 'gpu/', 'loss/train')
# Written at the start of each part of a run: with its step, or again for the whole run.
_AT_START = (CONFIG, TRAIN_BATCH)
_AGAIN = ('hparams', 'custom_scalars')

HIGHER = {'mAP/segm': True, 'mAP/segm_50': True, 'mAP/bbox': True, 'loss/val': False}

# The tags are regular expressions, which match from the start of a tag.
LAYOUT = {
    'loss': {
        'training (mean of the epoch) and validation': [f'{EPOCH_LOSS}$', 'loss/val$'],
        'training (by step) and validation (by epoch)': ['loss/train$', 'loss/val$'],
        'terms of the training loss': ['train/loss'],
        'terms of the validation loss': ['val/loss'],
    },
    'AP': {
        'boxes, masks, masks at IoU 0.5': ['mAP/bbox$', 'mAP/segm$', 'mAP/segm_50$'],
        'masks by size of the object': ['mAP/segm_[sml]$'],
        'masks by class': ['AP_class/'],
    },
    'learning rate': {'parts of the model': ['lr/']},
}


def tags_of(record: Mapping[str, float]) -> dict[str, float]:
    """The curves of one record of MMEngine's logger.

    Args:
        record: Values by MMEngine's names; a record of training steps has ``iter`` among them.

    Returns:
        Values by tag, without ``iter``, which is the x axis, the ``lr`` of the first group where each group has its
        own, and COCO numbers of -1, which have no ground truth.
    """
    stage = 'train' if 'iter' in record else 'val'
    left_out = {'iter', 'lr'} if any(name.startswith('lr/') for name in record) else {'iter'}
    left_out |= {name for name, value in record.items() if name.startswith('coco/') and value == -1}
    return {tag_of(name, stage): value for name, value in record.items() if name not in left_out}


def tag_of(name: str, stage: str = '') -> str:
    """The tag of a scalar by MMEngine's name, in a record of the stage ``'train'`` or ``'val'``, or alone."""
    known = {**_COMMON, **_TIMES.get(stage or 'train', {})}
    if name in known:
        return known[name]
    head, _, rest = name.partition('/')
    if head == 'coco' and rest.partition('_')[0] in _AP_CLASS:
        kind, _, number = rest.partition('_')
        if number.startswith('AP/'):
            return f'{_AP_CLASS[kind]}/{number[3:]}'
        if number.startswith('mAP'):
            return f'mAP/{kind}{number[3:]}'
        if number.startswith('AR') and '@' in number:
            return f'AR/{kind}{number[2:].replace("@", "_")}'
    if name == 'lr':
        return 'lr/all'
    # Terms of the loss, accuracy, gradient norm, and whatever else a model reports.
    return f'train/{name}' if stage == 'train' and not rest else name


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


def best_tag(tag: str) -> str:
    """``best/mAP_segm`` for ``mAP/segm``: the best value so far."""
    return f'best/{tag.replace("/", "_")}'


def hparam_summaries(values: Mapping[str, float | str]) -> tuple[Summary, Summary, Summary]:
    """What the HParams tab needs of a run: the head of its table, the run's start and its end."""
    from torch.utils.tensorboard.summary import hparams

    metrics = [*HIGHER, *map(best_tag, HIGHER)]
    return hparams(dict(values), dict.fromkeys(metrics, 0.0))


def fenced(text: str, language: str = '') -> str:
    """Text as TensorBoard, which reads Markdown, shows it unchanged."""
    return f'~~~~{language}\n{text}\n~~~~'


def rewind(folder: Path, step: int, epoch: int) -> dict[str, tuple[int, float]]:
    """Remove from event files what a run wrote after the checkpoint that it is resumed from.

    ``SummaryWriter(purge_step=…)`` purges by step, while validation is plotted by epoch, and only what a running
    TensorBoard has in memory. The resumed run writes its layout, hyperparameters and config again. The damaged end of a
    file, as a killed writer leaves it, is removed too.

    Args:
        folder: Folder of the event files; it need not exist.
        epoch: Step of the validation of the checkpoint, by default in epochs.

    Returns:
        The last point that is left of each tag: its step and, of a scalar, its value.

    Raises:
        UserError: A file cannot be read or written; all are as they were.
    """
    last: dict[str, tuple[int, float]] = {}
    over = False

    def keep(event: Event) -> list[Summary.Value] | None:
        nonlocal over
        # What has an unknown axis goes by its place: events are in the order of time.
        over = over or (event.step > step and any(_by_step(v.tag) for v in event.summary.value))
        values = [v for v in event.summary.value if _stays(v, event.step, step, epoch)]
        if over or (event.HasField('summary') and not values):
            return None
        last.update((value.tag, (event.step, value.simple_value)) for value in values)
        return values

    event_files.rewrite(folder, keep)
    return last


def _by_step(tag: str) -> bool:
    return tag.startswith(_BY_STEP) and not tag.startswith(_BY_EPOCH)


def _stays(value: Summary.Value, at: int, step: int, epoch: int) -> bool:
    """Whether a value written at a step is kept, by what it is."""
    if value.metadata.plugin_data.plugin_name in _AGAIN:
        return False
    if value.tag.removesuffix('/text_summary') in _AT_START:
        return at < step
    if value.tag.startswith(_BY_EPOCH):
        return at <= epoch
    return at <= step or not value.tag.startswith(_BY_STEP)
