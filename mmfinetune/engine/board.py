"""What a run looks like in TensorBoard: names of the curves, charts, hyperparameters, resuming."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all

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

# Of each tag the x axis that it has, or rather: which numbers a resumed run writes once more.
_BY_EPOCH = (
    'val/',
    'mAP/',
    'AR/',
    'AP_class/',
    'AP_class_bbox/',
    'best/',
    'time/val_',
    'loss/val',
    EPOCH_LOSS,
    VAL_IMAGES,
)
_BY_STEP = ('train/', 'lr/', 'time/', 'gpu/', 'loss/train')
# Written at the start of each part of a run: with the step, or anew for the whole run.
_AT_START = (CONFIG, TRAIN_BATCH)
_ANEW = ('hparams', 'custom_scalars')

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
        record: Values by MMEngine's names; one of training steps has ``iter`` among them.

    Returns:
        Values by tag. Left out are ``iter``, which is the x axis, the ``lr`` of the first group
        where each group has its own, and COCO numbers of -1, for which there is no ground truth.
    """
    stage = 'train' if 'iter' in record else 'val'
    grouped = any(name.startswith('lr/') for name in record)
    tags = {}
    for name, value in record.items():
        if name == 'iter' or (name == 'lr' and grouped) or (name.startswith('coco/') and value == -1):
            continue
        tags[tag_of(name, stage)] = value
    return tags


def tag_of(name: str, stage: str = '') -> str:
    """Where a scalar is plotted.

    Args:
        name: MMEngine's.
        stage: ``'train'`` or ``'val'``, the kind of the record; '' for a single scalar.
    """
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


def hparams_of(cfg: Config, world_size: int, seed: int) -> dict[str, float | str]:
    """What tells this run from others in the HParams tab."""
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
        'weights': Path(recipe.get('checkpoint') or '').name or 'none',
    }
    return {name: value for name, value in values.items() if value is not None}


def best_tag(tag: str) -> str:
    """``best/mAP_segm`` for ``mAP/segm``: the best value so far."""
    return f'best/{tag.replace("/", "_")}'


def hparam_summaries(values: Mapping[str, float | str]) -> tuple[Summary, Summary, Summary]:
    """What the HParams tab wants of a run: the head of its table, the run's start and its end."""
    from torch.utils.tensorboard.summary import hparams

    metrics = [*HIGHER, *map(best_tag, HIGHER)]
    return hparams(dict(values), dict.fromkeys(metrics, 0.0))


def fenced(text: str, language: str = '') -> str:
    """Text as TensorBoard, which reads Markdown, shows it unchanged."""
    return f'~~~~{language}\n{text}\n~~~~'


def rewind(folder: Path, step: int, epoch: int) -> dict[str, tuple[int, float]]:
    """Take out of event files what a run wrote after the checkpoint that it is resumed from.

    TensorBoard purges such points from what it has in memory, and only by step, but other readers
    would meet them twice. The resumed run writes its layout, hyperparameters and config anew. The
    damaged end of a file, as a killed writer leaves it, goes too.

    Args:
        folder: With the event files; it need not exist.
        step: Training steps of the checkpoint.
        epoch: The step of its validation, in epochs as a rule.

    Returns:
        The last point that is left of each tag: its step and, of a scalar, its value.

    Raises:
        UserError: A file cannot be read or written; all are as they were.
    """
    # By time, which is in their names.
    files = sorted(folder.glob('events.out.tfevents.*'))
    contents: dict[Path, bytes] = {}
    last: dict[str, tuple[int, float]] = {}
    empty = []
    over = False
    for path in files:
        original = _read(path)
        kept, written = [], 0
        for record, event in _records(original):
            # What has an unknown axis goes by its place: events are in the order of time.
            over = over or _is_after(event, step)
            values = [v for v in event.summary.value if _stays(v, event.step, step, epoch)]
            if over or (event.HasField('summary') and not values):
                continue
            written += not event.file_version
            last.update((value.tag, (event.step, value.simple_value)) for value in values)
            kept.append(record if len(values) == len(event.summary.value) else _with_values(event, values))
        content = b''.join(kept)
        if not written:
            empty.append(path)
        elif content != original:
            contents[path] = content
    atomic_write_all(contents)
    for path in empty:
        path.unlink()
    return last


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file up to its end or its first damaged record."""
    return (event for _, event in _records(_read(path)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f'{path}: cannot be read: {error.strerror or error}', cure='mend its rights, or move it away'
        ) from error


def _records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """The records of an event file with what they hold, up to the first that is damaged.

    A record is its length (uint64), the checksum of that (uint32), the event, and its checksum;
    see ``tensorboard.summary.writer.record_writer``. TensorBoard's reader computes all checksums
    in Python, which takes seconds for files with pictures. Here it is only that of the last event,
    which a killed writer may have left half written.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    start = 0
    while start + 16 <= len(data):
        length, checksum = struct.unpack_from('<QI', data, start)
        end = start + 12 + length + 4
        if masked_crc32c(data[start : start + 8]) != checksum or end > len(data):
            return
        content = data[start + 12 : end - 4]
        if end == len(data) and masked_crc32c(content) != struct.unpack('<I', data[-4:])[0]:
            return
        try:
            event = Event.FromString(content)
        except DecodeError:
            return
        yield data[start:end], event
        start = end


def _with_values(event: Event, values: Sequence[Summary.Value]) -> bytes:
    """The record of an event that has only these of its values left."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del event.summary.value[:]
    event.summary.value.extend(kept)
    out = io.BytesIO()
    RecordWriter(out).write(event.SerializeToString())
    return out.getvalue()


def _is_after(event: Event, step: int) -> bool:
    return event.step > step and any(_axis(value.tag) == 'step' for value in event.summary.value)


def _stays(value: Summary.Value, at: int, step: int, epoch: int) -> bool:
    """Whether a value written at a step is kept, by what it is."""
    if value.metadata.plugin_data.plugin_name in _ANEW:
        return False
    if value.tag.removesuffix('/text_summary') in _AT_START:
        return at < step
    return at <= {'step': step, 'epoch': epoch}.get(_axis(value.tag), at)


def _axis(tag: str) -> str | None:
    """``'step'``, ``'epoch'``, or None for what is not known."""
    if tag.startswith(_BY_EPOCH):
        return 'epoch'
    return 'step' if tag.startswith(_BY_STEP) else None
