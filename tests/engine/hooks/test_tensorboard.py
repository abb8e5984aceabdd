from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EMAHook, IterTimerHook, LoggerHook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.priority import get_priority
from torch import nn

from mmfinetune.engine import board
from mmfinetune.engine.hooks import learning_rate, tensorboard
from mmfinetune.engine.hooks import weights as engine_hooks_weights
from mmfinetune.engine.vis_backends import BoardBackend, board_of, validation_step
from mmfinetune.utils.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 3)


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    return model


def showing(*backends: object) -> SimpleNamespace:
    """A visualizer with these backends."""
    return SimpleNamespace(_vis_backends={str(i): b for i, b in enumerate(backends)})


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What lies in a folder's event files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob('events*')):
        for event in board.read_events(path):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


@pytest.fixture
def runner(tmp_path: Path) -> SimpleNamespace:
    """What WeightTransferHook reads of a Runner; model full of 1, file full of 2."""
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': fill(Net(), 2.0).state_dict()}, path)
    weights = {'checkpoint': str(path), 'url': None, 'reinit': {'head': {'std': 0.01}}}
    return SimpleNamespace(
        cfg={'weights': weights}, model=fill(Net(), 1.0), seed=0, _resume=False, _load_from=None, visualizer=showing()
    )


def is_transferred(model: Net) -> bool:
    return bool((model.body.weight == 2).all())


def is_untouched(model: Net) -> bool:
    return all(bool((p == 1).all()) for p in model.parameters())


@pytest.mark.parametrize('point', ['before_train', 'before_val', 'before_test'])
def test_weights_are_transferred_at_the_first_point(runner, point):
    getattr(engine_hooks_weights.WeightTransferHook(), point)(runner)
    assert is_transferred(runner.model)
    assert torch.count_nonzero(runner.model.head.bias) == 0
    assert 0 < runner.model.head.weight.abs().max() < 0.1


def test_weights_are_transferred_once_only(runner):
    # The validation after an epoch must not bring the start back.
    hook = engine_hooks_weights.WeightTransferHook()
    hook.before_train(runner)
    fill(runner.model, 5.0)
    for point in (hook.before_val, hook.before_test, hook.before_train):
        point(runner)
    assert all((p == 5).all() for p in runner.model.parameters())


@pytest.mark.parametrize(('resume', 'load_from'), [(True, None), (False, 'b.pth'), (True, 'b.pth')])
def test_nothing_happens_where_a_checkpoint_is_loaded(runner, resume, load_from):
    runner._resume, runner._load_from = resume, load_from
    hook = engine_hooks_weights.WeightTransferHook()
    for point in (hook.before_train, hook.before_val, hook.before_test):
        point(runner)
    assert is_untouched(runner.model)


@pytest.mark.parametrize('cfg', [{}, {'weights': None}])
def test_nothing_happens_without_weights(runner, cfg):
    runner.cfg = cfg
    engine_hooks_weights.WeightTransferHook().before_train(runner)
    assert is_untouched(runner.model)


def test_config_is_left_as_it_is(runner):
    before = dict(runner.cfg['weights'])
    engine_hooks_weights.WeightTransferHook().before_train(runner)
    assert runner.cfg['weights'] == before


