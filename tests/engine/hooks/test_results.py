"""ResultsHook in real runs: what is in the files, resuming, odd configs, failures."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmfinetune.engine.hooks import results
from mmfinetune.engine.hooks.results import ResultsHook
from mmfinetune.evaluation.history import History
from mmfinetune.utils import extras
from mmfinetune.utils.errors import Message, UserError
from tests.builders.runs import (
    EPOCH_STEPS,
    TOOLS,
    TRAIN_IMAGES,
    VAL_IMAGES,
    copy_site,
    forget_runs,
    inside,
    make_site,
    spawn,
    train_tool,
    write_tiny_config,
)

# Each step is logged as it is, so that means can be taken by hand.
HOOK = """
log_processor = dict(window_size=1)
"""
BY_ITERATION = """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=5, val_interval=2)
log_processor = dict(by_epoch=False, window_size=1)
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1),
                     logger=dict(log_metric_by_epoch=False, interval=1))
train_dataloader['sampler'] = dict(_delete_=True, type='InfiniteSampler')
"""
NO_VALIDATION = """
val_cfg = None
val_dataloader = None
val_evaluator = None
default_hooks = dict(checkpoint=dict(save_best=None))
"""
TABLES = ['results.csv', 'det_results.txt', 'seg_results.txt', 'record_mAP.txt', 'summary.md']
PICTURES = ['curves.png', 'per_class.png']


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('result_hooks')
    weights = make_site(folder)
    hookless = HOOK + 'default_hooks.update(tensorboard=None, results=None)\n'
    for name, extra in (
        ('tiny', HOOK),
        ('hookless', hookless),
        ('bare', HOOK + NO_VALIDATION),
        ('iter', HOOK + BY_ITERATION),
        ('bare_iter', HOOK + BY_ITERATION + NO_VALIDATION),
    ):
        write_tiny_config(folder / f'{name}.py', weights=weights, epochs=3, extra=extra)
    return folder


@pytest.fixture(scope='module')
def run(site) -> Path:
    """Three epochs; only to be read."""
    train(site, 'tiny.py', 'run')
    return site / 'work_dirs/run'


def train(site: Path, config: str, name: str, *args: str) -> str:
    """Train in a work dir of that name, and give the log."""
    with inside(site):
        done = train_tool(config, '--train', '--work-dir', f'work_dirs/{name}', *args)
        assert done.code == 0, done.err
        return max(Path('work_dirs', name).glob('*/*.log')).read_text()


def copy_run(run: Path, target: Path) -> tuple[Path, Path]:
    """A copy of the site with one run to spoil; the site and the work dir."""
    site = copy_site(run.parents[1], target)
    return site, Path(shutil.copytree(run, site / 'work_dirs/run'))


def rows(work_dir: Path) -> list[dict[str, str]]:
    with (work_dir / 'results.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def records(work_dir: Path) -> list[dict]:
    """What MMEngine logged, all parts in their order."""
    return [
        json.loads(line)
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text().splitlines()
    ]


def test_log_within_a_validation_shows_nothing_of_the_one_before(run):
    lines = re.findall(r'Epoch\(val\) +\[(\d)\]\[(\d)/(\d)\](.*)', max(run.glob('*/*.log')).read_text())
    within = [rest for _, step, total, rest in lines if 'coco/' not in rest]
    assert len(within) >= 3 and not [rest for rest in within if 'loss' in rest]
    shown = [float(re.findall(r'val/loss: ([\d.]+)', rest)[0]) for *_, rest in lines if 'coco/' in rest]
    assert shown == [round(float(row['val/loss']), 4) for row in rows(run)]


def test_row_holds_what_the_logs_hold(run):
    logged = records(run)
    table = rows(run)
    assert [(r['epoch'], r['iter']) for r in table] == [('1', '2'), ('2', '4'), ('3', '6')]
    for epoch, row in reversed(list(enumerate(table, 1))):
        steps = [r for r in logged if r.get('epoch') == epoch]
        assert len(steps) == EPOCH_STEPS
        terms = [k for k in steps[0] if 'loss' in k or k == 'acc']
        assert len(terms) == 7
        for term in terms:
            mean = sum(s[term] for s in steps) / EPOCH_STEPS
            assert float(row[f'train/{term}']) == pytest.approx(mean, rel=1e-12), term
        for name in ('backbone', 'neck', 'rpn_head', 'roi_head'):
            assert float(row[f'lr/{name}']) == steps[-1][f'lr/{name}']
        assert float(row['lr']) == steps[-1]['base_lr'] == 0.02
        assert float(row['train_seconds']) == pytest.approx(sum(s['time'] for s in steps))
        validation = next(r for r in logged if 'iter' not in r and r['step'] == epoch)
        names = [k for k in validation if k.startswith(('coco/', 'val/')) and '_AP/' not in k]
        assert len(names) == 24 + 7
        for name in names:
            assert float(row[name]) == validation[name], name
    # With the evaluation it takes longer than its batches alone.
    assert float(table[0]['val_seconds']) > validation['time']
    assert set(table[0]) == {
        'epoch',
        'iter',
        'lr',
        'train_seconds',
        'val_seconds',
        *(f'lr/{n}' for n in ('backbone', 'neck', 'rpn_head', 'roi_head')),
        *(f'train/{term}' for term in terms),
        *names,
    }


def test_all_files_of_a_run(run):
    history = History.from_csv((run / 'results.csv').read_bytes())
    for kind, name in (('bbox', 'det_results.txt'), ('segm', 'seg_results.txt')):
        lines = (run / name).read_text().splitlines()
        assert [len(line.split()) for line in lines] == [15] * 3
        assert lines[1].split()[1] == f'{history.rows[1][f"coco/{kind}_mAP"]:.4f}'
        assert lines[1].split()[-2:] == [f'{history.rows[1]["train/loss"]:.4f}', '0.020000']
    assert (run / 'record_mAP.txt').read_text().startswith('Validation after epoch 3\n')
    for name in PICTURES:
        assert Image.open(run / name).format == 'PNG'
    text = (run / 'summary.md').read_text()
    assert '# run\n\n**Finished: epoch 3 of 3**' in text
    assert 'train_pretrained.py tiny.py --train --work-dir work_dirs/run\n```' in text
    assert f'mmfinetune 0.1.0, mmdet 3.5.1, mmengine 0.10.12, torch {torch.__version__}' in text
    best = next(run.glob('best_*.pth'))
    assert f'[{best.name}]({best.name})' in text
    weights = next((run.parents[1] / 'pretrain').glob('*.pth'))
    assert f'{weights.name} (SHA-256 {weights.stem[-8:]}…; ' in text and '6 re-initialized)' in text
    annotations = run.parents[1] / 'data/demo/VOCdevkit/VOC2012/annotations'
    for split, images in (('train', TRAIN_IMAGES), ('val', VAL_IMAGES)):
        objects = len(json.loads((annotations / f'instances_{split}.json').read_text())['annotations'])
        assert f'| {split:5} | {images:6} | {objects:7} |      20 | ' in text
    assert '| class       | label | mask AP | mask AP50 | box AP | box AP50 |' in text
    for name in (*TABLES[:-1], *PICTURES):
        assert f'- [{name}]({name})' in text


def test_training_is_the_same_with_and_without(site, run):
    train(site, 'hookless.py', 'without', '--cfg-options', 'train_cfg.max_epochs=1')
    states = [
        torch.load(folder / 'epoch_1.pth', weights_only=False)['state_dict'] for folder in (run, run.parent / 'without')
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not (run.parent / 'without/results.csv').exists()


def test_resumed_run_has_each_epoch_once(run, tmp_path):
    site, folder = copy_run(run, tmp_path / 'site')
    before = (run / 'results.csv').read_text().splitlines()
    # From epoch 1 of 3: the second and the third are trained anew.
    train(site, 'tiny.py', 'run', '--resume', 'work_dirs/run/epoch_1.pth')
    after = (folder / 'results.csv').read_text().splitlines()
    assert after[:2] == before[:2]
    assert [line.split(',')[:2] for line in after[1:]] == [['1', '2'], ['2', '4'], ['3', '6']]
    steps = [r['loss'] for r in records(folder) if r.get('epoch') == 2][-EPOCH_STEPS:]
    assert float(rows(folder)[1]['train/loss']) == pytest.approx(sum(steps) / EPOCH_STEPS)
    for name in TABLES[1:3]:
        lines = (folder / name).read_text().splitlines()
        assert [line.split()[0] for line in lines] == ['epoch:1', 'epoch:2', 'epoch:3']
    assert '| resumed from | work_dirs/run/epoch_1.pth (1 done)' in (folder / 'summary.md').read_text()
    assert not list(folder.glob('*.bak*'))


def test_what_cannot_be_read_or_written_does_not_end_the_training(run, tmp_path, monkeypatch):
    from mmfinetune.evaluation import plots

    site, folder = copy_run(run, tmp_path / 'site')
    table = folder / 'results.csv'
    damaged = table.read_text().replace('\n1,2,', '\n1,two,', 1)
    table.write_text(damaged)
    for name in ('curves.png', 'summary.md'):
        (folder / name).unlink()
        (folder / name).mkdir()
    monkeypatch.setattr(plots, 'class_bars', lambda *_: 1 / 0)
    monkeypatch.delenv(extras.STRICT)
    said: list[Message] = []
    for module in (results, extras):
        monkeypatch.setattr(module, 'warn', said.append)
    train(site, 'tiny.py', 'run', '--resume', 'work_dirs/run/epoch_2.pth')
    (aside,) = [message.facts for message in said if message.code == 'results-set-aside']
    assert (aside['path'].name, aside['kept']) == ('results.csv', 'results.csv.bak')
    assert 'line 2' in aside['why']
    assert (folder / 'results.csv.bak').read_text() == damaged
    assert [r['epoch'] for r in rows(folder)] == ['3']
    failed: dict[str, list] = {}
    for message in said:
        if message.code == 'results-not-written':
            failed.setdefault(message.facts['what'], []).append(message.facts['why'])
    assert set(failed) == {'curves.png', 'summary.md', 'per_class.png'}
    assert all(isinstance(why, UserError) for name in ('curves.png', 'summary.md') for why in failed[name])
    assert 'ZeroDivisionError' in failed['per_class.png'][0]
    assert (folder / 'epoch_3.pth').is_file()


def test_validation_now_and_then_of_boxes_only_without_loss(site):
    (site / 'work_dirs/boxes').mkdir(parents=True)
    (site / 'work_dirs/boxes/results.csv').write_text('of an earlier run')
    train(
        site,
        'tiny.py',
        'boxes',
        '--cfg-options',
        'train_cfg.val_interval=2',
        'train_cfg.max_epochs=2',
        'val_cfg.loss=False',
        "val_evaluator.metric=['bbox']",
        'default_hooks.checkpoint.save_best=coco/bbox_mAP',
    )
    folder = site / 'work_dirs/boxes'
    table, logged = rows(folder), records(folder)
    assert [(r['epoch'], r['iter']) for r in table] == [('2', '4')]
    assert (folder / 'results.csv.bak').read_text() == 'of an earlier run'
    # Of the second epoch alone, the same number as if the first had been validated too.
    steps = [r['loss'] for r in logged if r.get('epoch') == 2]
    assert float(table[0]['train/loss']) == pytest.approx(sum(steps) / EPOCH_STEPS, rel=1e-12)
    assert not [name for name in table[0] if name.startswith(('val/', 'coco/segm'))]
    assert (folder / 'det_results.txt').read_text().startswith('epoch:2 ')
    assert not (folder / 'seg_results.txt').exists()
    assert 'segm' not in (folder / 'record_mAP.txt').read_text()
    assert 'Best coco/bbox_mAP: ' in (folder / 'summary.md').read_text()


def test_training_counted_in_iterations(site):
    train(site, 'iter.py', 'iter')
    folder = site / 'work_dirs/iter'
    table = rows(folder)
    assert [(r['epoch'], r['iter']) for r in table] == [('', '2'), ('', '4'), ('', '5')]
    losses = {r['step']: r['loss'] for r in records(folder) if 'iter' in r}
    for row, steps in zip(table, ((1, 2), (3, 4), (5,)), strict=True):
        mean = sum(losses[s] for s in steps) / len(steps)
        assert float(row['train/loss']) == pytest.approx(mean, rel=1e-12)
    lines = (folder / 'seg_results.txt').read_text().splitlines()
    assert [line.split()[0] for line in lines] == ['iter:2', 'iter:4', 'iter:5']
    text = (folder / 'summary.md').read_text()
    assert '**Finished: iteration 5 of 5**' in text and '## Iterations' in text


@pytest.mark.slow
def test_row_of_iterations_before_and_after_resuming(site):
    train(site, 'iter.py', 'iter_again')
    # Between two rows: the row's mean is over the steps of both parts.
    train(site, 'iter.py', 'iter_again', '--resume', 'work_dirs/iter_again/iter_3.pth')
    folder = site / 'work_dirs/iter_again'
    table = rows(folder)
    assert [r['iter'] for r in table] == ['2', '4', '5']
    # Of a step trained twice the later record stands.
    losses = {r['step']: r['loss'] for r in records(folder) if 'iter' in r}
    assert float(table[1]['train/loss']) == pytest.approx((losses[3] + losses[4]) / 2, rel=1e-12)


def test_training_without_validation(site):
    train(site, 'bare.py', 'bare', '--cfg-options', 'train_cfg.max_epochs=2')
    folder = site / 'work_dirs/bare'
    assert [(r['epoch'], r['iter']) for r in rows(folder)] == [('1', '2'), ('2', '4')]
    assert not [name for name in rows(folder)[0] if name.startswith(('val', 'coco'))]
    assert sorted(p.name for p in folder.iterdir() if p.name in (*TABLES, *PICTURES)) == [
        'curves.png',
        'results.csv',
        'summary.md',
    ]
    assert '**Finished: epoch 2 of 2**' in (folder / 'summary.md').read_text()


@pytest.mark.slow
def test_iterations_without_validation_get_a_row_for_each_pass(site):
    train(site, 'bare_iter.py', 'bare_iter')
    assert [r['iter'] for r in rows(site / 'work_dirs/bare_iter')] == ['2', '4', '5']


def test_validation_alone_leaves_no_files(site, run):
    from mmengine.runner import Runner

    from mmfinetune.config import load

    forget_runs()
    with inside(site):
        cfg = load.load('tiny.py')
        cfg.default_hooks.checkpoint.save_best = None  # MMEngine's fails without training
        cfg.work_dir, cfg.load_from, cfg.weights = 'val_only', str(run / 'epoch_3.pth'), None
        metrics = Runner.from_cfg(cfg).val()
    assert 'coco/segm_mAP' in metrics
    assert not [name for name in (*TABLES, *PICTURES) if (site / 'val_only' / name).exists()]


def test_epoch_resumed_in_its_middle_is_counted_from_its_start(tmp_path):
    """What the hook reads of a Runner, after a resumption at step 3 of the second epoch of 2."""
    from mmengine.logging import MessageHub

    hub = MessageHub('middle')
    for step, loss in enumerate((9.0, 9.0, 4.0), 1):
        hub.update_scalar('train/loss', loss)
        hub.update_scalar('train/time', step)
    hook = ResultsHook()
    before = SimpleNamespace(message_hub=hub, epoch=1, iter=2)
    hook.before_train_epoch(before)
    state = hub.state_dict()
    resumed = MessageHub('resumed')
    resumed.load_state_dict(state)
    hook = ResultsHook()
    runner = SimpleNamespace(message_hub=resumed, epoch=1, iter=3)
    hook.before_train_epoch(runner)
    resumed.update_scalar('train/loss', 2.0)
    resumed.update_scalar('train/time', 7.0)
    assert results.trained(runner, {'iter': 4, 'epoch': 2}, 2) == {'train/loss': 3.0, 'train_seconds': 10.0}
    # The next epoch starts again; a step that was skipped does not count, and makes the window no longer.
    hook.before_train_epoch(SimpleNamespace(message_hub=resumed, epoch=2, iter=4))
    for loss, count in ((1.0, 1), (0.0, 0), (2.0, 1)):
        resumed.update_scalar('train/loss', loss, count)
    assert results.trained(runner, {'iter': 7, 'epoch': 3}, 4)['train/loss'] == 1.5


@pytest.mark.slow
def test_killed_run_leaves_what_it_had_and_goes_on(site):
    command = [
        sys.executable,
        str(TOOLS / 'train_pretrained.py'),
        'tiny.py',
        '--train',
        '--work-dir',
        'work_dirs/killed',
        '--cfg-options',
        'train_cfg.max_epochs=200',
    ]
    with subprocess.Popen(
        command,
        cwd=site,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    ) as process:
        end = time.monotonic() + 200
        while time.monotonic() < end and process.poll() is None:
            path = site / 'work_dirs/killed/results.csv'
            if path.is_file() and len(path.read_text().splitlines()) > 3:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    folder = site / 'work_dirs/killed'
    before = rows(folder)
    assert len(before) >= 3
    assert ': epoch' in (folder / 'summary.md').read_text().splitlines()[2]
    assert '**Unfinished' in (folder / 'summary.md').read_text()
    # The last one may be half written.
    numbers = sorted(int(p.stem.rpartition('_')[2]) for p in folder.glob('epoch_*.pth'))
    resumed = numbers[-2]
    train(
        site,
        'tiny.py',
        'killed',
        '--resume',
        f'work_dirs/killed/epoch_{resumed}.pth',
        '--cfg-options',
        f'train_cfg.max_epochs={resumed + 1}',
    )
    kept = [row for row in before if int(row['epoch']) <= resumed]
    assert len(kept) == resumed
    assert rows(folder)[:-1] == kept
    assert rows(folder)[-1]['epoch'] == str(resumed + 1)


@pytest.mark.slow
def test_two_processes_write_one_mean(site):
    with inside(site):
        done = spawn(
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            TOOLS / 'train_pretrained.py',
            'tiny.py',
            '--train',
            '--work-dir',
            'work_dirs/two',
        )
    assert done.code == 0, done.err[-3000:]
    folder = site / 'work_dirs/two'
    table = rows(folder)
    assert [(r['epoch'], r['iter']) for r in table] == [('1', '1'), ('2', '2'), ('3', '3')]
    # MMEngine logs the loss of the first process, the row has the mean of both.
    logged = next(r['loss'] for r in records(folder) if r.get('epoch') == 1)
    assert float(table[0]['train/loss']) != pytest.approx(logged, rel=1e-6)
    assert float(table[0]['train/loss']) == pytest.approx(logged, rel=0.5)
    assert '2 × cpu' in (folder / 'summary.md').read_text()
