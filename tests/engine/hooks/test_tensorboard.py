"""TensorBoardHook: what it logs, and what it gives TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.config import Config
from mmengine.hooks import IterTimerHook, LoggerHook
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop
from torch import nn

from mmfinetune.engine.hooks import tensorboard
from mmfinetune.engine.hooks.tensorboard import TensorBoardHook, tensorboard_of
from mmfinetune.engine.optim import guarded
from mmfinetune.engine.state import begin_epoch
from mmfinetune.engine.vis_backends import TensorBoardBackend
from mmfinetune.evaluation import tensorboard as curves
from mmfinetune.utils import event_files
from tests.builders.pictures import NAMES, NORMALISED, batch, sample


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    return model


def showing(**backends: object) -> SimpleNamespace:
    """A visualizer with these backends."""
    return SimpleNamespace(get_backend=backends.get, dataset_meta={'classes': NAMES})


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What lies in a folder's event files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob('events*')):
        for _, event in event_files.read_records(path.read_bytes()):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


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


class IterLoop(IterBasedTrainLoop):
    def __init__(self) -> None:
        pass


@pytest.fixture
def training(tmp_path: Path, hub: MessageHub) -> SimpleNamespace:
    """What TensorBoardHook reads of a Runner, at the end of the second epoch of three steps."""
    cfg = Config(
        {
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.1}},
            'train_cfg': {'max_epochs': 3},
            'train_dataloader': {'batch_size': 2},
        }
    )
    for loss in (9.0, 9.0, 9.0, 1.0, 2.0, 6.0):
        hub.update_scalar('train/loss', loss)
    cfg.model = {'data_preprocessor': {**NORMALISED, 'bgr_to_rgb': True}}
    wrapper = OptimWrapper(torch.optim.SGD(linear().parameters(), lr=0.1))
    begin_epoch(SimpleNamespace(message_hub=hub, epoch=1, iter=3))
    return SimpleNamespace(
        cfg=cfg,
        world_size=1,
        seed=0,
        message_hub=hub,
        optim_wrapper=wrapper,
        epoch=1,
        iter=6,
        hooks=[],
        train_loop=None,
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
    found = written(tmp_path / 'logs')
    assert found['weights/text_summary'] == [(0, 0)]
    values = curves.hparams_of(training.cfg, 1, 0, facts)
    assert (values['weights'], values['weights_sha256']) == ('a.pth', 'abababab')


def test_no_report_without_weights(training, tmp_path):
    TensorBoardHook().before_train(training)
    tensorboard_of(training).close()
    assert 'weights/text_summary' not in written(tmp_path / 'logs')


def test_hours_that_are_left(training):
    hook = TensorBoardHook()
    hook.after_train_iter(training, 0)  # without IterTimerHook there is no estimate
    assert 'train/eta_hours' not in training.message_hub.log_scalars
    training.message_hub.update_info('eta', 5400.0)
    hook.after_train_iter(training, 1)
    assert training.message_hub.get_scalar('train/eta_hours').current() == 1.5


def test_loss_of_an_epoch_is_the_mean_of_its_steps(training, tmp_path):
    TensorBoardHook().after_train_epoch(training)
    assert written(tmp_path / 'logs')['loss/train_epoch'] == [(2, 3.0)]


def test_loss_of_an_epoch_leaves_out_skipped_steps_and_other_epochs(training, tmp_path):
    training.message_hub.update_scalar('train/loss', 0.0, count=0)  # as NonFiniteHook leaves it
    training.iter += 1
    TensorBoardHook().after_train_epoch(training)
    assert written(tmp_path / 'logs')['loss/train_epoch'] == [(2, 3.0)]


def test_training_by_iterations_has_no_loss_of_an_epoch(training, tmp_path):
    training.train_loop = IterLoop()
    TensorBoardHook().after_train_epoch(training)
    assert not (tmp_path / 'logs').exists()


def test_hyperparameters_and_end_of_the_run(training, tmp_path):
    hook = TensorBoardHook()
    hook.before_train(training)
    tensorboard_of(training).experiment.flush()
    assert '_hparams_/session_end_info' not in written(tmp_path / 'logs')
    hook.after_train(training)
    tensorboard_of(training).close()
    assert {'_hparams_/experiment', '_hparams_/session_start_info', '_hparams_/session_end_info'} <= set(
        written(tmp_path / 'logs')
    )


def test_without_a_board_there_is_nothing_to_do(training, tmp_path):
    for training.visualizer in (showing(), showing(LocalVisBackend=object())):
        hook = TensorBoardHook()
        hook.before_train(training)
        hook.after_train_epoch(training)
        hook.after_train(training)
    assert not (tmp_path / 'logs').exists()


def test_only_the_first_process_has_a_board(training, monkeypatch):
    monkeypatch.setattr(tensorboard, 'is_main_process', lambda: False)
    assert tensorboard_of(training) is None


def shown(tmp_path: Path) -> dict[str, list[int]]:
    """Images of the event files; files that are made within one second have no order."""
    found = written(tmp_path / 'logs')
    return {tag: sorted(step for step, _ in found[tag]) for tag in found if tag.startswith('images/')}


def validate(training, hook: TensorBoardHook, samples: Sequence, size: int = 7) -> None:
    hook.before_val_epoch(training)
    for start in range(0, len(samples), size):
        hook.after_val_iter(training, start // size, outputs=samples[start : start + size])
    tensorboard_of(training).close()


@pytest.mark.parametrize(('by_epoch', 'step'), [(True, 1), (False, 6), (None, 1)])
def test_images_are_at_the_loggers_step(training, tmp_path, by_epoch, step):
    if by_epoch is not None:
        training.hooks = [IterTimerHook(), LoggerHook(log_metric_by_epoch=by_epoch)]
    hook = TensorBoardHook(pictures=1)
    hook.before_train(training)
    validate(training, hook, [sample(tmp_path / 'a.png')])
    assert shown(tmp_path) == {'images/val/a': [step]}


def test_validation_without_training_is_at_zero(training, tmp_path):
    validate(training, TensorBoardHook(pictures=1), [sample(tmp_path / 'a.png')])
    assert shown(tmp_path) == {'images/val/a': [0]}


@pytest.mark.parametrize('size', [1, 3, 7])
def test_the_same_validation_images_after_each_epoch(training, tmp_path, size):
    samples = [sample(tmp_path / f'{i}.png') for i in range(7)]
    hook = TensorBoardHook(pictures=3)
    hook.before_train(training)
    for training.epoch in (1, 2):
        validate(training, hook, samples, size)
    assert shown(tmp_path) == {f'images/val/{i}': [1, 2] for i in (0, 3, 6)}


def test_images_of_one_name_have_a_tag_each(training, tmp_path):
    samples = []
    for i in range(7):
        (tmp_path / str(i)).mkdir()
        samples.append(sample(tmp_path / str(i) / 'a.png', img_id=i))
    validate(training, TensorBoardHook(pictures=3), samples, 1)
    assert shown(tmp_path) == {f'images/val/{name}': [0] for name in ('a', 'a_3', 'a_6')}


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
    assert shown(tmp_path) == {'images/train_batch': [12]}


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


@pytest.mark.parametrize(('by_epoch', 'left'), [(True, [1]), (False, [1, 3, 5])])
def test_resuming_cuts_by_the_axis_of_the_validations(training, tmp_path, by_epoch, left):
    backend = tensorboard_of(training)
    training.iter = 5
    for step in (1, 3, 5, 7):
        backend.add_scalars({'loss': 0.0, 'iter': step}, step)
        backend.add_scalars({'coco/segm_mAP': 0.5}, step)
    training.hooks = [LoggerHook(log_metric_by_epoch=by_epoch)]
    training.cfg.resume = True
    TensorBoardHook().before_train(training)
    backend.close()
    found = written(tmp_path / 'logs')
    assert [step for step, _ in found['loss/train']] == [1, 3, 5]
    assert [step for step, _ in found['mAP/segm']] == left
