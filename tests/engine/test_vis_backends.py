from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.engine.vis_backends import MLflowBackend, TensorBoardBackend
from mmfinetune.evaluation.tensorboard import HIGHER, LAYOUT, best_tag
from mmfinetune.utils import event_files
from tests.builders.runs import (
    EPOCH_STEPS,
    REPO,
    VAL_IMAGES,
    Outcome,
    copy_site,
    inside,
    make_site,
    train_tool,
    write_tiny_config,
)

RUN = Path('work_dirs/tiny')
LOGS = RUN / 'tensorboard_logs'
BACKENDS = """
visualizer = dict(vis_backends=[dict(type='LocalVisBackend'), {}])
"""
TENSORBOARD = f"dict(type='TensorBoardBackend', save_dir={str(LOGS)!r})"
OURS = """
default_hooks.update(tensorboard=dict(pictures=2), results=None)
"""
THEIRS = """
default_hooks.update(tensorboard=None, results=None)
"""


def configure(site: Path, backend: str = TENSORBOARD, hooks: str = OURS, extra: str = '', epochs: int = 2) -> None:
    weights = next((site / 'pretrain').glob('*.pth')).relative_to(site)
    write_tiny_config(site / 'tiny.py', weights=weights, epochs=epochs, extra=BACKENDS.format(backend) + hooks + extra)


def train(site: Path, *args: str) -> Outcome:
    with inside(site):
        outcome = train_tool('tiny.py', *args)
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """Two epochs of the tiny run with TensorBoard, and the test after them."""
    folder = tmp_path_factory.mktemp('site')
    make_site(folder)
    configure(folder)
    train(folder)
    return folder


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(('scalars', 'images', 'tensors'), 0))
    events.Reload()
    return events


def steps(folder: Path) -> dict[str, list[int]]:
    """Steps of all scalars and images, in the order in which they lie in the files."""
    events = read(folder)
    tags = events.Tags()
    return {
        **{tag: [e.step for e in events.Scalars(tag)] for tag in tags['scalars']},
        **{tag: [e.step for e in events.Images(tag)] for tag in tags['images']},
    }


TRAIN_TAGS = {
    *(['gpu/memory_MB'] if torch.cuda.is_available() else []),
    'loss/train',
    'train/loss_rpn_cls',
    'train/loss_rpn_bbox',
    'train/loss_cls',
    'train/loss_bbox',
    'train/loss_mask',
    'train/acc',
    'train/grad_norm',
    'lr/base',
    'lr/backbone',
    'lr/neck',
    'lr/rpn_head',
    'lr/roi_head',
    'time/data',
    'time/iter',
    'time/eta_hours',
    'time/epoch',
}
EPOCH_TAGS = {
    'loss/train_epoch',
    'loss/val',
    'val/loss_rpn_cls',
    'val/loss_rpn_bbox',
    'val/loss_cls',
    'val/loss_bbox',
    'val/loss_mask',
    'val/acc',
    'time/val_data',
    'time/val_iter',
    'best/mAP_segm',
    'best/mAP_segm_50',
    'best/mAP_bbox',
    'best/loss_val',
    # Nothing in 96 px is large.
    *(f'mAP/{kind}{end}' for kind in ('bbox', 'segm') for end in ('', '_50', '_75', '_s', '_m')),
    *(f'AR/{kind}_{end}' for kind in ('bbox', 'segm') for end in ('1', '10', '100', 's_100', 'm_100')),
}


def test_every_curve_has_its_tag_and_its_axis(site):
    found = steps(site / LOGS)
    expected = {tag: [1, 2, 3, 4] for tag in TRAIN_TAGS} | {tag: [1, 2] for tag in EPOCH_TAGS}
    classes = {tag for tag in found if tag.startswith('AP_class')}
    assert {tag: found[tag] for tag in found if tag not in classes and not tag.startswith('images/')} == expected
    assert classes and all(found[tag] == [1, 2] for tag in classes)
    assert {tag.partition('/')[2] for tag in classes} <= set(VOC_CLASSES)
    assert {tag.partition('/')[0] for tag in classes} == {'AP_class', 'AP_class_bbox'}


def test_test_leaves_no_trace_among_the_curves(site):
    assert (site / RUN / 'test_results.json').is_file()
    assert len(list((site / LOGS).iterdir())) == 1
    before = (site / LOGS).stat().st_mtime_ns
    train(site, '--test')
    assert (site / LOGS).stat().st_mtime_ns == before
    assert len(list((site / LOGS).iterdir())) == 1


