"""From the command line to the settings of a run: the only writer of a config before the Runner.

The command line wins over the config, and the config over its bases. One value follows later, as it is a fact of
files: `apis.train` notes in ``weights.checkpoint`` which of several places the weights were found in.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import lr, paths, views
from mmfinetune.config.load import judging, load, require_valid
from mmfinetune.config.resume import AUTO, set_resume, set_schedule
from mmfinetune.utils.dist import rank0_first, say
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.weights import class_map, data_only, find

if TYPE_CHECKING:
    from mmengine.config import Config

LOG_DIR = 'tensorboard_logs'
BOARD = 'TensorBoardBackend'
_OF_TRAINING = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr')
_OF_VALIDATION = ('val_dataloader', 'val_cfg', 'val_evaluator')
# The packages of MMEngine's backends, which import them as late as at the first record.
LOGGERS = {
    'WandbVisBackend': ('wandb',),
    'MLflowVisBackend': ('mlflow',),
    'ClearMLVisBackend': ('clearml',),
    'NeptuneVisBackend': ('neptune',),
    'DVCLiveVisBackend': ('dvclive', 'pygit2'),
    'AimVisBackend': ('aim',),
}
_LOCAL_LOGGERS = ('LocalVisBackend', 'TensorBoardBackend', 'TensorboardVisBackend')
AMP_DTYPES = {'fp16': 'float16', 'bf16': 'bfloat16'}


@dataclass(frozen=True)
class Options:
    """What the command line says; see ``tools/train_pretrained.py --help``."""

    config: str
    check_weights: bool = False
    json: bool = False
    train: bool = False
    test: bool = False
    dry_run: bool = False
    probe: bool = False
    check: bool = True
    weights: str | None = None
    checkpoint: str | None = None
    head_init: str | None = None
    data_root: str | Path | None = None
    work_dir: str | None = None
    resume: str | bool = False
    new_schedule: bool = False
    gpus: str | None = None
    batch_size: int | str | None = None
    accumulate: int | None = None
    amp: str | None = None
    lr: float | None = None
    scale_lr: bool = True
    save_every: int | None = None
    cfg_options: Sequence[str] = ()

    @property
    def _whole(self) -> bool:
        """Whether no part is named: train, then test."""
        return not (self.check_weights or self.train or self.test or self.dry_run)

    @property
    def trains(self) -> bool:
        return self._whole or self.train

    @property
    def tests(self) -> bool:
        return self._whole or self.test


@dataclass(frozen=True)
class RunPlan:
    """What a run will do; nothing changes it, or its config, any more.

    Attributes:
        options: What the command line says.
        cfg: The settings that the Runner gets.
        world: Number of processes.
        checkpoint: File to test, if the command line names one.
        rates: Learning rates, and how they come about.
        adapted: A line for each setting in steps that follows the batch size.
        resumed: What is used of a checkpoint that is resumed, and what of the config, one line each.
    """

    options: Options
    cfg: Config
    world: int
    checkpoint: Path | None
    rates: lr.LrPlan
    adapted: list[str]
    resumed: list[str]


def resolve(options: Options, join: Callable[[Config], int]) -> RunPlan:
    """Put config and command line together, step by step.

    Args:
        options: What the command line says.
        join: Brings this process together with the others of the run; returns their number.

    Raises:
        UserError: Settings that are wrong, or that this machine cannot follow.
    """
    cfg = load(options.config, options.cfg_options)
    world = join(cfg)
    trains = options.trains or options.dry_run
    with judging(options.config):
        set_processes(cfg, world)
        set_folders(cfg, options.work_dir, options.data_root)
        of_config = resume_of_config(cfg)
        resume = options.resume or (trains and of_config)
        note = set_load_from(cfg, options.weights)
        if note and (trains or options.check_weights):
            say(note, aside=True)
        set_start(cfg, options.weights, options.head_init, download=not options.dry_run)
        set_batch(cfg, options.batch_size, options.accumulate, options.amp)
        if trains:
            require_amp(cfg)
            require_loggers(cfg)
        set_saving(cfg, options.save_every)
        if resume and options.lr is not None and not options.new_schedule:
            raise UserError('resume-with-lr')
        run = set_resume(cfg, resume, world) if resume else None
        paths.check_heads(cfg)
        require_valid(cfg, options.config)  # numbers of the command line, before they are computed with
        rates = lr.plan_lr(cfg, world, options.lr, options.scale_lr)
        adapted = lr.adapt_schedule(cfg, world, options.scale_lr)
        lr.set_rates(cfg, rates)
        resumed = set_schedule(cfg, run, options.new_schedule) if run else []
        if cfg.optim_wrapper.optimizer.lr != rates.lr:
            rates = replace(lr.plan_lr(cfg, world, scale=False), source="the checkpoint's")
        require_valid(cfg, options.config)
    checkpoint = Path(_fetched(options.checkpoint, not options.dry_run)) if options.checkpoint else None
    return RunPlan(options, cfg, world, checkpoint, rates, adapted, resumed)


def set_processes(cfg: Config, world: int) -> None:
    """Settings of a run of several processes; their group is made before the Runner."""
    if world == 1:
        return
    import torch

    cfg.launcher = 'pytorch'
    if not torch.cuda.is_available():
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    for split in ('val', 'test'):
        for evaluator in views.evaluators(cfg, split):
            # By messages; the other way leaves a folder .dist_test where the user works.
            evaluator.setdefault('collect_device', 'gpu')


def set_folders(cfg: Config, work_dir: str | None, data_root: str | Path | None) -> None:
    """Where results go, and where the data are."""
    if work_dir:
        cfg.work_dir = work_dir
    for backend in views.vis_backends(cfg):
        if backend.get('type') in (BOARD, 'TensorboardVisBackend'):
            # With the name of the run, which TensorBoard shows from here on.
            backend['save_dir'] = str(Path(cfg.work_dir) / LOG_DIR / Path(cfg.work_dir).resolve().name)
    if data_root:
        paths.set_data_root(cfg, Path(data_root))
    paths.redirect_annotations(cfg)


def resume_of_config(cfg: Config) -> str | bool:
    """What the config's own `resume` and `load_from` continue from, as MMEngine means them."""
    resume, cfg.resume = cfg.get('resume'), False
    if not resume:
        return False
    file, cfg.load_from = cfg.get('load_from'), None
    return file or AUTO


