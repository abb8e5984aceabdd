"""TensorBoardHook: what it logs, and what it gives TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from mmfinetune.engine.hooks import tensorboard
from mmfinetune.engine.hooks.tensorboard import TensorBoardHook, tensorboard_of
from mmfinetune.engine.optim import guarded
from mmfinetune.engine.vis_backends import TensorBoardBackend
from mmfinetune.evaluation import tensorboard as curves
from tests.builders.curves import order_files, read, steps, texts
from tests.builders.pictures import NAMES, NORMALISED, batch, sample


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    return model


def showing(**backends: object) -> SimpleNamespace:
    """A visualizer with these backends."""
    return SimpleNamespace(get_backend=backends.get, dataset_meta={'classes': NAMES})


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
    hook = TensorBoardHook()
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
    if hook:
        wrapper.__class__ = guarded(type(wrapper))
    runner = SimpleNamespace(optim_wrapper=wrapper, message_hub=hub)
    wrapper.message_hub = hub
    wrapper.initialize_count_status(model, 0, len(inputs))
    for value in inputs:
        with wrapper.optim_context(model):
            loss = model(torch.full((1, 2), float(value))).sum()
        wrapper.update_params(loss)
        if hook:
            TensorBoardHook().after_train_iter(runner, 0)
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
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)

    def backward(self, loss, **kwargs) -> None:
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs) -> None:
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


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


def test_clipping_by_value_has_the_norm_before_it(hub):
    model = linear()
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), clip_grad={'type': 'value', 'clip_value': 1.0})
    assert gradient_run(wrapper, model, hub) == pytest.approx([norm_of(i) for i in (1, 2, 3, 4)])


def test_gradient_norm_leaves_the_training_as_it_is(hub):
    weights = []
    for hook in (False, True):
        model = linear()
        wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.1))
        gradient_run(wrapper, model, hub, hook=hook)
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)


def test_several_optimizers_have_no_gradient_norm(hub):
    wrapper = OptimWrapperDict(a=OptimWrapper(torch.optim.SGD(linear().parameters(), lr=0.1)))
    TensorBoardHook().after_train_iter(SimpleNamespace(optim_wrapper=wrapper, message_hub=hub), 0)
    assert not hub.log_scalars


@pytest.mark.parametrize('logged', [True, False])
def test_each_value_can_be_left_out(hub, logged):
    wrapper = guarded(OptimWrapper)(torch.optim.SGD(linear().parameters(), lr=0.1))
    wrapper.grad_norm = 1.0
    runner = SimpleNamespace(optim_wrapper=wrapper, message_hub=hub)
    hook = TensorBoardHook(lr=logged, grad_norm=logged)
    hook.before_train_iter(runner, 0)
    hook.after_train_iter(runner, 0)
    assert set(hub.log_scalars) == ({'train/lr/group0', 'train/grad_norm'} if logged else set())


# ---- TensorBoard ----------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path: Path, hub: MessageHub, monkeypatch) -> SimpleNamespace:
    """What TensorBoardHook reads of a Runner after six steps."""
    order_files(monkeypatch)
    cfg = Config(
        {
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.1}},
            'train_cfg': {'max_epochs': 3},
            'train_dataloader': {'batch_size': 2},
        }
    )
    cfg.model = {'data_preprocessor': {**NORMALISED, 'bgr_to_rgb': True}}
    wrapper = OptimWrapper(torch.optim.SGD(linear().parameters(), lr=0.1))
    return SimpleNamespace(
        cfg=cfg,
        world_size=1,
        seed=0,
        message_hub=hub,
        optim_wrapper=wrapper,
        iter=6,
        train_loop=None,
        val_loop=object(),
        val_dataloader=SimpleNamespace(sampler=range(7)),
        model=SimpleNamespace(data_preprocessor=DetDataPreprocessor(**NORMALISED, bgr_to_rgb=True, pad_mask=True)),
        visualizer=showing(TensorBoardBackend=TensorBoardBackend(str(tmp_path / 'logs'))),
    )


def test_report_on_the_weights_of_the_start(training, tmp_path):
    training.weights_report = 'body: 2 tensors'
    facts = {'file': 'pretrain/a.pth', 'sha256': 'ab' * 32}
    training.message_hub.update_info('initial_weights', facts)
    TensorBoardHook().before_train(training)
    tensorboard_of(training).close()
    ((step, text),) = texts(tmp_path / 'logs', 'weights')
    assert step == 7 and 'body: 2 tensors' in text
    values = curves.hparams_of(training.cfg, 1, 0, facts)
    assert (values['weights'], values['weights_sha256']) == ('a.pth', 'abababab')


def test_no_report_without_weights(training, tmp_path):
    TensorBoardHook().before_train(training)
    tensorboard_of(training).close()
    assert not (tmp_path / 'logs/train').exists()


def test_hours_that_are_left(training):
    hook = TensorBoardHook()
    hook.after_train_iter(training, 0)  # without IterTimerHook there is no estimate
    assert 'train/eta_hours' not in training.message_hub.log_scalars
    training.message_hub.update_info('eta', 5400.0)
    hook.after_train_iter(training, 1)
    assert training.message_hub.get_scalar('train/eta_hours').current() == 1.5


@pytest.mark.parametrize('val_loop', [object(), None])
def test_hyperparameters_and_end_of_the_run(training, tmp_path, val_loop):
    hook, training.val_loop = TensorBoardHook(), val_loop
    hook.before_train(training)
    hook.after_train(training)
    tensorboard_of(training).close()
    run = 'train' if val_loop is None else 'val'
    found = read(tmp_path / 'logs' / run).PluginTagToContent('hparams')
    assert set(found) == {f'_hparams_/{name}' for name in ('experiment', 'session_start_info', 'session_end_info')}


def test_without_a_board_there_is_nothing_to_do(training, tmp_path):
    for training.visualizer in (showing(), showing(LocalVisBackend=object())):
        hook = TensorBoardHook()
        hook.before_train(training)
        hook.after_train_iter(training, 0, outputs={'loss': 1.0})
        hook.after_train(training)
    assert not (tmp_path / 'logs').exists()


def test_only_the_first_process_has_a_board(training, monkeypatch):
    monkeypatch.setattr(tensorboard, 'is_main_process', lambda: False)
    assert tensorboard_of(training) is None


def shown(tmp_path: Path) -> dict[str, list[int]]:
    """Steps of the images."""
    return {tag: points for tag, points in steps(tmp_path / 'logs').items() if '/8_images/' in tag}


def validate(training, hook: TensorBoardHook, samples: Sequence, size: int = 7) -> None:
    hook.before_val_epoch(training)
    for start in range(0, len(samples), size):
        hook.after_val_iter(training, start // size, outputs=samples[start : start + size])
    tensorboard_of(training).close()


def test_images_are_at_the_step_of_training(training, tmp_path):
    hook = TensorBoardHook(pictures=1)
    hook.before_train(training)
    validate(training, hook, [sample(tmp_path / 'a.png')])
    assert shown(tmp_path) == {'val/8_images/val/a': [6]}


def test_validation_without_training_is_at_zero(training, tmp_path):
    validate(training, TensorBoardHook(pictures=1), [sample(tmp_path / 'a.png')])
    assert shown(tmp_path) == {'val/8_images/val/a': [0]}


@pytest.mark.parametrize('size', [1, 3, 7])
def test_the_same_validation_images_after_each_epoch(training, tmp_path, size):
    samples = [sample(tmp_path / f'{i}.png') for i in range(7)]
    hook = TensorBoardHook(pictures=3)
    hook.before_train(training)
    for training.iter in (3, 6):
        validate(training, hook, samples, size)
    assert shown(tmp_path) == {f'val/8_images/val/{i}': [3, 6] for i in (0, 3, 6)}


def test_images_of_one_name_have_a_tag_each(training, tmp_path):
    samples = []
    for i in range(7):
        (tmp_path / str(i)).mkdir()
        samples.append(sample(tmp_path / str(i) / 'a.png', img_id=i))
    validate(training, TensorBoardHook(pictures=3), samples, 1)
    assert shown(tmp_path) == {f'val/8_images/val/{name}': [0] for name in ('a', 'a_3', 'a_6')}


def test_first_batch_is_shown_as_the_model_gets_it(training, tmp_path):
    hook = TensorBoardHook()
    preprocessor = training.model.data_preprocessor
    hook.before_train(training)
    for training.iter in (12, 13):
        inputs, samples = batch(2)
        plain = DetDataPreprocessor(**NORMALISED, bgr_to_rgb=True, pad_mask=True)(
            {'inputs': [i.clone() for i in inputs], 'data_samples': batch(2)[1]}, True
        )
        hook.before_train_iter(training, 0)
        done = preprocessor({'inputs': inputs, 'data_samples': samples}, True)
        hook.after_train_iter(training, 0)
        assert torch.equal(done['inputs'], plain['inputs'])
    tensorboard_of(training).close()
    assert shown(tmp_path) == {'train/8_images/train_batch': [13]}


@pytest.mark.parametrize('pictures', [0, 4])
def test_without_tensorboard_or_pictures_nothing_is_drawn(training, tmp_path, monkeypatch, pictures):
    for name in ('truth_and_prediction', 'batch_picture'):
        monkeypatch.setattr(tensorboard, name, pytest.fail)
    if pictures:
        training.visualizer = showing()
    hook = TensorBoardHook(pictures=pictures)
    hook.before_train(training)
    hook.before_train_iter(training, 0)
    inputs, samples = batch(1)
    training.model.data_preprocessor({'inputs': inputs, 'data_samples': samples}, True)
    hook.before_val_epoch(training)
    hook.after_val_iter(training, 0, outputs=[sample(tmp_path / 'a.png')])


@pytest.mark.parametrize('missed', [True, False])
def test_resuming_asks_for_the_step_and_the_validation(training, monkeypatch, missed):
    asked = []
    monkeypatch.setattr(TensorBoardBackend, 'resume', lambda self, *args: asked.append(args))
    training.cfg.resume = True
    training.train_loop = SimpleNamespace(missed_validation=missed)
    TensorBoardHook().before_train(training)
    assert asked == [(6, missed)]
