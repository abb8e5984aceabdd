"""What the command line puts into a config, and what one line of --cfg-options does."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmfinetune.config import load as config_load
from mmfinetune.config import resolve
from mmfinetune.config.resolve import Options, RunPlan
from mmfinetune.config.resume import BatchSetup
from tests.builders.errors import refused

ROOT = Path(__file__).parents[2]
MAIN = 'configs/mask_rcnn_voc_pretrained.py'
HEAD_STDS = {
    'roi_head.bbox_head.fc_cls': 0.01,
    'roi_head.bbox_head.fc_reg': 0.001,
    'roi_head.mask_head.conv_logits': 0.001,
}


@pytest.fixture
def cfg(voc_cfg) -> Config:
    return copy.deepcopy(voc_cfg)


def planned(world: int = 1, config: str | Path = ROOT / MAIN, **options) -> RunPlan:
    return resolve.resolve(Options(config=str(config), **options), lambda cfg: world)


# All steps


def test_the_command_line_wins_over_the_config(tmp_path):
    plan = planned(
        2,
        batch_size=1,
        accumulate=4,
        work_dir=str(tmp_path / 'w'),
        save_every=7,
        cfg_options=['train_cfg.max_epochs=3'],
    )
    cfg = plan.cfg
    assert BatchSetup.of_config(cfg, plan.world) == BatchSetup(processes=2, batch_size=1, accumulation=4)
    assert (cfg.work_dir, cfg.train_cfg.max_epochs) == (str(tmp_path / 'w'), 3)
    assert cfg.visualizer.vis_backends[1].save_dir == str(tmp_path / 'w' / resolve.LOG_DIR / 'w')
    assert cfg.default_hooks.checkpoint.every_n_iters == 7


def test_rates_and_schedule_follow_the_batch_that_was_asked_for():
    plan = planned(4, batch_size=4, cfg_options=['optim_wrapper.optimizer.lr=0.001'])
    # 0.001 x (4 x 4) / 2, and 500 steps of 2 images are 63 of 16.
    assert plan.cfg.optim_wrapper.optimizer.lr == plan.rates.lr == pytest.approx(0.008)
    assert plan.cfg.param_scheduler[0].end == 63 and len(plan.adapted) == 1
    assert plan.cfg.auto_scale_lr.enable is False


def test_lr_of_the_command_line_is_not_scaled():
    assert planned(4, lr=0.5).cfg.optim_wrapper.optimizer.lr == 0.5


@pytest.mark.parametrize('setting', ["optim_wrapper.paramwise_cfg = 'all'", "model.type = '.'"])
def test_a_value_of_a_kind_that_nobody_foresees_is_a_message(setting, tmp_path):
    key, _, value = setting.partition(' = ')
    nested = value
    for part in reversed(key.split('.')[1:]):
        nested = f'dict({part}={nested})'
    path = tmp_path / 'c.py'
    path.write_text(f"_base_ = '{ROOT / MAIN}'\n{key.split('.')[0]} = {nested}\n")
    with refused('config-value', path=str(path)):
        planned(config=path)


@pytest.mark.parametrize('lr', [-1.0, float('nan'), float('inf')])
def test_lr_that_no_optimizer_takes(lr):
    with refused('config-wrong-settings') as caught:
        planned(lr=lr)
    [problem] = caught.value.problems
    assert problem.facts['key'] == 'optim_wrapper.optimizer.lr'


@pytest.mark.parametrize(
    ('options', 'key'),
    [
        ({'batch_size': 0}, 'train_dataloader.batch_size'),
        ({'accumulate': 0}, 'optim_wrapper.accumulative_counts'),
        ({'save_every': 0}, 'default_hooks.checkpoint.every_n_iters'),
    ],
)
def test_numbers_below_one(options, key):
    with refused('config-wrong-settings') as caught:
        planned(**options)
    assert [problem.facts['key'] for problem in caught.value.problems] == [key]


def test_a_run_without_visualizer(tmp_path):
    plan = planned(work_dir=str(tmp_path), cfg_options=['visualizer=None'])
    assert plan.cfg.visualizer is None


def test_auto_is_found_later():
    assert planned(batch_size='auto').cfg.train_dataloader.batch_size == 2


def test_weights_and_heads():
    weights = planned(weights='mine.pth', head_init='remap').cfg.weights
    assert (weights.checkpoint, weights.url, weights.fallbacks, weights.head_init) == ('mine.pth', None, [], 'remap')


# `load_from`


@pytest.mark.parametrize('config', [MAIN, 'configs/mask_rcnn_voc_scratch.py'])
def test_load_from_is_weights(config, capsys):
    cfg = planned(config=ROOT / config, dry_run=True, cfg_options=['load_from=mine.pth']).cfg
    assert cfg.load_from is None and not cfg.resume
    weights = cfg.weights
    assert (weights.checkpoint, weights.url, weights.head_init) == ('mine.pth', None, 'auto')
    assert {k: v['std'] for k, v in weights.reinit.items()} == HEAD_STDS and 'into' not in weights
    assert 'mine.pth' in capsys.readouterr().err


def test_load_from_of_a_url_and_with_other_options(capsys):
    url = 'https://download.openmmlab.com/x/mask_rcnn-d4b0c5d6.pth'
    options = [f'load_from={url}', "weights.aliases={'dog': 'cat'}"]
    weights = planned(dry_run=True, head_init='keep', cfg_options=options).cfg.weights
    assert (weights.checkpoint, weights.url, weights.head_init) == ('pretrain/mask_rcnn-d4b0c5d6.pth', url, 'keep')
    assert weights.aliases == {'dog': 'cat'}
    remapped = planned(cfg_options=['load_from=a.pth', 'weights.head_init=remap']).cfg.weights
    assert (remapped.checkpoint, remapped.head_init) == ('a.pth', 'remap')


def test_weights_of_the_command_line_win_over_load_from(capsys):
    cfg = planned(dry_run=True, weights='mine.pth', cfg_options=['load_from=other.pth']).cfg
    assert (cfg.weights.checkpoint, cfg.load_from) == ('mine.pth', None)
    assert 'load_from is not used' in capsys.readouterr().err


def test_a_model_with_other_heads_has_none_to_draw():
    options = ['load_from=a.pth', 'model.roi_head.mask_head=None', 'weights=None']
    assert set(planned(cfg_options=options).cfg.weights.reinit) == {*HEAD_STDS} - {'roi_head.mask_head.conv_logits'}


@pytest.mark.parametrize('name', ['s3://a/b.pth', 'torchvision://none', '5'])
def test_load_from_what_cannot_be_read(name):
    if name == '5':
        assert planned(cfg_options=[f'load_from={name}']).cfg.weights.checkpoint == '5'
        return
    with refused('weights-address', address=name):
        planned(cfg_options=[f'load_from={name}'])


def test_resume_in_a_config_is_resume(tmp_path, capsys):
    options = ['resume=True', f'load_from={tmp_path / "none.pth"}']
    with refused('resume-missing'):
        planned(train=True, cfg_options=options)
    cfg = planned(train=True, work_dir=str(tmp_path), cfg_options=options[:1]).cfg
    assert 'nothing to resume' in capsys.readouterr().out and not cfg.resume
    assert not planned(test=True, cfg_options=options).cfg.resume


@pytest.mark.parametrize('options', [{'weights': 'a.pth'}, {'head_init': 'remap'}])
def test_weights_of_a_config_without_any(options):
    with refused('config-without-weights'):
        planned(cfg_options=['weights=None'], **options)


def test_checkpoint_to_test():
    assert planned(test=True, checkpoint='mine.pth').checkpoint == Path('mine.pth')


def test_saving_within_an_epoch_needs_our_hook():
    with refused('save-every-other-hook', type='CheckpointHook'):
        planned(save_every=5, cfg_options=['default_hooks.checkpoint.type=CheckpointHook'])


def test_the_plan_is_frozen():
    plan = planned()
    with pytest.raises(AttributeError):
        plan.world = 3


# Several processes


def test_one_process_needs_no_group(cfg):
    resolve.set_processes(cfg, 1)
    assert 'launcher' not in cfg and 'collect_device' not in cfg.val_evaluator


@pytest.mark.parametrize('gpu', [True, False])
def test_several_processes(cfg, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    cfg.test_evaluator = [dict(type='InstanceCocoMetric', collect_device='cpu')]
    resolve.set_processes(cfg, 2)
    assert cfg.launcher == 'pytorch'
    # By messages, unless the config says otherwise.
    assert (cfg.val_evaluator.collect_device, cfg.test_evaluator[0].collect_device) == ('gpu', 'cpu')
    # DistributedDataParallel of MMEngine names a CUDA device, which gloo has not.
    assert ('model_wrapper_cfg' in cfg) is not gpu
    assert gpu or cfg.model_wrapper_cfg.device_ids is None


# Mixed precision


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)


@pytest.mark.parametrize(
    ('kind', 'dtype', 'scale'), [('fp16', 'float16', 'dynamic'), ('bf16', 'bfloat16', {'enabled': False})]
)
@pytest.mark.usefixtures('gpu')
def test_amp(cfg, kind, dtype, scale):
    resolve.set_batch(cfg, None, None, kind)
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == ('AmpOptimWrapper', dtype, scale)
    # The rest of the recipe stays.
    assert wrapper.optimizer.lr == 0.002 and 'backbone' in wrapper.paramwise_cfg.custom_keys


def test_a_scaler_that_is_off_hides_no_bad_gradient():
    # For bf16: a scaler would leave out steps with a NaN gradient, silently and for ever.
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.full((1,), float('nan'))
    scaler.step(optimizer)
    assert weight.isnan() and scaler.scale(torch.ones(1)) == 1


def test_amp_needs_a_gpu_that_can(cfg, monkeypatch):
    resolve.require_amp(cfg)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    resolve.set_batch(cfg, None, None, 'fp16')
    with refused('amp-no-gpu'):
        resolve.require_amp(cfg)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: False)
    resolve.require_amp(cfg)
    resolve.set_batch(cfg, None, None, 'bf16')
    with refused('amp-no-bfloat16'):
        resolve.require_amp(cfg)


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
    with refused('config-wrong-settings'):
        load(line)


# The only writer


def writes(path: Path) -> list[str]:
    """Places in a ``cfg`` that a file assigns to."""
    targets = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Assign):
            targets += [t for target in node.targets for t in getattr(target, 'elts', [target])]
        elif isinstance(node, (ast.AugAssign, ast.Delete)):
            targets += node.targets if isinstance(node, ast.Delete) else [node.target]
    texts = [ast.unparse(target) for target in targets]
    return [text for text in texts if text.startswith(('cfg.', 'cfg[', 'self.cfg.', 'runner.cfg.'))]


def test_nothing_else_writes_into_a_config():
    found = {
        path.relative_to(ROOT / 'mmfinetune').as_posix(): writes(path)
        for folder in ('apis', 'engine', 'evaluation', 'weights', 'data', 'models')
        for path in (ROOT / 'mmfinetune' / folder).rglob('*.py')
    }
    # A fact of the disk: which of several places the weights were found in.
    assert {path: places for path, places in found.items() if places} == {'apis/train.py': ['cfg.weights.checkpoint']}
    assert len(writes(ROOT / 'mmfinetune/config/resolve.py')) > 10


@pytest.mark.parametrize(
    ('backends', 'problems'),
    [
        ([{'type': 'LocalVisBackend'}, {'type': 'TensorBoardBackend'}], []),
        ({'type': 'AimVisBackend'}, [{'type': 'AimVisBackend', 'packages': 'aim'}]),
        (
            [{'type': 'DVCLiveVisBackend'}, {'type': 'LocalVisBackend'}, {'type': 'WandbVisBackend'}],
            [
                {'type': 'DVCLiveVisBackend', 'packages': 'dvclive pygit2'},
                {'type': 'WandbVisBackend', 'packages': 'wandb'},
            ],
        ),
    ],
)
def test_loggers_that_are_not_installed(backends, problems, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    cfg = Config({'visualizer': {'vis_backends': backends}})
    if not problems:
        resolve.require_loggers(cfg)
        return
    with refused('loggers-missing') as caught:
        resolve.require_loggers(cfg)
    assert [problem.facts for problem in caught.value.problems] == problems


def test_each_logger_of_mmengine_is_known():
    """A backend that MMEngine adds needs a row, or a start without its package fails late."""
    from mmengine.visualization import vis_backend

    own = {'BaseVisBackend', 'LocalVisBackend', 'TensorboardVisBackend'}
    assert {name for name in dir(vis_backend) if name.endswith('VisBackend')} - own == set(resolve.LOGGERS)
