"""No tool unpickles what could run code: files that try leave no trace, and an audit of all tools finds no such load."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS

import mmfinetune.register  # noqa: F401
from tests.builders.errors import refused
from tests.builders.runs import CONFIGS, DEVKIT, TOOLS, FinishedRun, copy_site, drive, train_tool
from tests.builders.weights import Evil

IMAGE = DEVKIT / 'JPEGImages'
TRACE = 'trace'


class Audit:
    """What Python's own unpickler looked up since the last `start`: with it a pickle can call anything.

    Readers of data look names up in their own tables, so they are not in it. Processes of one
    run pass objects to each other by pickles; these are left out.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.on and event == 'pickle.find_class':
            stack = traceback.extract_stack()
            if not any('/multiprocessing/' in frame.filename for frame in stack):
                self.found.append(f'{args[0]}.{args[1]} in {stack[-2].filename}:{stack[-2].lineno}')


@pytest.fixture(scope='module')
def audit() -> Audit:
    return Audit()


@pytest.fixture
def unpickled(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The unrestricted loads so far, by Python's unpickler and by torch."""
    load = torch.load

    def watched(*args, **kwargs):
        if kwargs.get('weights_only') is not True:
            audit.found.append(f'torch.load{args}')
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, 'load', watched)
    audit.found.clear()
    audit.on = True
    yield audit.found
    audit.on = False


def test_the_audit_sees_unpickling(unpickled, tmp_path):
    class Loose(pickle.Unpickler):
        pass

    data = pickle.dumps(Path('a'))
    for load in (pickle.loads, lambda data: Loose(__import__('io').BytesIO(data)).load()):
        load(data)
        assert unpickled.pop().startswith('pathlib')
        assert not unpickled
    torch.save({}, tmp_path / 'a.pth')
    torch.load(tmp_path / 'a.pth')
    assert len(unpickled) == 1