# Layers with rows by class, and how they are re-initialized where the config does not say.
_HEADS = {
    'roi_head.bbox_head.fc_cls': dict(std=0.01),
    'roi_head.bbox_head.fc_reg': dict(std=0.001),
    'roi_head.mask_head.conv_logits': dict(std=0.001),
}


def set_load_from(cfg: Config, weights: str | None) -> str:
    """Turn the config's `load_from` into its `weights`, for the whole model; `weights` of the command line wins.

    Returns:
        A note on it; '' without `load_from`.
    """
    name, cfg.load_from = cfg.get('load_from'), None
    if not name:
        return ''
    file, url = data_only.address(name)
    old = cfg.get('weights') or {}
    heads = {layer: std for layer, std in _HEADS.items() if _has_module(cfg.model, layer.split('.')[:-1])}
    init = class_map.REMAP if old.get('head_init') == class_map.REMAP else class_map.AUTO
    cfg.weights = dict(checkpoint=file, url=url, head_init=init, reinit=old.get('reinit') or heads)
    if 'aliases' in old:
        cfg.weights.aliases = old['aliases']
    return (
        f'note: load_from is not used: --weights {weights}' if weights else f'note: load_from: the weights are {name}'
    )


def _has_module(node: Any, parts: Sequence[str]) -> bool:
    """Whether a model's config has a module at these keys."""
    for part in parts:
        node = node.get(part) if isinstance(node, Mapping) else None
    return isinstance(node, Mapping)


def set_start(cfg: Config, weights: str | None, head_init: str | None, download: bool = True) -> None:
    """What the model starts from.

    Raises:
        UserError: The config starts from random weights.
    """
    if (weights or head_init) and not cfg.get('weights'):
        raise UserError('config-without-weights')
    if head_init:
        cfg.weights.head_init = head_init
    if weights:
        cfg.weights.update(checkpoint=_fetched(weights, download), url=None, fallbacks=[])


def _fetched(file: str, download: bool) -> str:
    """A file, or what a URL gives: once, and not by every process into the same file."""
    return str(rank0_first(lambda: find.fetch(file))) if download and find.is_url(file) else file


def set_batch(cfg: Config, batch_size: int | str | None, accumulate: int | None, amp: str | None) -> None:
    """Images of a step and of an update, and their precision."""
    if batch_size not in (None, AUTO):
        cfg.train_dataloader.batch_size = batch_size
    if accumulate is not None:
        cfg.optim_wrapper.accumulative_counts = accumulate
    if not amp:
        return
    # bfloat16 has the range of float32: nothing underflows that a scale could save, and a scaler
    # would silently leave out each step whose gradient is NaN.
    scale = 'dynamic' if amp == 'fp16' else dict(enabled=False)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=AMP_DTYPES[amp], loss_scale=scale)