def scalars(site: Path) -> list[dict]:
    """The records of the training; a test has none."""
    logs = sorted((site / RUN).glob('*/vis_data/scalars.json'))
    return [
        json.loads(line) for log in logs for line in log.read_text().splitlines(keepends=True) if line.endswith('\n')
    ]


def test_other_backends_keep_the_names(site):
    records = scalars(site)
    training = [r for r in records if 'iter' in r]
    assert len(training) == 4 and len(records) == 6
    for record in training:
        assert set(record) - {'memory'} == {
            'base_lr',
            'lr',
            'lr/backbone',
            'lr/neck',
            'lr/rpn_head',
            'lr/roi_head',
            'data_time',
            'time',
            'loss',
            'loss_rpn_cls',
            'loss_rpn_bbox',
            'loss_cls',
            'loss_bbox',
            'loss_mask',
            'acc',
            'grad_norm',
            'eta_hours',
            'epoch',
            'iter',
            'step',
        }
    validation = [r for r in records if 'iter' not in r]
    assert all(
        name.startswith(('coco/', 'val/')) or name in ('time', 'data_time', 'step')
        for record in validation
        for name in record
    )


def test_curves_have_the_numbers_of_the_log(site):
    records, events = scalars(site), read(site / LOGS)
    training = [r for r in records if 'iter' in r]
    validation = [r for r in records if 'iter' not in r]
    for tag, name, part in (
        ('loss/train', 'loss', training),
        ('lr/neck', 'lr/neck', training),
        ('train/grad_norm', 'grad_norm', training),
        ('loss/val', 'val/loss', validation),
        ('mAP/segm', 'coco/segm_mAP', validation),
        ('AR/bbox_10', 'coco/bbox_AR@10', validation),
    ):
        assert [e.value for e in events.Scalars(tag)] == pytest.approx([r[name] for r in part]), tag
    # Of so few steps the logger's window holds all that went before.
    by_step = np.array([e.value for e in events.Scalars('loss/train')]) * [1, 2, 3, 4]
    assert [e.value for e in events.Scalars('loss/train_epoch')] == pytest.approx(
        [by_step[1] / 2, (by_step[3] - by_step[1]) / 2], rel=1e-4
    )
    assert [e.value for e in events.Scalars('time/eta_hours')][-1] == 0
    losses = [e.value for e in events.Scalars('loss/val')]
    assert [e.value for e in events.Scalars('best/loss_val')] == [losses[0], min(losses)]