def test_no_tool_unpickles_without_restriction(unpickled, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(copy_site(finished_run.folder, tmp_path / 'site'))
    run, image = Path('run'), next((finished_run.folder / IMAGE).glob('*'))
    shutil.copytree(finished_run.kept / 'tiny', run)
    one = ['--cfg-options', 'train_cfg.max_epochs=3']
    ann = next((finished_run.folder / DEVKIT).rglob('instances_*.json'))
    commands = [
        ('train_pretrained', 'tiny.py', '--check-weights'),
        ('train_pretrained', 'tiny.py', '--resume', '--work-dir', run, *one),
        ('train_pretrained', 'tiny.py', '--train', '--work-dir', 'new', *one, f'load_from={run / "epoch_2.pth"}'),
        ('train_pretrained', 'tiny.py', '--test', '--head-init', 'remap', '--work-dir', 'new'),
        ('evaluate', run, '--no-pictures'),
        ('predict', image, '--run', run, '--out', 'predicted'),
        ('compare_runs', run, '--out', 'compared'),
        ('publish_weights', run, 'published'),
        ('convert_weights', run / 'epoch_2.pth', 'tv.pth', '--to', 'torchvision'),
        ('convert_weights', 'tv.pth', 'back.pth'),
        ('flatten_config', 'tiny.py'),
        ('check_dataset', '--config', 'tiny.py', '--no-cache'),
        ('prepare_data', DEVKIT, 'prepared'),
        ('prepare_voc', '--data-root', DEVKIT.parent),
        ('split_dataset', ann, '--ratios', '50', '50', '--out', 'split'),
        ('new_config', '--data', DEVKIT, '--name', 'own', '--base', CONFIGS / 'mask_rcnn_demo.py', '--out', 'own.py'),
        ('check_platform',),
    ]
    assert {tool for tool, *_ in commands} == {path.stem for path in TOOLS.glob('*.py')}
    for tool, *args in commands:
        done = drive(tool, *args)
        assert (done.error, 'Traceback' in done.err) == (None, False), (tool, args, done.err)
        assert unpickled == [], (tool, args)


@pytest.fixture
def bad(in_finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A checkpoint of the run's model that makes a folder where it is unpickled."""
    content = torch.load(in_finished_run.kept / 'tiny/epoch_2.pth', weights_only=False)
    path = tmp_path / 'bad.pth'
    torch.save({**content, 'x': Evil(os.mkdir, str(tmp_path / TRACE))}, path)
    return path


def every_way_in(bad: Path, run: Path) -> list[tuple]:
    """Commands that lead to a file, and the codes of their errors."""
    train = ('train_pretrained', 'tiny.py', '--work-dir', bad.parent / 'work')
    pkl = bad.with_suffix('.pkl')
    pkl.write_bytes(pickle.dumps(Evil(os.mkdir, str(bad.parent / TRACE))))
    config = bad.with_name('config.py')
    config.write_text(f'_base_ = {str(Path("tiny.py").resolve())!r}\nload_from = {str(bad)!r}\n')
    yaml = bad.with_name('base.yaml')
    yaml.write_text(f'work_dir: !!python/object/apply:os.mkdir [{str(bad.parent / TRACE)!r}]\n')
    child = bad.with_name('child.py')
    child.write_text(f'_base_ = [{str(Path("tiny.py").resolve())!r}, {str(yaml)!r}]\n')
    start = bad.with_name('start.py')
    start.write_text(
        f'_base_ = {str(Path("tiny.py").resolve())!r}\n'
        f"model = dict(backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', checkpoint={str(bad)!r})))\n"
    )
    image = next(IMAGE.glob('*'))
    code = 'weights-code'
    return [
        ((*train, '--resume', bad), code),
        ((*train, '--cfg-options', f'load_from={bad}'), code),
        ((*train, '--train', '--cfg-options', f'load_from={bad}', 'resume=True'), code),
        (('train_pretrained', config, '--check-weights'), code),
        (('train_pretrained', child, '--dry-run'), 'config-unreadable'),
        ((*train, '--weights', bad), code),
        ((*train, '--test', '--checkpoint', bad), code),
        (('train_pretrained', start, *train[2:]), code),
        ((*train, '--cfg-options', f'train_dataloader.dataset.proposal_file={pkl}'), 'pickle-refused'),
        (('evaluate', run, '--checkpoint', bad), code),
        (('predict', image, '--run', run, '--checkpoint', bad, '--out', bad.parent / 'out'), code),
        (('publish_weights', bad, bad.parent / 'mine'), code),
        (('convert_weights', bad, bad.parent / 'mine.pth'), code),
        (('convert_weights', pkl, bad.parent / 'mine.pth'), code),
    ]


def test_relations_of_open_images_are_not_unpickled(tmp_path):
    (tmp_path / 'labels.csv').write_text('/m/1,one,1\n')
    (tmp_path / 'boxes.txt').write_text('')
    relations = tmp_path / 'relations.npy'
    np.save(relations, np.array([[Evil(os.mkdir, str(tmp_path / TRACE))]]), allow_pickle=True)
    names = {'ann_file': 'boxes.txt', 'label_file': 'labels.csv', 'meta_file': 'meta.pkl', 'hierarchy_file': relations}
    paths = {key: str(tmp_path / name) for key, name in names.items()}
    with refused('pickle-refused'):
        DATASETS.build({'type': 'OpenImagesChallengeDataset', **paths})
    assert not (tmp_path / TRACE).exists()


def test_a_file_with_code_leaves_no_trace_whatever_reads_it(bad, in_finished_run):
    for (tool, *args), code in every_way_in(bad, in_finished_run.kept / 'tiny'):
        done = drive(tool, *args)
        assert (done.code, done.error) == (2, code), (tool, args, done.out[-500:], done.err)
        assert 'Traceback' not in done.err and not (bad.parent / TRACE).exists(), (tool, args)
        assert not (bad.parent / 'mine.pth').exists()


def test_code_in_the_best_checkpoint_of_a_run_of_others(bad, in_finished_run, tmp_path):
    run = Path(shutil.copytree(in_finished_run.kept / 'tiny', tmp_path / 'run'))
    [best] = run.glob('best_*.pth')
    shutil.copy(bad, best)
    os.utime(best, (time.time() + 9,) * 2)
    done = train_tool('tiny.py', '--resume', '--work-dir', run)
    assert (done.code, done.error) == (2, 'weights-code'), done.err
    assert not (tmp_path / TRACE).exists()


def test_a_damaged_best_checkpoint_of_a_run_is_replaced(in_finished_run, tmp_path):
    run = Path(shutil.copytree(in_finished_run.kept / 'tiny', tmp_path / 'run'))
    [best] = run.glob('best_*.pth')
    damage(best)
    done = train_tool('tiny.py', '--resume', '--train', '--work-dir', run, '--cfg-options', 'train_cfg.max_epochs=3')
    assert done.code == 0, done.err
    assert [path.name for path in run.glob('best_*.pth') if path.name != best.name] != []


def damage(path: Path) -> None:
    """Change a byte in the middle, which is one of a tensor."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_resume_takes_the_checkpoint_before_a_damaged_one(in_finished_run, tmp_path):
    run = Path(shutil.copytree(in_finished_run.kept / 'tiny', tmp_path / 'run'))
    damage(run / 'epoch_2.pth')
    done = train_tool('tiny.py', '--resume', '--train', '--work-dir', run)
    assert done.code == 0, done.err
    assert f'Resuming {run / "epoch_1.pth"}' in done.out and 'epoch_2.pth' in done.out
    again = train_tool('tiny.py', '--train', '--resume', '--work-dir', run)
    assert f'Resuming {run / "epoch_2.pth"}' in again.out


@pytest.mark.parametrize('option', ['--resume', '--weights', '--checkpoint'])
def test_a_damaged_file_is_refused_by_its_name(in_finished_run, tmp_path, option):
    file = Path(shutil.copy(in_finished_run.kept / 'tiny/epoch_2.pth', tmp_path))
    damage(file)
    more = ['--test'] if option == '--checkpoint' else []
    done = train_tool('tiny.py', option, file, *more, '--work-dir', tmp_path / 'work')
    assert (done.code, done.error) == (2, 'weights-crc') and str(file) in done.err
    assert not (tmp_path / 'work').exists()