def test_head_depends_on_the_seed_of_the_run(runner):
    heads = []
    for seed in (0, 0, 1):
        runner.seed = seed
        engine_hooks_weights.WeightTransferHook().before_train(runner)
        heads.append(runner.model.head.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_weights_that_do_not_fit_stop_the_run(runner):
    runner.model.body = nn.Linear(3, 2)
    with pytest.raises(UserError, match='does not fit the model'):
        engine_hooks_weights.WeightTransferHook().before_train(runner)


def test_report_on_the_weights_goes_to_the_board(runner, tmp_path):
    backend = BoardBackend(str(tmp_path / 'logs'))
    runner.visualizer = showing(backend)
    hook = engine_hooks_weights.WeightTransferHook()
    hook.before_train(runner)
    hook.before_train(runner)
    backend.close()
    assert written(tmp_path / 'logs')['weights/text_summary'] == [(0, 0)]
    event = [
        e
        for path in (tmp_path / 'logs').iterdir()
        for e in board.read_events(path)
        if e.summary.value and e.summary.value[0].tag.startswith('weights')
    ][0]
    text = event.summary.value[0].tensor.string_val[0].decode()
    assert 'body' in text and 'drawn anew: head.weight, head.bias' in text


@pytest.mark.parametrize('change', [{'_resume': True}, {'_load_from': 'b.pth'}, {'cfg': {'weights': None}}])
def test_no_report_where_nothing_is_transferred(runner, tmp_path, change):
    runner.visualizer = showing(BoardBackend(str(tmp_path / 'logs')))
    vars(runner).update(change)
    engine_hooks_weights.WeightTransferHook().before_train(runner)
    assert not (tmp_path / 'logs').exists()


@pytest.mark.parametrize('point', ['before_val', 'before_test'])
def test_test_of_the_start_opens_no_board(runner, tmp_path, point):
    # Its file would be taken for an earlier run, to be moved out of the way of the training.
    runner.visualizer = showing(BoardBackend(str(tmp_path / 'logs')))
    getattr(engine_hooks_weights.WeightTransferHook(), point)(runner)
    assert is_transferred(runner.model)
    assert not (tmp_path / 'logs').exists()


def test_transfer_comes_before_the_other_hooks():
    # EMA copies the model before training, so it must find the weights there.
    ours = get_priority(engine_hooks_weights.WeightTransferHook.priority)
    assert all(ours < get_priority(hook.priority) for hook in (EMAHook, CheckpointHook))


def test_lr_of_each_group_is_a_scalar():
    params = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [
            {'params': [params[0]], 'lr': 0.1, 'name': 'backbone'},
            {'params': [params[1]], 'lr': 0.2, 'name': 'roi_head'},
            {'params': [params[2]], 'lr': 0.3},
        ]
    )
    hub = MessageHub('test_lr_of_each_group_is_a_scalar')
    runner = SimpleNamespace(optim_wrapper=OptimWrapper(optimizer), message_hub=hub)
    hook = learning_rate.GroupLrHook()
    hook.before_train_iter(runner, 0)
    optimizer.param_groups[0]['lr'] = 0.05
    hook.before_train_iter(runner, 1)
    history = {k: v.data[0].tolist() for k, v in hub.log_scalars.items()}
    assert history == {'train/lr/backbone': [0.1, 0.05], 'train/lr/roi_head': [0.2, 0.2], 'train/lr/group2': [0.3, 0.3]}


# ---- Gradient norm --------------------------------------------------------------------------


def gradient_run(
    wrapper: OptimWrapper, model: nn.Module, hub: MessageHub, inputs: Sequence[float] = (1, 2, 3, 4), hook: bool = True
) -> list[float]:
    """Train one step for each input; the norms that were logged."""
    runner = SimpleNamespace(optim_wrapper=wrapper, message_hub=hub)
    norm_hook = tensorboard.GradNormHook()
    if hook:
        norm_hook.before_train(runner)
    wrapper.message_hub = hub
    wrapper.initialize_count_status(model, 0, len(inputs))
    for value in inputs:
        with wrapper.optim_context(model):
            loss = model(torch.full((1, 2), float(value))).sum()
        wrapper.update_params(loss)
    norm_hook.after_train(runner)
    buffer = hub.log_scalars.get('train/grad_norm')
    return [] if buffer is None else buffer.data[0].tolist()


def linear() -> nn.Linear:
    return fill(nn.Linear(2, 1), 0.5)


def norm_of(value: float) -> float:
    """Of the gradient of w x + b where both inputs are this: (value, value, 1)."""
    return (2 * value**2 + 1) ** 0.5


@pytest.fixture
def hub(request) -> MessageHub:
    return MessageHub(request.node.name)


def test_gradient_norm_of_each_step(hub):
    model = linear()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    assert gradient_run(wrapper, model, hub) == pytest.approx([norm_of(i) for i in (1, 2, 3, 4)])