def test_pictures(site):
    events = read(site / LOGS)
    tags = sorted(events.Tags()['images'])
    first, last = 'images/val/demo_val_0000', f'images/val/demo_val_{VAL_IMAGES - 1:04}'
    assert tags == ['images/train_batch', first, last]
    assert [e.step for e in events.Images(first)] == [1, 2]
    (batch,) = events.Images('images/train_batch')
    assert batch.step == 0
    image = cv2.imdecode(np.frombuffer(batch.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (batch.height, batch.width, 3)
    assert batch.width > 4 * 400  # four images of a batch in a row


def text_of(folder: Path, tag: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in read(folder).Tensors(f'{tag}/text_summary')]


def test_texts(site):
    ((step, config),) = text_of(site / LOGS, 'config')
    assert step == 0
    namespace: dict = {}
    exec(re.sub(r'^~~~~.*$', '', config, flags=re.M), namespace)
    assert namespace['train_cfg']['max_epochs'] == 2
    ((step, weights),) = text_of(site / LOGS, 'weights')
    assert 're-init' in weights and 'roi_head.bbox_head.fc_cls.weight' in weights
    with inside(site):
        report = train_tool('tiny.py', '--check-weights').out
    assert weights.strip('~\n') in report


# ---- A real TensorBoard ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def server(site) -> Iterator[str]:
    """The address of a TensorBoard that has read the run."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address = f'http://127.0.0.1:{port}'
    process = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'tensorboard.main',
            '--logdir',
            str(site / LOGS),
            '--host',
            '127.0.0.1',
            '--port',
            str(port),
            '--reload_interval',
            '1',
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                # The end of the run is what is written last.
                found = ask(
                    f'{address}/data/plugin/hparams/session_groups',
                    {
                        'experimentName': '',
                        'startIndex': 0,
                        'sliceSize': 10,
                        'allowedStatuses': ['STATUS_SUCCESS'],
                        'colParams': [],
                    },
                )
                if found.get('sessionGroups'):
                    break
            except (urllib.error.URLError, ConnectionError):
                pass
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, 'TensorBoard did not read the run in time'
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def ask(address: str, body: dict | None = None):
    request = urllib.request.Request(
        address, None if body is None else json.dumps(body).encode(), {'Content-Type': 'application/json'}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def test_tensorboard_shows_all_of_it(site, server):
    plugins = f'{server}/data/plugin'
    (curves,) = ask(f'{plugins}/scalars/tags').values()
    assert set(curves) >= TRAIN_TAGS | EPOCH_TAGS
    assert any(tag.startswith('AP_class/') for tag in curves)
    points = ask(f'{plugins}/scalars/scalars?run=.&tag=loss/val')
    assert [step for _, step, _ in points] == [1, 2]

    (images,) = ask(f'{plugins}/images/tags').values()
    assert set(images) == {'images/train_batch', 'images/val/demo_val_0000', f'images/val/demo_val_{VAL_IMAGES - 1:04}'}
    (entry,) = ask(f'{plugins}/images/images?run=.&tag=images/train_batch&sample=0')
    with urllib.request.urlopen(f'{plugins}/images/individualImage?{entry["query"]}') as picture:
        assert picture.headers.get_content_type() == 'image/jpeg'
        shown = cv2.imdecode(np.frombuffer(picture.read(), np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape[1] > 4 * 400  # four images of a batch in a row

    (texts,) = ask(f'{plugins}/text/tags').values()
    assert set(texts) == {'config/text_summary', 'weights/text_summary'}
    (shown,) = ask(f'{plugins}/text/text?run=.&tag=config/text_summary')
    assert shown['text'].count('<code') == 1

    layout = ask(f'{plugins}/custom_scalars/layout')
    charts = {
        (category['title'], chart['title']): chart['multiline']['tag']
        for category in layout['category']
        for chart in category['chart']
    }
    assert charts == {(category, title): tags for category, titles in LAYOUT.items() for title, tags in titles.items()}
    for tags, expected in (
        (charts['loss', 'training (mean of the epoch) and validation'], [['loss/train_epoch'], ['loss/val']]),
        (charts['AP', 'boxes, masks, masks at IoU 0.5'], [['mAP/bbox'], ['mAP/segm'], ['mAP/segm_50']]),
        (charts['learning rate', 'parts of the model'], [sorted(tag for tag in TRAIN_TAGS if tag.startswith('lr/'))]),
    ):
        answers = [ask(f'{plugins}/custom_scalars/scalars?run=.&tag={urllib.request.quote(tag)}') for tag in tags]
        assert all(answer['regex_valid'] for answer in answers)
        assert [sorted(answer['tag_to_events']) for answer in answers] == expected

    groups = ask(
        f'{plugins}/hparams/session_groups',
        {
            'experimentName': '',
            'startIndex': 0,
            'sliceSize': 10,
            'colParams': [],
            'allowedStatuses': ['STATUS_SUCCESS'],
        },
    )['sessionGroups']
    (group,) = groups
    weights = next((site / 'pretrain').glob('*.pth'))
    assert group['hparams'] == {
        'lr': 0.02,
        'optimizer': 'SGD',
        'batch_size': 4.0,
        'accumulation': 1.0,
        'world_size': 1.0,
        'epochs': 2.0,
        'seed': 0.0,
        'head_init': 'reinit',
        'weights': weights.name,
        'weights_sha256': weights.stem[-8:],  # its name ends with it
    }
    metrics = {value['name']['tag']: (value['trainingStep'], value['value']) for value in group['metricValues']}
    assert set(metrics) == {*HIGHER, *map(best_tag, HIGHER)}
    losses = read(site / LOGS).Scalars('loss/val')
    assert metrics['loss/val'] == (2, pytest.approx(losses[-1].value))
    assert metrics['best/loss_val'][1] == pytest.approx(min(e.value for e in losses))


# ---- Resuming -------------------------------------------------------------------------------


def test_resumed_run_has_the_same_curves(site, tmp_path):
    whole = steps(site / LOGS)
    copy_site(site, tmp_path)
    shutil.copytree(site / RUN, tmp_path / RUN)
    (tmp_path / RUN / 'epoch_2.pth').unlink()
    (tmp_path / RUN / 'last_checkpoint').write_text(str(tmp_path / RUN / 'epoch_1.pth'))
    (log,) = (tmp_path / LOGS).iterdir()
    # As a writer leaves it that was killed.
    log.write_bytes(log.read_bytes() + b'\x20\x00\x00\x00\x00')
    early = [e.value for e in read(site / LOGS).Scalars('loss/train')][:EPOCH_STEPS]
    train(tmp_path, '--train', '--resume')
    resumed = steps(tmp_path / LOGS)
    assert resumed.pop('images/train_batch') == [0, EPOCH_STEPS]
    assert resumed == {tag: s for tag, s in whole.items() if tag != 'images/train_batch'}
    assert [e.value for e in read(tmp_path / LOGS).Scalars('loss/train')][:EPOCH_STEPS] == early
    assert [step for step, _ in text_of(tmp_path / LOGS, 'config')] == [0, EPOCH_STEPS]
    # And no reader of the files meets a point twice.
    found = [
        (value.tag, event.step)
        for path in (tmp_path / LOGS).iterdir()
        for _, event in event_files.read_records(path.read_bytes())
        for value in event.summary.value
    ]
    assert len(found) == len(set(found))


@pytest.mark.slow
def test_killed_run_has_no_gap(site, tmp_path):
    copy_site(site, tmp_path)
    configure(tmp_path, epochs=4)
    command = [sys.executable, str(REPO / 'tools/train_pretrained.py'), 'tiny.py', '--train']
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )
    deadline = time.monotonic() + 120
    # In the third epoch, of which nothing is saved.
    while (
        not any(record['step'] == 2 * EPOCH_STEPS + 1 for record in scalars(tmp_path)) and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert not (tmp_path / RUN / 'epoch_3.pth').exists()
    train(tmp_path, '--train', '--resume')
    found = steps(tmp_path / LOGS)
    assert {tag: found[tag] for tag in TRAIN_TAGS} == {tag: [*range(1, 9)] for tag in TRAIN_TAGS}
    assert found['loss/train_epoch'] == [1, 2, 3, 4]
    assert {tag: found[tag] for tag in EPOCH_TAGS} == {tag: [1, 2, 3, 4] for tag in EPOCH_TAGS}


# ---- Without it -----------------------------------------------------------------------------


def fake_module(name: str, monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    module = mock.MagicMock(spec=ModuleType(name), name=name)
    for part in (
        'init',
        'log',
        'join',
        'config',
        'run',
        'log_metrics',
        'log_params',
        'log_text',
        'set_tracking_uri',
        'get_experiment_by_name',
        'create_experiment',
        'set_experiment',
        'set_tag',
        'active_run',
        'log_artifact',
        'end_run',
        'MlflowException',
    ):
        setattr(module, part, mock.MagicMock())
    module.MlflowException = ValueError
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_other_loggers_without_tensorboard(site, tmp_path, monkeypatch):
    copy_site(site, tmp_path)
    wandb, mlflow = (fake_module(name, monkeypatch) for name in ('wandb', 'mlflow'))
    configure(
        tmp_path,
        "dict(type='WandbVisBackend', init_kwargs=dict(project='x')), dict(type='MLflowBackend', exp_name='x')",
        epochs=1,
    )
    train(tmp_path, '--train')
    assert not (tmp_path / LOGS).exists()
    wandb.init.assert_called_once()
    records = [call.args[0] for call in wandb.log.call_args_list]
    assert len(records) == EPOCH_STEPS + 1
    assert {'loss', 'loss_mask', 'grad_norm', 'eta_hours', 'lr/neck'} <= set(records[0])
    assert {'coco/segm_mAP', 'coco/segm_AR@100', 'val/loss'} <= set(records[-1])
    metrics, step = mlflow.log_metrics.call_args_list[-1].args
    assert step == 1
    assert {'coco/segm_mAP', 'coco/segm_AR_100', 'val/loss'} <= set(metrics)
    mlflow.end_run.assert_called_once()


def test_hooks_change_nothing_in_the_training(site, tmp_path):
    import torch

    copy_site(site, tmp_path)
    # Without any backend but MMEngine's own, too.
    configure(tmp_path, hooks=THEIRS, backend='')
    train(tmp_path, '--train')
    plain, ours = (torch.load(folder / RUN / 'epoch_2.pth', weights_only=False) for folder in (tmp_path, site))
    assert plain['state_dict'].keys() == ours['state_dict'].keys()
    assert all(torch.equal(tensor, ours['state_dict'][name]) for name, tensor in plain['state_dict'].items())
    assert not (tmp_path / LOGS).exists()


# ---- The backends alone ---------------------------------------------------------------------


def test_file_is_opened_by_the_first_value(tmp_path):
    backend = TensorBoardBackend(str(tmp_path / 'logs'))
    backend.add_config(Config({'a': 1}))
    backend.close()
    assert not (tmp_path / 'logs').exists()
    backend.add_scalar('loss', 1.0, 1)
    backend.close()
    assert steps(tmp_path / 'logs') == {'loss/train': [1]}
    assert text_of(tmp_path / 'logs', 'config') == [(0, '~~~~python\na = 1\n\n~~~~')]


def test_what_is_plotted_is_on_the_disk(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    for step in (1, 2, 3):
        backend.add_scalars({'loss': 1.0, 'iter': step}, step)
        assert steps(tmp_path)['loss/train'] == [*range(1, step + 1)]
    backend.close()


def test_best_so_far_goes_on_after_resuming(tmp_path):
    def validate(backend, epoch, value, loss):
        backend.add_scalars({'loss': loss, 'iter': epoch}, epoch)
        backend.add_scalars({'coco/segm_mAP': value, 'val/loss': loss}, epoch)

    backend = TensorBoardBackend(str(tmp_path))
    for epoch, (value, loss) in enumerate([(0.3, 2.0), (0.5, 1.0), (0.9, 0.1)], 1):
        validate(backend, epoch, value, loss)
    backend.close()
    backend = TensorBoardBackend(str(tmp_path))
    backend.resume(step=2, epoch=2)
    validate(backend, 3, 0.4, float('nan'))
    validate(backend, 4, -1.0, 0.5)
    backend.close()
    events = read(tmp_path)
    assert [(e.step, round(e.value, 4)) for e in events.Scalars('best/mAP_segm')] == [(1, 0.3), (2, 0.5), (3, 0.5)]
    assert [(e.step, round(e.value, 4)) for e in events.Scalars('best/loss_val')] == [(1, 2.0), (2, 1.0), (4, 0.5)]
    assert [e.step for e in events.Scalars('loss/val')] == [1, 2, 3, 4]


def test_epoch_validated_again_has_one_point(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    image = np.zeros((4, 6, 3), np.uint8)
    for step in (1, 2):
        backend.add_scalars({'coco/segm_mAP': 0.1 * step}, step)
        backend.add_image('images/val/a', image, step)
    backend.close()
    backend = TensorBoardBackend(str(tmp_path))
    backend.resume(step=20, epoch=2)
    for step in (2, 3):
        backend.add_scalars({'coco/segm_mAP': 0.1 * step}, step)
        backend.add_image('images/val/a', image, step)
    backend.close()
    assert steps(tmp_path) == {'mAP/segm': [1, 2, 3], 'best/mAP_segm': [1, 2, 3], 'images/val/a': [1, 2, 3]}


def test_running_tensorboard_forgets_what_is_written_again(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    for step in range(1, 7):
        backend.add_scalars({'loss': float(step), 'iter': step}, step)
    backend.close()
    viewer = read(tmp_path)
    backend = TensorBoardBackend(str(tmp_path))
    backend.resume(step=4, epoch=2)
    for step in (5, 6):
        backend.add_scalars({'loss': 10.0 * step, 'iter': step}, step)
    backend.close()
    for _ in range(2):
        viewer.Reload()
    assert [(e.step, e.value) for e in viewer.Scalars('loss/train')] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
        (6, 60),
    ]


def test_resuming_while_the_file_is_open(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    backend.add_scalars({'loss': 1.0, 'iter': 1}, 1)
    backend.add_scalars({'loss': 1.0, 'iter': 2}, 2)
    backend.resume(step=1, epoch=0)
    backend.add_scalars({'loss': 1.0, 'iter': 2}, 2)
    backend.close()
    assert steps(tmp_path) == {'loss/train': [1, 2]}


def test_image_keeps_its_colours(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    image = np.full((8, 16, 3), (200, 100, 20), np.uint8)
    backend.add_image('images/val/a', image, 3)
    backend.close()
    (event,) = read(tmp_path).Images('images/val/a')
    decoded = cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert (event.step, event.height, event.width) == (3, 8, 16)
    assert np.abs(decoded[..., ::-1].astype(int) - image).max() <= 6


def test_values_that_are_not_numbers_are_left_out(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    with pytest.warns(UserWarning, match='skip it'):
        backend.add_scalars({'loss': 1.0, 'note': 'text', 'iter': 1}, 1)
    backend.close()
    assert steps(tmp_path) == {'loss/train': [1]}


def test_mlflow_ends_a_run_once(tmp_path, monkeypatch):
    mlflow = fake_module('mlflow', monkeypatch)
    backend = MLflowBackend(str(tmp_path))
    backend.close()
    backend.add_config(Config({'work_dir': str(tmp_path)}))
    backend.close()
    mlflow.active_run.return_value = None
    backend.close()
    mlflow.end_run.assert_called_once()
