from __future__ import annotations

import itertools
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
from mmengine.logging import MessageHub

from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.engine.vis_backends import MLflowBackend, TensorBoardBackend
from mmfinetune.evaluation.tensorboard import HIGHER, best_tag, tag_of
from tests.builders.curves import curves, order_files, read, steps, texts
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
LOGS = RUN / 'tensorboard_logs/tiny'
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


TERMS = {f'1_loss/{name}' for name in ('loss', 'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask')}
SHARED = TERMS | {'4_other/acc', '7_time/data', '7_time/iter'}
TRAIN_TAGS = {
    *(['7_time/gpu_memory_MB'] if torch.cuda.is_available() else []),
    *SHARED,
    '4_other/grad_norm',
    *(f'3_lr/{part}' for part in ('base', 'backbone', 'neck', 'rpn_head', 'roi_head')),
    '7_time/eta_hours',
    '7_time/epoch',
}
VAL_TAGS = {
    *SHARED,
    *(f'6_best/{name}' for name in ('mAP_segm', 'mAP_segm_50', 'mAP_bbox', 'loss')),
    # Nothing in 96 px is large.
    *(f'2_mAP/{kind}{end}' for kind in ('bbox', 'segm') for end in ('', '_50', '_75', '_s', '_m')),
    *(f'5_AR/{kind}_{end}' for kind in ('bbox', 'segm') for end in ('1', '10', '100', 's_100', 'm_100')),
}


def expected(epochs: int) -> dict[str, list[int]]:
    """The steps of all curves but those of classes: training and validation on one axis."""
    ends = [EPOCH_STEPS * (epoch + 1) for epoch in range(epochs)]
    return {f'train/{tag}': [*range(1, ends[-1] + 1)] for tag in TRAIN_TAGS} | {f'val/{tag}': ends for tag in VAL_TAGS}


def classes_aside(found: dict[str, list]) -> dict[str, list]:
    return {tag: points for tag, points in found.items() if '/9_' not in tag and '/8_' not in tag}


def test_every_curve_has_its_sub_run_its_tag_and_its_axis(site):
    found = steps(site / LOGS)
    assert classes_aside(found) == expected(2)
    classes = {tag for tag in found if '/9_' in tag}
    assert classes and all(found[tag] == [2, 4] for tag in classes)
    assert {tag.split('/', 2)[2] for tag in classes} <= set(VOC_CLASSES)
    assert {tag.rpartition('/')[0] for tag in classes} == {'val/9_class_AP', 'val/9_class_AP_bbox'}


def test_the_name_of_the_run_is_there_from_any_folder(site):
    for logdir, prefix in ((site / 'work_dirs', 'tiny/tensorboard_logs/'), (site / RUN / 'tensorboard_logs', '')):
        runs = {str(path.parent.relative_to(logdir)) for path in logdir.rglob('events.out.tfevents.*')}
        assert runs == {f'{prefix}tiny/train', f'{prefix}tiny/val'}


def test_test_leaves_no_trace_among_the_curves(site):
    assert (site / RUN / 'test_results.json').is_file()
    before = [(path, path.stat().st_mtime_ns) for path in sorted((site / LOGS).rglob('*'))]
    assert len(before) == 4  # two folders, and a file in each
    train(site, '--test')
    assert [(path, path.stat().st_mtime_ns) for path in sorted((site / LOGS).rglob('*'))] == before


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
    records, found = scalars(site), curves(site / LOGS)
    values = {tag: [value for _, value in points] for tag, points in found.items()}
    training = [r for r in records if 'iter' in r]
    validation = [r for r in records if 'iter' not in r]
    for tag, name, part in (
        ('train/3_lr/neck', 'lr/neck', training),
        ('train/4_other/grad_norm', 'grad_norm', training),
        ('val/1_loss/loss', 'val/loss', validation),
        ('val/2_mAP/segm', 'coco/segm_mAP', validation),
        ('val/5_AR/bbox_10', 'coco/bbox_AR@10', validation),
    ):
        assert values[tag] == pytest.approx([r[name] for r in part]), tag
    # Of so few steps the logger's window holds all that went before; the curve has each step.
    means = np.cumsum(values['train/1_loss/loss']) / [1, 2, 3, 4]
    assert means == pytest.approx([r['loss'] for r in training], rel=1e-4)
    assert values['train/7_time/eta_hours'][-1] == 0
    losses = values['val/1_loss/loss']
    assert values['val/6_best/loss'] == [losses[0], min(losses)]


