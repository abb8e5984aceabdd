"""The main job: prepare data and weights, train, test. Each tool of it is one call here."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune import checkpoint, coco, config, data, lr, transfer, weights
from mmfinetune.errors import UserError
from mmfinetune.files import atomic_write_json
from mmfinetune.ranks import join_group, rank0_first, say

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

EARLIER = 'earlier_runs'
LOG_DIR = 'tensorboard_logs'
ZERO_SHOT = 'zero_shot.json'


@dataclass
class Options:
    """What the command line says; see ``tools/train_pretrained.py --help``."""

    config: str
    check_weights: bool = False
    json: bool = False
    train: bool = False
    test: bool = False
    dry_run: bool = False
    weights: str | None = None
    head_init: str | None = None
    data_root: str | None = None
    work_dir: str | None = None
    resume: str | bool = False
    amp: bool = False
    lr: float | None = None
    scale_lr: bool = True
    cfg_options: Sequence[str] = field(default_factory=list)


def run(options: Options) -> int:
    """Do what the options ask for; training and testing if they name no part.

    Returns:
        Exit code.

    Raises:
        UserError: Anything the user can mend, found before training where possible.
    """
    if options.weights and not weights.is_url(options.weights):
        # Before the imports, which take seconds.
        checkpoint.verify_file(Path(options.weights))
    if options.resume and options.resume is not True and not Path(options.resume).is_file():
        raise UserError(f'There is no checkpoint {options.resume} to resume from',
                        cure='pass --resume alone to take the last one of the work dir')
    if options.resume and options.lr is not None:
        raise UserError('--lr would have no effect: --resume goes on with the learning rate of '
                        'the checkpoint', cure='drop --lr, or start anew from the weights')
    cfg = config.load(options.config, options.cfg_options)
    whole = not (options.check_weights or options.train or options.test or options.dry_run)
    world = join_group(cfg)
    if options.weights and weights.is_url(options.weights):
        # Once, and not by every process into the same file.
        options.weights = str(rank0_first(lambda: weights.fetch(options.weights)))
    _apply(cfg, options)
    data.redirect_annotations(cfg)
    data.check_heads(cfg)
    if options.check_weights:
        _check_weights(cfg, options.json)
        if not (options.train or options.test):
            return 0
    do_train, do_test = whole or options.train, whole or options.test
    if do_train or do_test:
        rank0_first(lambda: _check_writable(Path(cfg.work_dir)))
    # Only rank 0 writes; the others wait until data and weights are there.
    splits = rank0_first(lambda: data.prepare_data(cfg, train=do_train or options.dry_run))
    plan = lr.plan_lr(cfg, world, options.lr, options.scale_lr)
    say(summary(cfg, splits, plan, world))
    if options.dry_run:
        say('Dry run: nothing was trained.')
        return 0
    cfg.optim_wrapper.optimizer.lr = plan.lr
    # Done here, since Runner.scale_lr leaves out the accumulation.
    cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or {}, enable=False)
    if do_train:
        runner = _train(cfg)
        if do_test:
            best = checkpoint.best_checkpoint(Path(cfg.work_dir))
            say(f'Testing {best}')
            runner.load_checkpoint(str(best), map_location='cpu')
            _test(runner, best)
    elif options.head_init:
        _test_untrained(cfg)
    else:
        file = Path(options.weights) if options.weights else \
            checkpoint.best_checkpoint(Path(cfg.work_dir))
        _test(_test_runner(cfg, file), file)
    work_dir = cfg.work_dir
    say(f'Results: {work_dir}' + (' (pictures in figures/)' if do_test else '') +
         f'\nCurves:  tensorboard --logdir {work_dir}/{LOG_DIR}')
    return 0


def _apply(cfg: Config, options: Options) -> None:
    """Put command-line settings into the config; they win over it."""
    import torch
    if options.work_dir:
        cfg.work_dir = options.work_dir
    for backend in cfg.get('visualizer', {}).get('vis_backends', []):
        if backend['type'] == 'TensorboardVisBackend':
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
    if options.amp:
        if not torch.cuda.is_available():
            raise UserError('--amp needs a CUDA GPU, and PyTorch sees none here',
                            cure='drop --amp')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if options.resume:
        cfg.resume = True
        last = Path(options.resume) if options.resume is not True else _last(Path(cfg.work_dir))
        _check_resumable(last)
        cfg.load_from = str(last)


def _last(work_dir: Path) -> Path:
    file = checkpoint.last_checkpoint(work_dir)
    if file is None:
        raise UserError(f'There is nothing to resume in {work_dir}',
                        cure='drop --resume, or pass the checkpoint: --resume PATH')
    return file


def _check_resumable(path: Path) -> None:
    # MMEngine would unpickle anything if the safe way fails; this makes sure it does not.
    loaded = checkpoint.read_checkpoint(path)
    missing = [k for k in ('state_dict', 'meta', 'optimizer', 'message_hub') if k not in loaded]
    if missing:
        raise UserError(f'{path} holds no run to resume; it lacks:', missing,
                        'pass a checkpoint of a run (epoch_*.pth), or start from it: --weights')
    if 'config' in loaded['meta']:
        # Runner.resume would run this text as Python; MMEngine's own files do not have it.
        raise UserError(f'{path} is refused: it holds a config, which is code',
                        cure='resume from a checkpoint of your own run')


def summary(cfg: Config, splits: dict[str, coco.Split], plan: lr.LrPlan, world: int) -> str:
    """Data sizes, steps and learning rates of a run, as text."""
    lines = [f'Data:  {name:5} {s.images:,} images, {s.annotations:,} objects, '
             f'{len(s.classes)} classes ({s.path})' for name, s in splits.items()]
    if 'train' in splits:
        batch = cfg.train_dataloader.batch_size
        usable, epochs = splits['train'].usable, cfg.train_cfg.get('max_epochs')
        if epochs:
            # Each process gets the same number of images, rounded up, as its sampler does it.
            steps = math.ceil(math.ceil(usable / world) / batch)
            lines.append(f'Steps: {usable:,} images with objects / ({world} GPU x {batch}) = '
                         f'{steps:,} an epoch x {epochs} epochs = {steps * epochs:,}')
        lines.append(f'lr:    {plan.lr:g} = {plan.source}')
        lines += [f'         lr/{name:10} {value:g}' for name, value in plan.groups.items()]
    return '\n'.join(lines)


def _check_writable(work_dir: Path) -> None:
    """Try it; a folder made for the trial is taken away again, in case nothing comes of the run."""
    missing = [p for p in (work_dir, *work_dir.parents) if not p.exists()]
    probe = work_dir / f'.write_test_{os.getpid()}'
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        for folder in missing:
            folder.rmdir()
    except OSError as error:
        raise UserError(f'Cannot write to the work dir {work_dir}: {error.strerror}',
                        cure='pass a folder that you may write to with --work-dir') from None


def _move_earlier_run(work_dir: Path) -> None:
    """Set an earlier run aside, or its curves and best checkpoint would mix with the new ones."""
    if not work_dir.is_dir():
        return
    # A test of the untrained model is epoch 0 of the run to come.
    old = [p for p in work_dir.iterdir()
           if p.name not in (EARLIER, data.ANNOTATIONS, ZERO_SHOT)]
    if any(p.suffix == '.pth' for p in old) or (work_dir / LOG_DIR).exists():
        stamp = time.strftime('%Y%m%d_%H%M%S')
        target = work_dir / EARLIER / stamp
        for count in itertools.count(2):
            if not target.exists():
                break
            target = work_dir / EARLIER / f'{stamp}_{count}'
        target.mkdir(parents=True)
        for path in old:
            shutil.move(path, target / path.name)
        say(f'{work_dir} held an earlier run: it is now in {target}. To go on with a run '
             'instead, pass --resume.')


def _train(cfg: Config) -> Runner:
    from mmengine.dist import barrier
    from mmengine.runner import Runner
    # What cannot start must not leave logs, nor move an earlier run out of its way.
    if cfg.resume:
        weights.check(cfg, Path(cfg.load_from), {}).require_good()
    else:
        if cfg.get('weights'):
            check = weights.check(cfg)
            check.require_good()
            cfg.weights.checkpoint = str(check.path)
        rank0_first(lambda: _move_earlier_run(Path(cfg.work_dir)))
    barrier()
    runner = Runner.from_cfg(cfg)
    runner.train()
    say(f'Trained; checkpoints in {cfg.work_dir}')
    return runner


def _test_runner(cfg: Config, file: Path) -> Runner:
    """A runner for the test alone, the model loaded in full from a checkpoint."""
    from mmengine.model import is_model_wrapper
    # Before the Runner, which begins with a log file.
    weights.check(cfg, file, {}).require_good()
    runner = _bare_runner(cfg, None)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    transfer.transfer(model, file)
    return runner


def _bare_runner(cfg: Config, recipe: Any) -> Runner:
    """A runner without training and validation."""
    from mmengine.runner import Runner
    cfg.resume, cfg.load_from = False, None
    cfg.weights = recipe
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler',
                'val_dataloader', 'val_cfg', 'val_evaluator', 'auto_scale_lr'):
        cfg.pop(key, None)
    return Runner.from_cfg(cfg)


def _test_untrained(cfg: Config) -> None:
    """Test the model as training would start from it; WeightTransferHook brings the weights."""
    check = weights.check(cfg)
    check.require_good()
    if check.class_map is not None:
        say('\n'.join(check.class_map.lines()))
    cfg.weights.checkpoint = str(check.path)
    _test(_bare_runner(cfg, cfg.weights), check.path, ZERO_SHOT)


def _check_weights(cfg: Config, as_json: bool) -> None:
    """Print where each part of the model comes from.

    Raises:
        UserError: The weights should not be trained on.
    """
    if not cfg.get('weights'):
        raise UserError('This config starts from random weights: there is nothing to check',
                        cure='use a config with `weights`')
    check = weights.check(cfg)
    say(json.dumps(check.as_dict(), indent=1) if as_json else check.text())
    check.require_good()
    if not as_json:
        say('Verdict: good to train on.')


def _test(runner: Runner, file: Path, name: str = 'test_results.json') -> dict[str, float]:
    """Test, print the headline numbers and write all of them to a file of the work dir."""
    from mmengine.dist import is_main_process
    metrics = runner.test()
    if is_main_process():
        out = Path(runner.work_dir) / name
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        atomic_write_json(out, {'checkpoint': str(file), 'metrics': finite})
        rows = [f'{name:6}' + ''.join(f'{metrics.get(f"coco/{kind}_{stat}", math.nan):9.3f}'
                                      for stat in _HEADLINE)
                for name, kind in (('boxes', 'bbox'), ('masks', 'segm'))]
        say(f'{"test":6}' + ''.join(f'{stat:>9}' for stat in _HEADLINE))
        say('\n'.join(rows))
        say(f'segm AP50 = {metrics.get("coco/segm_mAP_50", math.nan):.3f}   '
             f'(all numbers: {out})')
    return metrics


_HEADLINE = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def read_results(work_dir: Path) -> dict:
    """What ``_test`` wrote."""
    return json.loads((Path(work_dir) / 'test_results.json').read_text())
