"""Guards of a run: losses and gradients that are not finite."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from torch import nn

from mmfinetune.engine.hooks import nonfinite
from mmfinetune.engine.hooks.nonfinite import BAD_BATCH, NonFiniteHook
from mmfinetune.utils.errors import Message
from tests.builders.errors import refused
from tests.builders.runs import inside, make_site, train_tool, write_tiny_config

NAN, INF = math.nan, math.inf


class Toy(BaseModel):
    """Two losses, one of them a list, behind a BN. ``extra`` is added to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 1)

    def forward(self, inputs, data_samples=None, mode='tensor', extra=0.0, detached=0.0):
        out = self.head(self.norm(inputs))
        root = torch.sqrt(self.head.bias.clamp(max=0) * 0).sum() if extra == 'root' else extra
        return {
            'loss_a': out.square().mean() + root + torch.as_tensor(detached),
            'loss_b': [out.abs().mean(), out.mean()],
            'acc': torch.tensor(NAN),
        }


def batch_of(number: int, value: float | None = None, **extra) -> dict:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(4, 2, generator=generator)
    if value is not None:
        inputs[0, 0] = value
    samples = [DetDataSample(metainfo={'img_id': 10 * number + i, 'img_path': f'{number}_{i}.jpg'}) for i in range(2)]
    return {'inputs': inputs, 'data_samples': samples, **extra}


class Run:
    """The part of a run that the hook sees."""

    def __init__(self, folder: Path, accumulation: int = 1, wrapper: Callable = OptimWrapper, **options) -> None:
        torch.manual_seed(0)
        self.model = Toy().train()
        optimizer = torch.optim.SGD(
            [
                {'params': self.model.norm.parameters(), 'name': 'norm'},
                {'params': self.model.head.parameters(), 'name': 'head'},
            ],
            lr=0.1,
            momentum=0.9,
        )
        self.optim_wrapper = wrapper(optimizer, accumulative_counts=accumulation)
        self.hook = NonFiniteHook(**options)
        self.message_hub = MessageHub(f'run_{id(self)}')
        self.work_dir, self.iter, self.epoch = str(folder), 0, 0
        self.hook.before_train(self)

    def step(self, batch: dict) -> dict:
        self.hook.before_train_iter(self, self.iter, batch)
        outputs = self.model.train_step(batch, self.optim_wrapper)
        self.hook.after_train_iter(self, self.iter, batch, outputs)
        self.iter += 1
        return outputs

    def state(self) -> dict:
        return copy.deepcopy(
            {'model': self.model.state_dict(), 'optimizer': self.optim_wrapper.optimizer.state_dict()['state']}
        )


def assert_same(first, second) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_same_weights(first: dict, second: dict) -> None:
    for name in ('head.weight', 'head.bias', 'norm.weight', 'norm.bias'):
        assert_same(first['model'][name], second['model'][name])
    assert_same(first['optimizer'], second['optimizer'])


# Stop


LOSS, GRADIENT, ANY_SCALE = 'nonfinite-loss', 'nonfinite-gradient', 'nonfinite-at-any-scale'


def loss(terms: str) -> Message:
    return Message(LOSS, '', terms=terms)


HEAD = Message(GRADIENT, '', groups='head')


@pytest.mark.parametrize(
    ('bad', 'what'),
    [
        ({'extra': NAN}, loss('loss_a = nan')),
        ({'extra': INF}, loss('loss_a = inf')),
        ({'value': NAN}, loss('loss_a = nan, loss_b = nan')),
        # Nothing of it reaches the gradient by itself.
        ({'detached': NAN}, loss('loss_a = nan')),
        # The derivative of the root at 0.
        ({'extra': 'root'}, HEAD),
    ],
)
def test_a_step_that_is_not_finite_stops_the_run_before_the_weights_change(tmp_path, bad, what):
    run = Run(tmp_path)
    run.step(batch_of(1))
    before = run.state()
    with refused('nonfinite-step', step=2, epoch=1, what=what, path=tmp_path / BAD_BATCH) as caught:
        run.step(batch_of(2, **bad))
    assert_same_weights(run.state(), before)
    assert caught.value.problems == ['2_0.jpg', '2_1.jpg']
    assert 'nan_policy=skip' in caught.value.hint and 'learning rate' in caught.value.hint
    note = json.loads((tmp_path / BAD_BATCH).read_text())
    assert [image['img_id'] for image in note['images']] == [20, 21]
    assert (note['step'], note['lr']) == (2, {'norm': 0.1, 'head': 0.1})
    assert note['what'] == str(caught.value.facts['what'])
    if what.code == LOSS:
        assert set(note['bad_losses'][0]['losses']) == {'loss_a', 'loss_b'}


