"""The model starts from the given weights where no checkpoint is resumed or loaded, once and on all ranks alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS, RUNNERS
from mmengine.hooks import EMAHook
from mmengine.registry import VISBACKENDS
from mmengine.visualization import LocalVisBackend
from torch import nn

import mmfinetune.engine.runner as engine_runner
from mmfinetune.engine.hooks.pictures import TestPicturesHook
from mmfinetune.engine.runner import INITIAL_WEIGHTS, FineTuningRunner
from mmfinetune.utils import extras
from mmfinetune.utils.errors import Message
from mmfinetune.weights.check import WeightCheck
from mmfinetune.weights.transfer import plan_transfer
from tests.builders.errors import refused
from tests.builders.runs import forget_runs
from tests.builders.toy import DoAt, ToyModel, make_cfg
from tests.builders.weights import source_of

HEAD = 'layers.3'


@pytest.fixture
def start(tmp_path: Path) -> WeightCheck:
    """Weights full of 2 for the toy model, but its last layer, which is drawn."""
    target = ToyModel().state_dict()
    source = source_of({k: torch.full_like(v, 2) for k, v in target.items()}, sha256='ab' * 32)
    source.path = tmp_path / 'a.pth'
    source.path.touch()
    plan = plan_transfer(target, source, {'reinit': {HEAD: {'std': 0.01}}})
    assert not plan.problems
    return WeightCheck(source, plan, target, [])


@VISBACKENDS.register_module(force=True)
class LostServer(LocalVisBackend):
    def add_scalars(self, *args, **kwargs) -> None:
        raise ConnectionError('the server is gone')


class FailingPictures(TestPicturesHook):
    def after_test_iter(self, *args, **kwargs) -> None:
        next(iter(()))  # as a font that is not found once did


def build(work_dir: Path, start: WeightCheck | None, **changes) -> FineTuningRunner:
    forget_runs()
    runner = FineTuningRunner.from_cfg(make_cfg(work_dir, test_dataloader=None, train_cfg={'max_epochs': 1}, **changes))
    runner.start = start
    return runner


def started(runner: FineTuningRunner) -> dict[str, torch.Tensor]:
    """Train; the model as it was before the first step."""
    found = {}
    runner.register_hook(
        DoAt(lambda r: found.update({k: v.clone() for k, v in r.model.state_dict().items()}), 0, 'before_train_iter')
    )
    runner.train()
    return found


def is_transferred(state: dict[str, torch.Tensor]) -> bool:
    return bool((state['layers.0.weight'] == 2).all())


def test_runner_is_registered():
    assert RUNNERS.get('FineTuningRunner') is FineTuningRunner


def test_training_begins_from_the_weights(tmp_path, start):
    runner = build(tmp_path, start)
    state = started(runner)
    assert is_transferred(state)
    assert not state[f'{HEAD}.bias'].any() and 0 < state[f'{HEAD}.weight'].abs().max() < 0.1
    assert runner.start is None  # and with it the tensors of the file
    assert f'{HEAD}.{{weight,bias}}' in runner.weights_report
    assert runner.message_hub.get_info(INITIAL_WEIGHTS) == start.facts()


def test_drawn_layers_depend_on_the_seed_of_the_run_alone(tmp_path, start):
    heads = []
    for number, seed in enumerate((3, 3, 4)):
        runner = build(tmp_path / str(number), start, randomness={'seed': seed})
        torch.rand(number)
        runner.load_or_resume()
        heads.append(runner.model.layers[3].weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_all_ranks_take_the_seed_of_the_first(tmp_path, start, monkeypatch):
    heads = []
    for number, seed in enumerate((3, 4)):
        runner = build(tmp_path / str(number), start, randomness={'seed': seed})
        monkeypatch.setattr(engine_runner, 'broadcast_object_list', lambda data: data.__setitem__(0, 11))
        runner.load_or_resume()
        heads.append(runner.model.layers[3].weight.detach().clone())
    assert torch.equal(*heads)


def test_weights_are_applied_once_only(tmp_path, start):
    # The test after the training must not bring the start back.
    runner = build(tmp_path, start)
    runner.load_or_resume()
    with torch.no_grad():
        for parameter in runner.model.parameters():
            parameter.fill_(5)
    runner.load_or_resume()
    assert all((p == 5).all() for p in runner.model.parameters())


def test_parameters_stay_the_same_objects(tmp_path, start):
    runner = build(tmp_path, start)
    before = [id(p) for p in runner.model.parameters()]
    runner.load_or_resume()
    assert [id(p) for p in runner.model.parameters()] == before
    assert all(p.requires_grad for p in runner.model.parameters())


@pytest.mark.parametrize('resume', [True, False])
def test_a_checkpoint_wins(tmp_path, start, resume):
    first = build(tmp_path, None)
    first.train()
    runner = build(tmp_path, start, resume=resume, load_from=str(tmp_path / 'epoch_1.pth'))
    if resume:
        runner.train()
    else:
        runner.load_or_resume()
    assert not is_transferred(runner.model.state_dict())
    assert runner.weights_report == ''


def test_without_weights_it_is_mmengines_runner(tmp_path):
    runner = build(tmp_path, None)
    assert not is_transferred(started(runner))
    assert runner.weights_report == '' and INITIAL_WEIGHTS not in runner.message_hub.runtime_info


def test_resumed_run_still_knows_its_weights(tmp_path, start):
    build(tmp_path, start).train()
    runner = build(tmp_path, None, resume=True, load_from=str(tmp_path / 'epoch_1.pth'))
    runner.train()
    assert runner.message_hub.get_info(INITIAL_WEIGHTS) == start.facts()


@pytest.mark.parametrize('begin', [0, 3])
def test_ema_starts_from_the_weights(tmp_path, start, begin):
    runner = build(tmp_path, start)
    hook = EMAHook(begin_iter=begin)
    runner.register_hook(hook)
    averaged: list[nn.Module] = []
    runner.register_hook(
        DoAt(lambda _: averaged.append(hook.ema_model.module.layers[0].weight.clone()), 0, 'before_train_iter')
    )
    runner.train()
    assert (averaged[0] == 2).all()


def test_what_only_shows_a_run_never_ends_it(tmp_path, monkeypatch):
    forget_runs()
    cfg = make_cfg(
        tmp_path,
        train_cfg={'max_epochs': 1},
        visualizer=dict(type='Visualizer', name='lost', vis_backends=[dict(type='LostServer', save_dir=str(tmp_path))]),
    )
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, dict(type='TestLoop')
    runner = FineTuningRunner.from_cfg(cfg)
    runner.register_hook(FailingPictures())
    monkeypatch.delenv(extras.STRICT)
    said: list[Message] = []
    monkeypatch.setattr(extras, 'warn', said.append)
    runner.train()
    assert runner.epoch == 1 and (tmp_path / 'epoch_1.pth').is_file()
    assert {m.facts['what'] for m in said} == {'LoggerHook.after_train_iter', 'LoggerHook.after_val_epoch'}
    assert {str(m.facts['why']) for m in said} == {'the server is gone'}
    said.clear()
    assert runner.test()
    assert {m.facts['what'] for m in said} == {'FailingPictures.after_test_iter'}
    # What decides on the run is not among them.
    runner.register_hook(DoAt(lambda _: 1 / 0, point='before_test'))
    with pytest.raises(ZeroDivisionError):
        runner.test()


@MODELS.register_module(force=True)
class OddLoss(ToyModel):
    def forward(self, *args, **kwargs):
        raise ValueError('this never works')


def test_what_the_first_step_refuses_is_a_setting(tmp_path):
    with refused('config-cannot-build') as found:
        build(tmp_path, None, model={'type': 'OddLoss'}).train()
    assert 'this never works' in str(found.value)


def test_what_a_later_step_raises_is_no_setting(tmp_path):
    def fail(runner):
        raise ValueError('a fault of the code')

    runner = build(tmp_path, None)
    runner.register_hook(DoAt(fail, 1, 'before_train_iter'))
    with pytest.raises(ValueError, match='a fault of the code'):
        runner.train()
