"""What the command line of the training tool says, put into a config. It wins over the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune import checkpoint, data, launch, weights
from mmfinetune.errors import UserError
from mmfinetune.ranks import rank0_first, say

if TYPE_CHECKING:
    from mmengine.config import Config

LOG_DIR = 'tensorboard_logs'
BOARD = 'BoardBackend'
AUTO = 'auto'
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
    head_init: str | None = None
    data_root: str | None = None
    work_dir: str | None = None
    resume: str | bool = False
    gpus: str | None = None
    batch_size: str | None = None
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


def check_early(options: Options) -> None:
    """What can be told before the imports, which take seconds.

    Raises:
        UserError: Options that contradict each other or name what is not there.
    """
    if options.weights and not weights.is_url(options.weights):
        checkpoint.verify_file(Path(options.weights))
    if options.resume not in (False, True, AUTO) and not Path(options.resume).is_file():
        raise UserError(f'There is no checkpoint {options.resume} to resume from',
                        cure='pass --resume alone to take the last one of the work dir')
    if options.gpus and launch.is_worker() and not launch.was_launched():
        raise UserError('--gpus is for a run that starts its own processes, and torchrun or srun '
                        'has started this one', cure='drop --gpus: their number says it')
    if options.resume and options.lr is not None:
        raise UserError('--lr would have no effect: --resume goes on with the learning rate of '
                        'the checkpoint', cure='drop --lr, or start anew from the weights')
    for flag, value in (('--accumulate', options.accumulate), ('--save-every', options.save_every)):
        if value is not None and value < 1:
            raise UserError(f'{flag} {value}: pass a number of at least 1')
    size = options.batch_size
    if size not in (None, AUTO) and not (size.isdigit() and int(size) > 0):
        raise UserError(f'--batch-size {size}: pass a number of images per GPU, or auto')
    if size == AUTO and options.resume:
        raise UserError('--batch-size auto and --resume exclude each other: a run goes on with the '
                        'batch size that it began with', cure='drop --batch-size')


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
        data.set_data_root(cfg, Path(options.data_root))
    starts = options.train or not options.test or options.head_init
    if (options.weights or options.head_init) and starts:
        if not cfg.get('weights'):
            raise UserError(f'{options.config} starts from random weights: it has no `weights`, so '
                            'it can take neither --weights nor --head-init',
                            cure='use a config with `weights`, e.g. '
                            'configs/mask_rcnn_voc_pretrained.py')
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
            raise UserError('--save-every needs default_hooks.checkpoint of type '
                            f'SafeCheckpointHook, not {cfg.default_hooks.checkpoint.type}',
                            cure='inherit configs/_base_/runtime.py, or drop --save-every')
        cfg.default_hooks.checkpoint.every_n_iters = options.save_every
    if options.amp:
        _set_amp(cfg, options.amp)
    if options.resume:
        _set_resume(cfg, options, world)


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


def _set_resume(cfg: Config, options: Options, world: int) -> None:
    if options.resume not in (True, AUTO):
        path = Path(options.resume)
        meta = _meta_of_run(path)
    else:
        # One choice for all, made before any process writes there again.
        path, meta = rank0_first(lambda: _last_whole(Path(cfg.work_dir), options.resume == AUTO))
    if path is None:
        say(f'There is nothing to resume in {cfg.work_dir}: the run begins')
        return
    cfg.resume = True
    cfg.load_from = str(path)
    _check_recipe(path, meta.get('recipe'), recipe(cfg, world))
    if meta.get('seed') is not None:
        # What is drawn in each step follows from it.
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=meta['seed'])


def _last_whole(work_dir: Path, may_lack: bool = False) -> tuple[Path | None, dict]:
    """The newest checkpoint that can be resumed, and its ``meta``; tells of damaged newer ones.

    None where there is no checkpoint and ``may_lack``.
    """
    damaged = []
    for path in checkpoint.candidates(work_dir):
        try:
            meta = _meta_of_run(path)
        except UserError as error:
            damaged.append(error)
            continue
        if damaged:
            say('\n'.join(['Damaged, so an older checkpoint is taken:',
                           *(f'  - {error.message}' for error in damaged)]))
        say(f'Resuming {path}')
        return path, meta
    if may_lack and not damaged:
        return None, {}
    if len(damaged) == 1:
        raise damaged[0]
    raise UserError(f'There is nothing to resume in {work_dir}', [e.message for e in damaged],
                    'drop --resume, or pass the checkpoint: --resume PATH')


def _meta_of_run(path: Path) -> dict:
    """The ``meta`` of a checkpoint; raises a UserError unless it holds a run."""
    # The safe way; MMEngine would unpickle anything if that fails.
    loaded = checkpoint.read_checkpoint(path)
    missing = [k for k in ('state_dict', 'meta', 'optimizer', 'message_hub') if k not in loaded]
    if missing:
        raise UserError(f'{path} holds no run to resume; it lacks:', missing,
                        'pass a checkpoint of a run (epoch_*.pth), or start from it: --weights')
    if 'config' in loaded['meta']:
        # Runner.resume would run this text as Python; MMEngine's own files do not have it.
        raise UserError(f'{path} is refused: it holds a config, which is code',
                        cure='resume from a checkpoint of your own run')
    return loaded['meta']


def recipe(cfg: Config, world: int) -> dict[str, int]:
    """What steps and learning rate follow from."""
    return {'processes': world, 'batch_size': cfg.train_dataloader.batch_size,
            'accumulation': cfg.optim_wrapper.get('accumulative_counts', 1)}


def _check_recipe(path: Path, before: dict | None, now: dict[str, int]) -> None:
    """Refuse another batch: optimizer, schedule and the place in the epoch come from the file."""
    def key(of: dict) -> tuple:
        return of['processes'] * of['batch_size'], of['accumulation']

    if not before or key(before) == key(now):
        return

    def text(of: dict) -> str:
        return (f'{of["processes"]} processes x {of["batch_size"]} images x {of["accumulation"]} '
                'accumulation')

    images = before['processes'] * before['batch_size']
    same = f'--gpus {before["processes"]} --batch-size {before["batch_size"]}'
    if images % now['processes'] == 0:
        same = f'--batch-size {images // now["processes"]}'
    raise UserError(
        f'{path} comes from a run of {text(before)}, and this one has {text(now)}: the steps of an '
        'epoch and the learning rate would not be those of the checkpoint',
        cure=f'{same} --accumulate {before["accumulation"]} has the same steps; --weights {path} '
        'without --resume starts anew from its weights')