def test_good_steps_are_left_alone(tmp_path):
    guarded = Run(tmp_path)
    plain = Run(tmp_path)
    plain.hook.after_train(plain)
    outputs = [guarded.step(batch_of(i)) for i in range(3)]
    for i in range(3):
        plain.model.train_step(batch_of(i), plain.optim_wrapper)
    assert_same(guarded.state(), plain.state())
    # What is no loss may be NaN.
    assert all(math.isfinite(o['loss']) and math.isnan(o['acc']) for o in outputs)
    assert not list(tmp_path.iterdir())


def test_nothing_is_watched_after_training(tmp_path):
    run = Run(tmp_path)
    run.hook.after_train(run)
    assert type(run.optim_wrapper) is OptimWrapper
    run.model.train_step(batch_of(1, NAN), run.optim_wrapper)
    assert not list(tmp_path.iterdir())


def test_unknown_policy():
    with refused('nonfinite-policy', policy='ignore'):
        NonFiniteHook(nan_policy='ignore')


def test_several_optimizers_are_not_guarded():
    wrapper = OptimWrapperDict(a=OptimWrapper(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)))
    with refused('nonfinite-many-optimizers'):
        NonFiniteHook().before_train(SimpleNamespace(optim_wrapper=wrapper))


# Skip


@pytest.mark.parametrize('bad', [{'extra': NAN}, {'value': NAN}, {'extra': 'root'}])
def test_a_skipped_step_leaves_everything_as_if_it_had_not_been(tmp_path, bad, monkeypatch):
    said: list[Message] = []
    monkeypatch.setattr(nonfinite, 'warn', said.append)
    run, without = (Run(tmp_path, nan_policy='skip') for _ in range(2))
    for number in range(4):
        outputs = run.step(batch_of(number, **(bad if number == 2 else {})))
        assert (outputs == {}) is (number == 2 and 'root' not in bad.values())
        if number != 2:
            without.step(batch_of(number))
    # BN statistics and momentum too.
    assert_same(run.state(), without.state())
    assert not any(torch.isnan(v).any() for v in run.state()['model'].values())
    assert json.loads((tmp_path / BAD_BATCH).read_text())['step'] == 3
    assert [(message.code, message.facts['step']) for message in said] == [('nonfinite-skipped', 3)]


def test_a_skipped_loss_does_not_count_in_means(tmp_path):
    run = Run(tmp_path, nan_policy='skip')
    for number in range(3):
        for name, value in run.step(batch_of(number, extra=NAN if number == 1 else 0.0)).items():
            run.message_hub.update_scalar(f'train/{name}', value)  # as RuntimeInfoHook does
    history = run.message_hub.get_scalar('train/loss')
    values, counts = history.data
    assert counts.tolist() == [1, 0, 1]
    # An entry for each step, so that a window of steps reaches no further back.
    assert history.mean(2) == values[2] and history.mean(3) == (values[0] + values[2]) / 2


def test_so_many_skips_in_a_row_stop(tmp_path):
    run = Run(tmp_path, nan_policy='skip', max_skips=3)
    for value in (NAN, NAN, None, NAN, NAN):
        run.step(batch_of(1, value))
    before = run.state()
    with refused('nonfinite-skips', skips=3) as caught:
        run.step(batch_of(1, NAN))
    assert_same_weights(run.state(), before)
    assert 'nan_policy' not in caught.value.hint


