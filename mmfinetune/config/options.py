"""What the command line of the training tool says, put into a config. It wins over the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.config import paths
from mmfinetune.config.resume import AUTO, set_resume
from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

LOG_DIR = 'tensorboard_logs'
BOARD = 'TensorBoardBackend'
AMP_DTYPES = {'fp16': 'float16', 'bf16': 'bfloat16'}


@dataclass
class Options:
    """What the command line says; see ``tools/train_pretrained.py --help``."""

    config: str
    check_weights: bool = False
    json: bool = False
    train: bool = False
    test: bool = False
    dry_run: bool = False
    check: bool = True
    weights: str | None = None
    checkpoint: str | None = None
    head_init: str | None = None
    data_root: str | Path | None = None
    work_dir: str | None = None
    resume: str | bool = False
    gpus: str | None = None
    batch_size: int | str | None = None
    accumulate: int | None = None
    amp: str | None = None
    lr: float | None = None
    scale_lr: bool = True
    save_every: int | None = None
    cfg_options: Sequence[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether no part is named: train, then test."""
        return not (self.check_weights or self.train or self.test or self.dry_run)


def apply(cfg: Config, options: Options, world: int) -> None:
    """Put the options into a resolved config.

    Args:
        cfg: Changed in place.
        options: Of the command line.
        world: Number of processes.

    Raises:
        UserError: An option that this config or machine cannot follow.
    """
    if options.work_dir:
        cfg.work_dir = options.work_dir
    for backend in cfg.get('visualizer', {}).get('vis_backends', []):
        if backend['type'] in (BOARD, 'TensorboardVisBackend'):
            backend['save_dir'] = str(Path(cfg.work_dir) / LOG_DIR)
    if options.data_root:
        paths.set_data_root(cfg, Path(options.data_root))
    starts = options.train or not options.test or options.head_init
    if (options.weights or options.head_init) and starts:
        if not cfg.get('weights'):
            raise UserError(
                f'{options.config} starts from random weights: it has no `weights`, so '
                'it can take neither --weights nor --head-init',
                cure='use a config with `weights`, e.g. configs/mask_rcnn_voc_pretrained.py',
            )
        if options.head_init:
            cfg.weights.head_init = options.head_init
        if options.weights:
            cfg.weights.update(checkpoint=options.weights, url=None, fallbacks=[])
    if options.batch_size not in (None, AUTO):
        cfg.train_dataloader.batch_size = int(options.batch_size)
    if options.accumulate:
        cfg.optim_wrapper.accumulative_counts = options.accumulate
    if options.save_every:
        if cfg.default_hooks.checkpoint.type != 'SafeCheckpointHook':
            raise UserError(
                '--save-every needs default_hooks.checkpoint of type '
                f'SafeCheckpointHook, not {cfg.default_hooks.checkpoint.type}',
                cure='inherit configs/_base_/runtime.py, or drop --save-every',
            )
        cfg.default_hooks.checkpoint.every_n_iters = options.save_every
    if options.amp:
        _set_amp(cfg, options.amp)
    if options.resume:
        set_resume(cfg, options.resume, world)


def _set_amp(cfg: Config, kind: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError('--amp needs a CUDA GPU, and PyTorch sees none here', cure='drop --amp')
    if kind == 'bf16' and not torch.cuda.is_bf16_supported():
        raise UserError('This GPU has no bfloat16', cure='use --amp fp16')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.dtype = AMP_DTYPES[kind]
    # bfloat16 has the range of float32: nothing underflows that a scale could save, and a scaler
    # would silently leave out each step whose gradient is NaN.
    cfg.optim_wrapper.loss_scale = 'dynamic' if kind == 'fp16' else dict(enabled=False)
