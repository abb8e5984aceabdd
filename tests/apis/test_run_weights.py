"""A weights file is verified, read and compared with the model once in a command, whatever the command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from mmfinetune.utils import files
from mmfinetune.weights import find, transfer
from tests.builders.runs import train_tool


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each file is hashed and read, by (what, name), and how many plans are made."""
    found: Counter = Counter()

    def counted(what: str, function, name=lambda path, *_: Path(path).name):
        def wrapper(*args, **kwargs):
            found[what, name(*args)] += 1
            return function(*args, **kwargs)

        return wrapper

    find._sha256.cache_clear()  # an earlier test may have verified the file
    monkeypatch.setattr(files, 'digest', counted('hash', files.digest))
    monkeypatch.setattr(torch, 'load', counted('read', torch.load))
    plan = counted('plan', transfer.plan_transfer, lambda target, source, *_: source.path.name)
    monkeypatch.setattr(transfer, 'plan_transfer', plan)
    return found


@pytest.fixture
def file(in_site: Path) -> Path:
    [file] = in_site.glob('pretrain/*.pth')
    return file.relative_to(in_site)


@pytest.mark.parametrize(
    'args',
    [
        ('--train', '--cfg-options', 'train_cfg.max_epochs=1'),
        ('--check-weights',),
        ('--check-weights', '--train', '--weights', '{file}', '--cfg-options', 'train_cfg.max_epochs=1'),
        ('--test', '--head-init', 'remap'),
    ],
    ids=['train', 'check', 'check and train', 'zero shot'],
)
def test_weights_are_hashed_read_and_planned_once(file, tmp_path, counts, args):
    outcome = train_tool('tiny.py', *(arg.format(file=file) for arg in args), '--work-dir', tmp_path / 'run')
    assert outcome.code == 0, outcome.err
    assert {what: n for (what, name), n in counts.items() if name == file.name} == {'hash': 1, 'read': 1, 'plan': 1}


def test_tested_checkpoint_is_hashed_read_and_planned_once(in_finished_run, tmp_path, counts):
    [file] = (in_finished_run.kept / 'tiny').glob('best_*.pth')
    outcome = train_tool('tiny.py', '--test', '--checkpoint', file, '--work-dir', tmp_path / 'run')
    assert outcome.code == 0, outcome.err
    assert {what: n for (what, name), n in counts.items() if name == file.name} == {'hash': 1, 'read': 1, 'plan': 1}
