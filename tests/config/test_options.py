"""What the command line puts into a config, and what one line of --cfg-options does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmfinetune.apis.train import check_early
from mmfinetune.config import load as config_load
from mmfinetune.config.options import Options, apply
from mmfinetune.config.resume import BatchSetup
from mmfinetune.engine import launch
from mmfinetune.utils.errors import UserError

ROOT = Path(__file__).parents[2]
MAIN = 'configs/mask_rcnn_voc_pretrained.py'


@pytest.fixture
def cfg(voc_cfg) -> Config:
    return copy.deepcopy(voc_cfg)


# Told before the imports


@pytest.mark.parametrize(
    ('wrong', 'says'),
    [
        ({'accumulate': 0}, '--accumulate 0: pass a number of at least 1'),
        ({'save_every': -1}, '--save-every -1: pass a number'),
        ({'batch_size': '0'}, '--batch-size 0: pass a number of images per GPU, or auto'),
        ({'batch_size': 'many'}, '--batch-size many'),
        ({'batch_size': 'auto', 'resume': True}, '--batch-size auto and --resume exclude each other'),
        ({'resume': 'nowhere.pth'}, 'There is no checkpoint nowhere.pth'),
        ({'resume': True, 'lr': 0.1}, '--lr would have no effect'),
        ({'resume': 'auto', 'lr': 0.1}, '--lr would have no effect'),
    ],
)
def test_what_can_be_told_at_once(wrong, says):
    with pytest.raises(UserError, match=says):
        check_early(Options(config=MAIN, **wrong))


def test_gpus_are_torchruns_business_where_it_started_the_run(monkeypatch):
    for name in ('LOCAL_RANK', launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    asked = Options(config=MAIN, gpus='4')
    check_early(asked)
    monkeypatch.setenv('LOCAL_RANK', '0')
    with pytest.raises(UserError, match='drop --gpus'):
        check_early(asked)
    # The processes that --gpus itself started have the same command line.
    monkeypatch.setenv(launch.LAUNCHED, '1')
    check_early(asked)


# Put into the config


def test_batch_and_accumulation(cfg):
    apply(cfg, Options(config=MAIN, batch_size='1', accumulate=4), 2)
    assert BatchSetup.of_config(cfg, 2) == BatchSetup(processes=2, batch_size=1, accumulation=4)


def test_auto_is_found_later(cfg):
    apply(cfg, Options(config=MAIN, batch_size='auto'), 1)
    assert cfg.train_dataloader.batch_size == 2


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)


@pytest.mark.parametrize(
    ('kind', 'dtype', 'scale'), [('fp16', 'float16', 'dynamic'), ('bf16', 'bfloat16', {'enabled': False})]
)
def test_amp(cfg, gpu, kind, dtype, scale):
    apply(cfg, Options(config=MAIN, amp=kind), 1)
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ('AmpOptimWrapper', dtype, scale)
    # The rest of the recipe stays.
    assert wrapper.optimizer.lr == 0.002 and 'backbone' in wrapper.paramwise_cfg.custom_keys


def test_a_scaler_that_is_off_hides_no_bad_gradient():
    # Of bf16: a scaler would leave out steps with a NaN gradient, silently and for ever.
    scaler = torch.amp.GradScaler('cpu', **{'enabled': False})
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.full((1,), float('nan'))
    scaler.step(optimizer)
    assert weight.isnan() and scaler.scale(torch.ones(1)) == 1


def test_amp_needs_a_gpu_that_can(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='--amp needs a CUDA GPU'):
        apply(cfg, Options(config=MAIN, amp='fp16'), 1)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: False)
    with pytest.raises(UserError, match='This GPU has no bfloat16') as caught:
        apply(cfg, Options(config=MAIN, amp='bf16'), 1)
    assert caught.value.cure == 'use --amp fp16'


# One line of --cfg-options each


def load(*overrides: str) -> Config:
    return config_load.load(ROOT / 'configs/mask_rcnn_demo.py', overrides)


def build(cfg: Config):
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    return MODELS.build(copy.deepcopy(cfg.model)).train()


@pytest.fixture(scope='module')
def batch() -> dict:
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(1, [(3, 64, 64)], num_classes=20, with_mask=True, num_items=[3])


def losses_of(model, batch: dict, dtype: torch.dtype | None = None):
    torch.manual_seed(1)
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    with torch.autocast('cpu', dtype or torch.bfloat16, enabled=dtype is not None):
        losses = model(**data, mode='loss')
    total, shown = model.parse_losses(losses)
    total.backward()
    return {k: float(v.detach()) for k, v in shown.items()}


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_activation_checkpointing_computes_the_same(batch, monkeypatch):
    import torch.utils.checkpoint

    again = []
    plain = build(load('model.backbone.frozen_stages=-1'))
    checkpointed = build(load('model.backbone.frozen_stages=-1', 'model.backbone.with_cp=True'))
    checkpointed.load_state_dict(plain.state_dict())
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, 'checkpoint', lambda *args, **kwargs: again.append(1) or original(*args, **kwargs)
    )
    assert losses_of(plain, batch) == losses_of(checkpointed, batch)
    assert len(again) == 8  # the blocks of a ResNet-18
    first, second = gradients(plain), gradients(checkpointed)
    assert set(first) == set(second) and len(first) > 60
    for name, gradient in first.items():
        # Of two branches that meet, the sum is taken in another order.
        torch.testing.assert_close(second[name], gradient, rtol=1e-3, atol=1e-5)


def test_frozen_stages(batch):
    model = build(load('model.backbone.frozen_stages=2'))
    losses_of(model, batch)
    frozen = {n for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert {n.split('.')[0] for n in frozen} == {'conv1', 'bn1', 'layer1', 'layer2'}
    assert {n.split('.')[0] for n, p in model.backbone.named_parameters() if p.grad is not None} == {'layer3', 'layer4'}


@pytest.mark.parametrize(('norm_eval', 'kept'), [(True, True), (False, False)])
def test_frozen_bn_statistics(batch, norm_eval, kept):
    model = build(load(f'model.backbone.norm_eval={norm_eval}'))
    before = {n: b.clone() for n, b in model.backbone.named_buffers() if 'running' in n}
    losses_of(model, batch)
    same = [torch.equal(b, before[n]) for n, b in model.backbone.named_buffers() if n in before]
    assert len(same) > 30 and all(s is kept for s in same)
    # Weights of BN are trained all the same.
    assert model.backbone.layer1[0].bn1.weight.grad is not None


@pytest.mark.parametrize('max_norm', [0.5, 1e6])
def test_clipped_gradients(batch, max_norm):
    from mmengine.optim import build_optim_wrapper

    cfg = load(f'optim_wrapper.clip_grad.max_norm={max_norm}')
    model = build(cfg)
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    norms = []
    wrapper.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(torch.nn.utils.get_total_norm(list(gradients(model).values()))))
    )
    model.train_step(copy.deepcopy(batch), wrapper)
    assert norms[0] == pytest.approx(0.5, rel=1e-3) if max_norm == 0.5 else 0.5 < norms[0] < 1e6


def test_bf16_trains_on_the_cpu_too(batch):
    model = build(load())
    exact = losses_of(model, batch)
    model.zero_grad()
    close = losses_of(model, batch, torch.bfloat16)
    assert close['loss'] == pytest.approx(exact['loss'], rel=0.2)
    assert close['loss'] != exact['loss']
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.parametrize(
    'line',
    [
        'model.backbone.with_cq=True',
        'model.backbone.frozen_stage=2',
        'optim_wrapper.clip_grads=1',
        'default_hooks.nonfinite.nan_polcy=skip',
    ],
)
def test_a_misspelt_line_is_refused(line):
    with pytest.raises(UserError, match='settings that nothing reads'):
        load(line)