FIRST, LAST = '8_images/val/demo_val_0000', f'8_images/val/demo_val_{VAL_IMAGES - 1:04}'


def test_pictures(site):
    found = steps(site / LOGS)
    assert {tag: points for tag, points in found.items() if '/8_' in tag} == {
        'train/8_images/train_batch': [1],
        f'val/{FIRST}': [2, 4],
        f'val/{LAST}': [2, 4],
    }
    (batch,) = read(site / LOGS / 'train').Images('8_images/train_batch')
    image = cv2.imdecode(np.frombuffer(batch.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (batch.height, batch.width, 3)
    assert batch.width > 4 * 400  # four images of a batch in a row


def test_texts(site):
    ((step, config),) = texts(site / LOGS, 'config')
    assert step == 1
    namespace: dict = {}
    exec(re.sub(r'^~~~~.*$', '', config, flags=re.M), namespace)
    assert namespace['train_cfg']['max_epochs'] == 2
    ((step, weights),) = texts(site / LOGS, 'weights')
    assert 're-init' in weights and 'roi_head.bbox_head.fc_cls.{weight,bias}' in weights
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
            str(site / LOGS.parent),
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
    assert {
        run: set(tags) >= wanted
        for run, tags in ask(f'{plugins}/scalars/tags').items()
        for wanted in [TRAIN_TAGS if run == 'tiny/train' else VAL_TAGS]
    } == {'tiny/train': True, 'tiny/val': True}
    for run, expected in (('train', [1, 2, 3, 4]), ('val', [2, 4])):
        points = ask(f'{plugins}/scalars/scalars?run=tiny/{run}&tag=1_loss/loss')
        assert [step for _, step, _ in points] == expected

    images = ask(f'{plugins}/images/tags')
    assert {run: set(tags) for run, tags in images.items()} == {
        'tiny/train': {'8_images/train_batch'},
        'tiny/val': {FIRST, LAST},
    }
    (entry,) = ask(f'{plugins}/images/images?run=tiny/train&tag=8_images/train_batch&sample=0')
    with urllib.request.urlopen(f'{plugins}/images/individualImage?{entry["query"]}') as picture:
        assert picture.headers.get_content_type() == 'image/jpeg'
        shown = cv2.imdecode(np.frombuffer(picture.read(), np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape[1] > 4 * 400  # four images of a batch in a row

    (tags,) = ask(f'{plugins}/text/tags').values()
    assert set(tags) == {'config/text_summary', 'weights/text_summary'}
    (shown,) = ask(f'{plugins}/text/text?run=tiny/train&tag=config/text_summary')
    assert shown['text'].count('<code') == 1

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
    assert set(metrics) == {*map(tag_of, HIGHER), *map(best_tag, HIGHER)}
    losses = [value for _, value in curves(site / LOGS)['val/1_loss/loss']]
    assert metrics['1_loss/loss'] == (4, pytest.approx(losses[-1]))
    assert metrics['6_best/loss'][1] == pytest.approx(min(losses))


# ---- Resuming -------------------------------------------------------------------------------


def rewound(site: Path, folder: Path) -> None:
    """A copy of the run whose newest checkpoint is that of the first epoch."""
    copy_site(site, folder)
    shutil.copytree(site / RUN, folder / RUN)
    (folder / RUN / 'epoch_2.pth').unlink()
    (folder / RUN / 'last_checkpoint').write_text(str(folder / RUN / 'epoch_1.pth'))


def test_resumed_run_has_the_same_curves(site, tmp_path):
    whole = curves(site / LOGS)
    rewound(site, tmp_path)
    for log in (tmp_path / LOGS).rglob('events*'):
        log.write_bytes(log.read_bytes() + b'\x20\x00\x00\x00\x00')  # as a writer leaves it that was killed
    train(tmp_path, '--train', '--resume')
    assert not [tag for tag, points in curves(tmp_path / LOGS).items() if '7_time' not in tag and points != whole[tag]]
    found = steps(tmp_path / LOGS)
    assert found.pop('train/8_images/train_batch') == [1, 3]
    assert found == {tag: points for tag, points in steps(site / LOGS).items() if tag != 'train/8_images/train_batch'}
    assert [step for step, _ in texts(tmp_path / LOGS, 'config')] == [1, 3]


def test_resumed_run_that_has_another_name_keeps_its_curves(site, tmp_path):
    rewound(site, tmp_path)
    (tmp_path / RUN).rename(tmp_path / 'work_dirs/other')
    checkpoint = 'work_dirs/other/epoch_1.pth'
    train(tmp_path, '--train', '--resume', checkpoint, '--work-dir', 'work_dirs/other')
    logs = tmp_path / 'work_dirs/other/tensorboard_logs'
    assert [path.name for path in logs.iterdir()] == ['other']
    assert classes_aside(steps(logs / 'other')) == expected(2)


@pytest.mark.slow
@pytest.mark.parametrize('last', [{'step': 2 * EPOCH_STEPS + 1, 'iter': 2 * EPOCH_STEPS + 1}, {'step': 2}])
def test_killed_run_has_no_gap_and_no_double_point(site, tmp_path, last):
    """Killed in the third epoch, of which nothing is saved; or where the validation of the second is just written."""
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

    def is_there() -> bool:
        return any(
            last['step'] == record['step'] and last.get('iter') == record.get('iter') for record in scalars(tmp_path)
        )

    while not is_there() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert not (tmp_path / RUN / 'epoch_3.pth').exists()
    train(tmp_path, '--train', '--resume')
    assert classes_aside(steps(tmp_path / LOGS)) == expected(4)


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


@pytest.fixture
def hub(monkeypatch) -> MessageHub:
    """The message hub of a run, and event files whose names tell their order although they are made at once."""
    order_files(monkeypatch)
    return MessageHub.get_instance(f'vis_backends_{next(_NUMBERS)}')


_NUMBERS = itertools.count()


def test_file_is_opened_by_the_first_value(tmp_path, hub):
    backend = TensorBoardBackend(str(tmp_path / 'logs'))
    backend.add_config(Config({'a': 1}))
    backend.close()
    assert not (tmp_path / 'logs').exists()
    backend.add_scalar('loss', 1.0, 1)
    backend.close()
    assert steps(tmp_path / 'logs') == {'train/1_loss/loss': [1]}
    assert texts(tmp_path / 'logs', 'config') == [(1, '~~~~python\na = 1\n\n~~~~')]


def train_step(backend: TensorBoardBackend, hub: MessageHub, step: int, loss: float, count: int = 1) -> None:
    hub.update_info('iter', step - 1)
    hub.update_scalar('train/loss', loss, count)
    backend.add_losses(['loss'], step)


def validate(backend: TensorBoardBackend, hub: MessageHub, **metrics: float) -> None:
    record = {name.replace('__', '/'): value for name, value in metrics.items()}
    for name, value in record.items():
        hub.update_scalar(f'val/{name}', value)
    backend.add_scalars(record, 99)


def test_what_is_plotted_is_on_the_disk(tmp_path, hub):
    backend = TensorBoardBackend(str(tmp_path))
    for step in (1, 2, 3):
        train_step(backend, hub, step, 1.0)
        assert steps(tmp_path)['train/1_loss/loss'] == [*range(1, step + 1)]
    validate(backend, hub, val__loss=1.0)
    assert steps(tmp_path)['val/1_loss/loss'] == [3]
    backend.close()


def test_losses_are_those_of_the_steps_and_not_of_the_record(tmp_path, hub):
    backend = TensorBoardBackend(str(tmp_path))
    for step in range(1, 131):
        train_step(backend, hub, step, float(step), count=step != 128)
        if step % 20 == 0:
            backend.add_scalars({'loss': -1.0, 'lr': 0.1, 'iter': step}, step)
    backend.close()
    found = curves(tmp_path)
    assert found['train/1_loss/loss'] == [
        *((step, step) for step in range(1, 65)),
        *((step, step - 0.5) for step in range(66, 127, 2)),
        (128, 127),  # the other was skipped
    ]
    assert [step for step, _ in found['train/3_lr/all']] == [20, 40, 60, 80, 100, 120]


def test_records_alone_have_all_curves(tmp_path, hub):
    backend = TensorBoardBackend(str(tmp_path))
    backend.add_scalars({'loss': 2.0, 'iter': 20}, 20)
    backend.close()
    assert curves(tmp_path) == {'train/1_loss/loss': [(20, 2.0)]}


def test_best_so_far_is_that_of_the_runs_history(tmp_path, hub):
    backend = TensorBoardBackend(str(tmp_path))
    for step, (value, loss) in enumerate([(0.3, 2.0), (0.5, 1.0), (0.4, float('nan')), (-1.0, 0.5)], 1):
        hub.update_info('iter', step - 1)
        validate(backend, hub, coco__segm_mAP=value, val__loss=loss)
    backend.close()
    found = {tag: [(step, round(value, 4)) for step, value in points] for tag, points in curves(tmp_path).items()}
    assert found['val/6_best/mAP_segm'] == [(1, 0.3), (2, 0.5), (3, 0.5)]
    assert found['val/6_best/loss'] == [(1, 2.0), (2, 1.0), (3, 1.0), (4, 0.5)]


@pytest.mark.parametrize('again', [True, False, None])
def test_resumed_curves_have_each_point_once(tmp_path, hub, again):
    """Also in a TensorBoard that runs already; the validation of the last step is made again, or not.

    Without `TensorBoardHook` nothing asks for it.
    """
    backend, image = TensorBoardBackend(str(tmp_path)), np.zeros((4, 6, 3), np.uint8)
    for step in range(1, 7):
        train_step(backend, hub, step, float(step))
        if step % 2 == 0:
            validate(backend, hub, val__loss=float(step))
            backend.add_image(FIRST, image, step)
    backend.close()
    viewer = read(tmp_path / 'train')
    backend = TensorBoardBackend(str(tmp_path))
    if again is not None:
        backend.resume(4, again)
    if again:
        hub.update_info('iter', 3)
        validate(backend, hub, val__loss=40.0)
        backend.add_image(FIRST, image, 4)
    for step in (5, 6):
        train_step(backend, hub, step, 10.0 * step)
    validate(backend, hub, val__loss=60.0)
    backend.add_image(FIRST, image, 6)
    backend.close()
    for _ in range(2):
        viewer.Reload()
    losses = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50), (6, 60)]
    assert [(e.step, e.value) for e in viewer.Scalars('1_loss/loss')] == losses
    found = curves(tmp_path)
    assert found['train/1_loss/loss'] == losses
    assert found['val/1_loss/loss'] == [(2, 2), (4, 40 if again else 4), (6, 60)]
    assert steps(tmp_path)[f'val/{FIRST}'] == [2, 4, 6]


def test_resuming_while_the_file_is_open(tmp_path, hub):
    backend = TensorBoardBackend(str(tmp_path))
    for step in (1, 2):
        train_step(backend, hub, step, 1.0)
    backend.resume(1, False)
    train_step(backend, hub, 2, 1.0)
    backend.close()
    assert steps(tmp_path) == {'train/1_loss/loss': [1, 2]}


def test_image_keeps_its_colours(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    image = np.full((8, 16, 3), (200, 100, 20), np.uint8)
    backend.add_image(FIRST, image, 3)
    backend.close()
    (event,) = read(tmp_path / 'val').Images(FIRST)
    decoded = cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert (event.step, event.height, event.width) == (3, 8, 16)
    assert np.abs(decoded[..., ::-1].astype(int) - image).max() <= 6


def test_values_that_are_not_numbers_are_left_out(tmp_path):
    backend = TensorBoardBackend(str(tmp_path))
    with pytest.warns(UserWarning, match='skipped'):
        backend.add_scalars({'loss': 1.0, 'note': 'text', 'iter': 1}, 1)
    backend.close()
    assert steps(tmp_path) == {'train/1_loss/loss': [1]}


def test_mlflow_ends_a_run_once(tmp_path, monkeypatch):
    mlflow = fake_module('mlflow', monkeypatch)
    backend = MLflowBackend(str(tmp_path))
    backend.close()
    backend.add_config(Config({'work_dir': str(tmp_path)}))
    backend.close()
    mlflow.active_run.return_value = None
    backend.close()
    mlflow.end_run.assert_called_once()
