from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from mmfinetune.evaluation import tensorboard as curves
from mmfinetune.utils import event_files
from tests.builders.errors import refused

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


def test_record_of_training_steps():
    assert curves.tags_of(TRAINING) == {
        'lr/base': 0.02,
        'time/data': 0.01,
        'lr/backbone': 0.002,
        'lr/neck': 0.01,
        'loss/train': 2.0,
        'train/loss_rpn_cls': 0.5,
        'train/acc': 90.0,
        'train/grad_norm': 3.0,
        'time/eta_hours': 1.5,
        'time/iter': 0.3,
        'time/epoch': 1,
        'gpu/memory_MB': 900,
        'aux/depth': 7.0,
    }


def test_record_of_a_validation():
    assert curves.tags_of(VALIDATION) == {
        'mAP/bbox': 0.3,
        'mAP/segm': 0.2,
        'mAP/segm_50': 0.4,
        'AR/segm_100': 0.5,
        'AR/segm_s_100': 0.1,
        'AP_class/tv/monitor': 0.6,
        'AP_class_bbox/cat': 0.7,
        'loss/val': 1.0,
        'val/loss_mask': 0.4,
        'val/acc': 95.0,
        'time/val_data': 0.02,
        'time/val_iter': 0.6,
        'mine': -1.0,
        'panoptic/PQ': 50.0,
    }


def test_lr_of_a_single_group_is_kept():
    assert curves.tags_of({'lr': 0.1, 'iter': 1}) == {'lr/all': 0.1}


def test_single_scalar_is_found_by_its_name():
    assert [curves.tag_of(name) for name in ('loss', 'time', 'coco/segm_mAP', 'my_own', 'a/b')] == [
        'loss/train',
        'time/iter',
        'mAP/segm',
        'my_own',
        'a/b',
    ]


def test_all_coco_numbers_have_a_tag_of_their_own():
    names = [f'coco/{kind}_{stat}' for kind in ('bbox', 'segm') for stat in NUMBERS]
    tags = {curves.tag_of(name, 'val') for name in names}
    assert len(tags) == 24
    assert {tag.partition('/')[0] for tag in tags} == {'mAP', 'AR'}


def test_other_numbers_called_coco_keep_their_name():
    names = ['coco/proposal_AR@100', 'coco/segm_speed', 'coco/segm_AR']
    assert [curves.tag_of(name, 'val') for name in names] == names


def test_charts_show_what_they_are_meant_to():
    tags = [*curves.tags_of(TRAINING), *curves.tags_of(VALIDATION), curves.EPOCH_LOSS]
    shown = {
        title: [tag for pattern in patterns for tag in tags if re.match(pattern, tag)]
        for charts in curves.LAYOUT.values()
        for title, patterns in charts.items()
    }
    assert shown == {
        'training (mean of the epoch) and validation': ['loss/train_epoch', 'loss/val'],
        'training (by step) and validation (by epoch)': ['loss/train', 'loss/val'],
        'terms of the training loss': ['train/loss_rpn_cls'],
        'terms of the validation loss': ['val/loss_mask'],
        'boxes, masks, masks at IoU 0.5': ['mAP/bbox', 'mAP/segm', 'mAP/segm_50'],
        'masks by size of the object': [],  # segm_mAP_l is -1 above
        'masks by class': ['AP_class/tv/monitor'],
        'parts of the model': ['lr/base', 'lr/backbone', 'lr/neck'],
    }


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


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars in a folder as TensorBoard's own reader has them."""
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0, 'images': 0})
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}