# Accumulation


def test_with_accumulation_the_bad_step_among_several_is_named(tmp_path):
    run = Run(tmp_path, accumulation=3)
    before = run.state()
    run.step(batch_of(1))
    run.step(batch_of(2, NAN))
    with refused('nonfinite-step', step=3, what=loss('loss_a = nan, loss_b = nan')) as caught:
        run.step(batch_of(3))
    assert caught.value.problems == ['2_0.jpg', '2_1.jpg']
    assert_same_weights(run.state(), before)
    assert json.loads((tmp_path / BAD_BATCH).read_text())['bad_losses'][0]['step'] == 2


def test_with_accumulation_all_steps_of_an_update_are_suspects(tmp_path):
    run = Run(tmp_path, accumulation=2)
    for number in (1, 2, 3):
        run.step(batch_of(number))
    with refused('nonfinite-step', what=HEAD) as caught:
        run.step(batch_of(4, extra='root'))
    assert caught.value.problems == ['3_0.jpg', '3_1.jpg', '4_0.jpg', '4_1.jpg']


def test_with_accumulation_the_whole_update_is_skipped(tmp_path):
    run, without = (Run(tmp_path, accumulation=2, nan_policy='skip') for _ in range(2))
    for number in range(6):
        run.step(batch_of(number, NAN if number == 2 else None))
        if number not in (2, 3):
            without.step(batch_of(number))
    assert_same(run.state(), without.state())


# A gradient scaler