def require_amp(cfg: Config) -> None:
    """Refuse to train in mixed precision, whoever asks for it, where this machine cannot."""
    if cfg.optim_wrapper.get('type') != 'AmpOptimWrapper':
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError('amp-no-gpu')
    if cfg.optim_wrapper.get('dtype') == 'bfloat16' and not torch.cuda.is_bf16_supported():
        raise UserError('amp-no-bfloat16')


def require_loggers(cfg: Config) -> None:
    """Refuse a config that logs to what is not installed here."""
    from mmdet.registry import VISBACKENDS

    missing = []
    for backend in views.vis_backends(cfg):
        bases = inspect.getmro(VISBACKENDS.get(backend.get('type')) or object)
        packages = [name for base in bases for name in LOGGERS.get(base.__name__, ())]
        lacking = [name for name in packages if importlib.util.find_spec(name) is None]
        if lacking:
            missing.append(Message('logger-missing', type=backend['type'], packages=' '.join(lacking)))
    if missing:
        raise UserError('loggers-missing', problems=missing)


def set_saving(cfg: Config, every: int | None) -> None:
    """Save within an epoch too."""
    if every is None:
        return
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if hook.get('type') != 'SafeCheckpointHook':
        raise UserError('save-every-other-hook', type=hook.get('type'))
    hook['every_n_iters'] = every


def set_roi_align(cfg: Config) -> bool:
    """Pool regions as models of torchvision are trained to, unless the config says how.

    Returns:
        Whether it did not.
    """
    head = cfg.model.get('roi_head') or {}
    layers = [(head.get(name) or {}).get('roi_layer') for name in ('bbox_roi_extractor', 'mask_roi_extractor')]
    chosen = [layer for layer in layers if layer and layer.get('type') == 'RoIAlign' and 'aligned' not in layer]
    for layer in chosen:
        layer.update(sampling_ratio=2, aligned=False)
    return bool(chosen)


def set_test_only(cfg: Config) -> None:
    """Leave training and validation out, for a Runner that only tests."""
    cfg.resume, cfg.load_from = False, None
    for key in _OF_TRAINING + _OF_VALIDATION:
        cfg.pop(key, None)


def set_detection(cfg: Config, work_dir: str) -> None:
    """Let a test touch nothing of the run that trained the model: logs, curves, pictures."""
    cfg.test_evaluator = []  # the rows are evaluated later
    cfg.test_cfg = dict(type='TestLoop', fp16=(cfg.get('test_cfg') or {}).get('fp16', False))
    # The hooks of training would write into its folder, or change the model (EMA).
    cfg.custom_hooks = []
    cfg.default_hooks = dict(logger=None, checkpoint=None)
    cfg.visualizer = dict(type='Visualizer', vis_backends=[], name='evaluation')
    cfg.log_level = 'WARNING'
    cfg.work_dir = work_dir


def set_rehearsal(cfg: Config, work_dir: str, world: int) -> None:
    """Let a runner be built in one process, elsewhere and silently."""
    cfg.visualizer = dict(type='Visualizer', vis_backends=[])
    # One process with the images of all has as many steps.
    cfg.train_dataloader.batch_size *= world
    _set_aside(cfg, work_dir, 'rehearsal')


def set_probe(cfg: Config, work_dir: str, by_epoch: bool) -> None:
    """Let a run be short, elsewhere, silent and in one process, with no logger that could send it to a server."""
    _set_aside(cfg, work_dir, 'probe')
    cfg.resume, cfg.load_from = False, None
    cfg.default_hooks = {**(cfg.get('default_hooks') or {}), 'console': None}
    if visualizer := cfg.get('visualizer'):
        kept = [backend for backend in views.vis_backends(cfg) if backend['type'] in _LOCAL_LOGGERS]
        visualizer.vis_backends = [{**backend, 'save_dir': str(Path(work_dir, 'curves'))} for backend in kept]
    if by_epoch:
        cfg.train_cfg.max_epochs = 1  # the room for more is looked at by the forecast


def _set_aside(cfg: Config, work_dir: str, name: str) -> None:
    cfg.launcher, cfg.model_wrapper_cfg = 'none', None
    cfg.work_dir, cfg.log_level, cfg.experiment_name = work_dir, 'ERROR', name