def test_gradient_norm_counts_all_groups_but_what_is_frozen(hub):
    model = nn.Sequential(linear(), fill(nn.Linear(1, 1), 2.0), fill(nn.Linear(1, 1), 3.0))
    model[2].requires_grad_(False)
    wrapper = OptimWrapper(
        torch.optim.SGD([{'params': model[0].parameters()}, {'params': model[1].parameters()}], lr=0.0)
    )
    # d/dw2 = 3 (x . w1 + b1) = 3 * 1.5, d/db2 = 3, and 6 times the gradient of the first layer.
    expected = (36 * 3 + (3 * 1.5) ** 2 + 9) ** 0.5
    assert gradient_run(wrapper, model, hub, [1]) == pytest.approx([expected])


def test_gradient_norm_of_an_accumulation_is_that_of_its_sum(hub):
    model = linear()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2)
    # Each loss counts half: the mean of the inputs 1 and 2, and of 3 and 4.
    assert gradient_run(wrapper, model, hub) == pytest.approx([norm_of(1.5), norm_of(3.5)])


class ScaledWrapper(OptimWrapper):
    """What AmpOptimWrapper does with its GradScaler; that one refuses to work without a GPU."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)

    def backward(self, loss, **kwargs) -> None:
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs) -> None:
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()


@pytest.mark.parametrize('fused', [False, True])
def test_gradient_norm_is_without_the_loss_scale(hub, fused):
    model = linear()
    wrapper = ScaledWrapper(torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused))
    assert gradient_run(wrapper, model, hub) == pytest.approx([norm_of(i) for i in (1, 2, 3, 4)])


@pytest.mark.parametrize('fused', [False, True])
def test_step_that_overflows_has_no_gradient_norm(hub, fused):
    model = linear()
    wrapper = ScaledWrapper(torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused))
    assert gradient_run(wrapper, model, hub, [1e37, 2]) == pytest.approx([norm_of(2)])


def test_clipping_by_norm_logs_once(hub):
    norms = []
    for hook in (False, True):
        hub.log_scalars.clear()
        model = linear()
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), clip_grad={'max_norm': 1.0})
        norms.append(gradient_run(wrapper, model, hub, hook=hook))
    assert norms[0] == norms[1] == pytest.approx([norm_of(i) for i in (1, 2, 3, 4)])


def test_clipping_by_value_has_a_norm_too(hub):
    model = linear()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), clip_grad={'type': 'value', 'clip_value': 1.0})
    assert gradient_run(wrapper, model, hub) == pytest.approx([3**0.5] * 4)


def test_gradient_norm_leaves_the_training_as_it_is(hub):
    weights = []
    for hook in (False, True):
        model = linear()
        wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.1))
        gradient_run(wrapper, model, hub, hook=hook)
        weights.append(model.weight.detach().clone())
        assert not wrapper.optimizer._optimizer_step_pre_hooks
    assert torch.equal(*weights)


def test_several_optimizers_have_no_gradient_norm(hub):
    model = linear()
    wrapper = OptimWrapperDict(a=OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)))
    hook = tensorboard.GradNormHook()
    hook.before_train(SimpleNamespace(optim_wrapper=wrapper, message_hub=hub))
    hook.after_train(None)
    assert not wrapper['a'].optimizer._optimizer_step_pre_hooks


# ---- The board ------------------------------------------------------------------------------


class EpochLoop(EpochBasedTrainLoop):
    def __init__(self) -> None:
        self._epoch, self._iter = 1, 5


class IterLoop(IterBasedTrainLoop):
    def __init__(self) -> None:
        self._epoch, self._iter = 0, 5


@pytest.fixture
def training(tmp_path: Path, hub: MessageHub) -> SimpleNamespace:
    """What BoardHook reads of a Runner, at the end of the second epoch of three steps."""
    cfg = Config(
        {
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.1}},
            'train_cfg': {'max_epochs': 3},
            'train_dataloader': {'batch_size': 2},
        }
    )
    for loss in (9.0, 9.0, 9.0, 1.0, 2.0, 6.0):
        hub.update_scalar('train/loss', loss)
    loop = EpochLoop()
    return SimpleNamespace(
        cfg=cfg,
        world_size=1,
        seed=0,
        _resume=False,
        message_hub=hub,
        epoch=1,
        iter=5,
        hooks=[],
        train_loop=loop,
        _train_loop=loop,
        train_dataloader=[0] * 3,
        visualizer=showing(BoardBackend(str(tmp_path / 'logs'))),
    )


def test_hours_that_are_left(training):
    hook = tensorboard.BoardHook()
    hook.after_train_iter(training, 0)  # without IterTimerHook there is no estimate
    assert 'train/eta_hours' not in training.message_hub.log_scalars
    training.message_hub.update_info('eta', 5400.0)
    hook.after_train_iter(training, 1)
    assert training.message_hub.get_scalar('train/eta_hours').current() == 1.5


def test_hours_come_between_the_timer_and_the_logger():
    ours = get_priority(tensorboard.BoardHook.priority)
    # Of the same priority, custom hooks come after the default ones.
    assert get_priority(IterTimerHook.priority) <= ours < get_priority(LoggerHook.priority)
    assert ours < get_priority(CheckpointHook.priority)


def test_loss_of_an_epoch_is_the_mean_of_its_steps(training, tmp_path):
    tensorboard.BoardHook().after_train_epoch(training)
    assert written(tmp_path / 'logs')['loss/train_epoch'] == [(2, 3.0)]


def test_training_by_iterations_has_no_loss_of_an_epoch(training, tmp_path):
    training.train_loop = IterLoop()
    tensorboard.BoardHook().after_train_epoch(training)
    assert not (tmp_path / 'logs').exists()


def test_hyperparameters_and_end_of_the_run(training, tmp_path):
    hook = tensorboard.BoardHook()
    hook.before_train(training)
    board_of(training).experiment.flush()
    assert '_hparams_/session_end_info' not in written(tmp_path / 'logs')
    hook.after_train(training)
    board_of(training).close()
    assert {'_hparams_/experiment', '_hparams_/session_start_info', '_hparams_/session_end_info'} <= set(
        written(tmp_path / 'logs')
    )


def test_without_a_board_there_is_nothing_to_do(training, tmp_path):
    for training.visualizer in (showing(), showing(object())):
        hook = tensorboard.BoardHook()
        hook.before_train(training)
        hook.after_train_epoch(training)
        hook.after_train(training)
    assert not (tmp_path / 'logs').exists()


def test_only_the_first_process_has_a_board(training, monkeypatch):
    monkeypatch.setattr('mmfinetune.engine.vis_backends.is_main_process', lambda: False)
    assert board_of(training) is None


@pytest.mark.parametrize(('by_epoch', 'expected'), [(True, 1), (False, 5), (None, 1)])
def test_step_of_a_validation_is_that_of_the_logger(training, by_epoch, expected):
    if by_epoch is not None:
        training.hooks = [IterTimerHook(), LoggerHook(log_metric_by_epoch=by_epoch)]
    assert validation_step(training) == expected


@pytest.mark.parametrize('loop', [None, {'type': 'EpochBasedTrainLoop'}])
def test_validation_without_training_is_at_zero(training, loop):
    training._train_loop = loop
    assert validation_step(training) == 0


@pytest.mark.parametrize(('by_epoch', 'left'), [(True, [1]), (False, [1, 3, 5])])
def test_resuming_cuts_by_the_axis_of_the_validations(training, tmp_path, by_epoch, left):
    backend = board_of(training)
    for step in (1, 3, 5, 7):
        backend.add_scalars({'loss': 0.0, 'iter': step}, step)
        backend.add_scalars({'coco/segm_mAP': 0.5}, step)
    training.hooks = [LoggerHook(log_metric_by_epoch=by_epoch)]
    training._resume = True
    tensorboard.BoardHook().before_train(training)
    backend.close()
    found = written(tmp_path / 'logs')
    assert [step for step, _ in found['loss/train']] == [1, 3, 5]
    assert [step for step, _ in found['mAP/segm']] == left


def test_config_uses_these_hooks(voc_cfg):
    used = [hook['type'] for hook in voc_cfg.custom_hooks]
    assert {'WeightTransferHook', 'GroupLrHook'} <= set(used)
    assert voc_cfg.default_hooks.visualization.type == 'TestPicturesHook'