def scaling(optimizer: torch.optim.Optimizer, init_scale: float = 1024.0, **options) -> AmpOptimWrapper:
    """MMEngine's wrapper for mixed precision, which asks for a GPU, with a scaler for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
        wrapper = AmpOptimWrapper(optimizer=optimizer, loss_scale={'enabled': False}, **options)
    wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=init_scale)
    return wrapper


def test_a_scale_that_is_too_high_is_left_to_the_scaler(tmp_path):
    run = Run(tmp_path, wrapper=scaling)
    for _ in range(3):
        before = run.state()
        for _ in range(19):
            run.step(batch_of(1, extra='root'))
        assert_same_weights(run.state(), before)
        run.step(batch_of(2))
    assert run.optim_wrapper.loss_scaler.get_scale() < 1e-10
    assert not list(tmp_path.iterdir())


def sgd(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9, **options)


@pytest.mark.parametrize('accumulation', [1, 2])
@pytest.mark.parametrize('clip', [None, {'max_norm': 0.5}])
@pytest.mark.parametrize('kind', [sgd, torch.optim.Adam, torch.optim.AdamW])
def test_an_overflow_under_a_fused_optimizer_is_a_step_left_out(tmp_path, kind, clip, accumulation):
    runs = []
    for fused in (False, True):
        run = Run(tmp_path, wrapper=partial(scaling, clip_grad=clip), accumulation=accumulation)
        run.optim_wrapper.optimizer = kind(run.model.parameters(), lr=0.1, fused=fused)
        runs.append(run)
        for _ in range(accumulation):
            run.step(batch_of(1, extra='root'))
        before = run.state()
        assert not any(state for state in before['optimizer'].values())
        assert run.optim_wrapper.loss_scaler.get_scale() == 512
        for number in range(2 * accumulation):
            run.step(batch_of(number))
        assert not torch.equal(run.model.head.weight, before['model']['head.weight'])
    plain, fused = (run.state()['model'] for run in runs)
    torch.testing.assert_close(plain, fused)


def test_a_fixed_scale_stays_at_an_overflow(tmp_path):
    run = Run(tmp_path, wrapper=scaling)
    run.optim_wrapper._scale_update_param = 1024.0
    run.step(batch_of(1, extra='root'))
    assert run.optim_wrapper.loss_scaler.get_scale() == 1024


def test_no_scale_helps(tmp_path):
    run = Run(tmp_path, wrapper=scaling, nan_policy='skip', max_skips=99)
    for _ in range(19):
        run.step(batch_of(1, extra='root'))
    with refused('nonfinite-skips', what=Message(ANY_SCALE, '', times=20)):
        run.step(batch_of(1, extra='root'))


def test_a_loss_that_is_not_finite_is_not_left_to_the_scaler(tmp_path):
    run = Run(tmp_path, wrapper=scaling)
    with refused('nonfinite-step', what=loss('loss_a = nan, loss_b = nan')):
        run.step(batch_of(1, NAN))
    run = Run(tmp_path, wrapper=scaling, nan_policy='skip')
    before = run.state()
    run.step(batch_of(1, NAN))
    assert_same(run.state(), before)


def test_the_norm_of_scaled_gradients_may_overflow(tmp_path):
    run = Run(tmp_path, wrapper=partial(scaling, init_scale=2.0**100))
    before = run.model.head.weight.detach().clone()
    run.step(batch_of(1))
    assert not torch.equal(run.model.head.weight, before)
    assert run.optim_wrapper.grad_norm is None and run.optim_wrapper.refused is None


# In real runs


@HOOKS.register_module(force=True)
class PoisonHook(Hook):
    """Makes the first image of a step NaN."""

    def __init__(self, step: int = 2) -> None:
        self.step = step

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter == self.step:
            data_batch['inputs'][0] = torch.full_like(data_batch['inputs'][0].float(), NAN)


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('site')
    weights = make_site(folder)
    write_tiny_config(
        folder / 'poisoned.py', weights=weights, extra="default_hooks.update(poison=dict(type='PoisonHook'))\n"
    )
    return folder


def read(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def test_a_run_stops_at_a_poisoned_batch(site):
    with inside(site):
        outcome = train_tool('poisoned.py', '--train', '--work-dir', 'stop')
        assert outcome.code == 2
        assert outcome.error == 'nonfinite-step'
        assert 'loss_mask = nan' in outcome.err and outcome.err.count('.jpg') == 4
        assert 'Traceback' not in outcome.err
        note = json.loads(Path('stop', BAD_BATCH).read_text())
        assert (note['step'], note['epoch'], len(note['images'])) == (3, 2, 4)
        # The epoch before is whole.
        assert all(torch.isfinite(v).all() for v in read('stop/epoch_1.pth')['state_dict'].values())
        assert not Path('stop/epoch_2.pth').exists()
        # What the message proposes works.
        resumed = train_tool(
            'poisoned.py',
            '--train',
            '--work-dir',
            'stop',
            '--resume',
            '--cfg-options',
            'default_hooks.nonfinite.nan_policy=skip',
        )
        assert resumed.code == 0, resumed.err
        state = read('stop/epoch_2.pth')
    assert state['meta']['iter'] == 4
    # The demo's BN is trained, so that its statistics would be NaN.
    assert all(torch.isfinite(v).all() for v in state['state_dict'].values())
    losses, counts = state['message_hub']['log_scalars']['train/loss'].data
    assert counts.tolist() == [1, 1, 0, 1] and all(map(math.isfinite, losses))


def test_early_stopping_goes_on_counting_after_a_resume(site):
    options = (
        'tiny.py',
        '--train',
        '--cfg-options',
        'default_hooks.early_stop.type=EarlyStopHook',
        'default_hooks.early_stop.patience=1',
        'default_hooks.early_stop.min_delta=1.0',
        'train_cfg.max_epochs=6',
        '--work-dir',
    )
    with inside(site):
        assert train_tool(*options, 'early').code == 0
        assert sorted(p.name for p in Path('early').glob('epoch_*.pth')) == ['epoch_1.pth', 'epoch_2.pth']
        # A hook that forgot the score of epoch 1 would take that of epoch 2 for the first.
        resumed = train_tool(*options, 'early2', '--resume', 'early/epoch_1.pth')
        assert resumed.code == 0, resumed.err
        assert [p.name for p in Path('early2').glob('epoch_*.pth')] == ['epoch_2.pth']