def steps(folder: Path) -> dict[str, list[int]]:
    """The steps of all tags of all files, in the order in which they lie there."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob('events*')):
        for _, event in event_files.read_records(path.read_bytes()):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def write_run(folder: Path, first: int = 1, last: int = 3, per_epoch: int = 4) -> Path:
    """Epochs of a run, in the order in which a run writes them; the file."""
    before = set(folder.glob('events*'))
    writer = SummaryWriter(str(folder))
    writer.add_text('config', f'from epoch {first}', (first - 1) * per_epoch)
    for epoch in range(first, last + 1):
        for step in range((epoch - 1) * per_epoch + 1, epoch * per_epoch + 1):
            writer.add_scalar('loss/train', step / 10, step)
            writer.add_scalar('foreign', step, step)
        writer.add_scalar('loss/train_epoch', epoch, epoch)
        writer.add_scalar('mAP/segm', epoch / 10, epoch)
        writer.add_scalar('my metric', epoch / 100, epoch)
        writer.add_text('notes', 'read me', epoch)
    writer.close()
    (file,) = set(folder.glob('events*')) - before
    # The time is all that orders files, and here they are made within one second.
    return file.rename(folder / f'events.out.tfevents.{1000000000 + len(before)}.host.1.0')


WHOLE = {
    'loss/train': list(range(1, 13)),
    'foreign': list(range(1, 13)),
    'loss/train_epoch': [1, 2, 3],
    'mAP/segm': [1, 2, 3],
    'my metric': [1, 2, 3],
    'notes/text_summary': [1, 2, 3],
    'config/text_summary': [0],
}


@pytest.mark.parametrize('epoch', [1, 2, 3])
def test_rewound_to_the_end_of_an_epoch(tmp_path, epoch):
    write_run(tmp_path)
    left = curves.rewind(tmp_path, step=4 * epoch, epoch=epoch)
    assert steps(tmp_path) == {
        tag: [s for s in all_steps if s <= (4 * epoch if len(all_steps) > 3 else epoch)]
        for tag, all_steps in WHOLE.items()
    }
    assert left['mAP/segm'] == (epoch, pytest.approx(epoch / 10))
    assert left['loss/train'][0] == 4 * epoch


def test_rewound_into_an_epoch(tmp_path):
    write_run(tmp_path)
    curves.rewind(tmp_path, step=6, epoch=1)
    assert steps(tmp_path) == {
        'loss/train': [1, 2, 3, 4, 5, 6],
        'foreign': [1, 2, 3, 4, 5, 6],
        'loss/train_epoch': [1],
        'mAP/segm': [1],
        'my metric': [1],
        'notes/text_summary': [1],
        'config/text_summary': [0],
    }


def test_resumed_many_times_there_is_one_curve(tmp_path):
    # Killed in epoch 3, resumed from 2, killed in 4, resumed from 1 by hand, killed, then to 5.
    write_run(tmp_path, 1, 3)
    for first, last in ((3, 4), (2, 3), (3, 5)):
        curves.rewind(tmp_path, step=4 * (first - 1), epoch=first - 1)
        write_run(tmp_path, first, last)
    assert steps(tmp_path) == {
        'loss/train': list(range(1, 21)),
        'foreign': list(range(1, 21)),
        'loss/train_epoch': [1, 2, 3, 4, 5],
        'mAP/segm': [1, 2, 3, 4, 5],
        'my metric': [1, 2, 3, 4, 5],
        'notes/text_summary': [1, 2, 3, 4, 5],
        'config/text_summary': [0, 4, 8],
    }
    assert points(tmp_path)['mAP/segm'] == [(i, i / 10) for i in range(1, 6)]


def test_config_of_the_same_start_is_not_kept_twice(tmp_path):
    write_run(tmp_path, 1, 2)
    for _ in range(2):
        curves.rewind(tmp_path, step=8, epoch=2)
        write_run(tmp_path, 3, 2)  # killed before its first step
    assert steps(tmp_path)['config/text_summary'] == [0, 8]


def test_damaged_ends_are_dropped(tmp_path):
    first = write_run(tmp_path, 1, 1)
    whole = first.read_bytes()
    second = write_run(tmp_path, 2, 3)
    first.write_bytes(whole + b'\x18\x00\x00')
    second.write_bytes(second.read_bytes()[:-5])
    curves.rewind(tmp_path, step=8, epoch=2)
    assert first.read_bytes() == whole
    assert steps(tmp_path)['mAP/segm'] == [1, 2]


def test_file_that_is_garbage_goes(tmp_path):
    good = write_run(tmp_path, 1, 2)
    (tmp_path / 'events.out.tfevents.0000000001.host.1.0').write_bytes(b'\x00' * 400)
    (tmp_path / 'events.out.tfevents.0000000002.host.1.0').touch()
    curves.rewind(tmp_path, step=8, epoch=2)
    assert list(tmp_path.iterdir()) == [good]


def test_damage_in_the_middle_ends_the_file(tmp_path):
    file = write_run(tmp_path, 1, 2)
    data = bytearray(file.read_bytes())
    records = list(event_files.read_records(bytes(data)))
    cut = sum(len(record) for record, _ in records[:12])
    data[cut : cut + 16] = bytes(16)  # a page that was never written
    file.write_bytes(data)
    curves.rewind(tmp_path, step=8, epoch=2)
    assert file.read_bytes() == bytes(data[:cut])
    assert steps(tmp_path)['loss/train'] == [1, 2, 3, 4]


def test_events_of_several_values_are_parted(tmp_path):
    from tensorboard.compat.proto.summary_pb2 import Summary

    writer = SummaryWriter(str(tmp_path))
    for step in (1, 2, 3):
        writer.file_writer.add_summary(
            Summary(
                value=[
                    Summary.Value(tag='loss/train', simple_value=step / 10),
                    Summary.Value(tag='mAP/segm', simple_value=step / 100),
                ]
            ),
            step,
        )
    writer.close()
    left = curves.rewind(tmp_path, step=3, epoch=1)
    assert points(tmp_path) == {'loss/train': [(1, 0.1), (2, 0.2), (3, 0.3)], 'mAP/segm': [(1, 0.01)]}
    assert left == {'loss/train': (3, pytest.approx(0.3)), 'mAP/segm': (1, pytest.approx(0.01))}


def test_what_is_not_concerned_stays_byte_for_byte(tmp_path):
    file = write_run(tmp_path)
    other = tmp_path / 'projector_config.pbtxt'
    other.write_text('x')
    before = file.read_bytes(), file.stat().st_ino
    curves.rewind(tmp_path, step=12, epoch=3)
    assert (file.read_bytes(), file.stat().st_ino) == before
    assert other.read_text() == 'x'


def test_layout_and_hyperparameters_are_to_be_written_anew(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_custom_scalars({'a': {'b': ['Multiline', ['c']]}})
    for summary in curves.hparam_summaries({'lr': 0.1}):
        writer.file_writer.add_summary(summary)
    writer.add_scalar('loss/train', 1.0, 1)
    writer.close()
    curves.rewind(tmp_path, step=1, epoch=0)
    assert steps(tmp_path) == {'loss/train': [1]}


def test_pictures_are_rewound(tmp_path):
    import numpy as np

    writer = SummaryWriter(str(tmp_path))
    blank = np.zeros((2, 2, 3), np.uint8)
    writer.add_image('images/train_batch', blank, 0, dataformats='HWC')
    for epoch in (1, 2):
        writer.add_image('images/val/a', blank, epoch, dataformats='HWC')
    writer.add_image('images/train_batch', blank, 4, dataformats='HWC')
    writer.close()
    curves.rewind(tmp_path, step=4, epoch=1)
    assert steps(tmp_path) == {'images/train_batch': [0], 'images/val/a': [1]}


def test_nothing_to_rewind(tmp_path):
    assert curves.rewind(tmp_path / 'no such folder', 4, 1) == {}
    assert not (tmp_path / 'no such folder').exists()


def test_file_that_cannot_be_read(tmp_path):
    write_run(tmp_path)
    (tmp_path / 'events.out.tfevents.9999999999.host.1.0').mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with refused('event-file-unreadable', path=tmp_path / 'events.out.tfevents.9999999999.host.1.0'):
        curves.rewind(tmp_path, step=4, epoch=1)
    assert {p: p.read_bytes() for p in before} == before
