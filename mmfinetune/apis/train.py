"""The main job: prepare data and weights, train, test. Each tool of it is one call here."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.apis import run_data, run_weights
from mmfinetune.apis.testing import test_runner
from mmfinetune.config import load, lr, paths, views
from mmfinetune.config.options import AUTO, LOG_DIR, Options, apply
from mmfinetune.data.preflight import Split
from mmfinetune.engine import batch_size, compat, launch
from mmfinetune.evaluation import run_results
from mmfinetune.evaluation.compare import ZERO_SHOT
from mmfinetune.utils.dist import rank0_first, say
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_json
from mmfinetune.weights import find
from mmfinetune.weights import work_dir as weights_work_dir

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

    from mmfinetune.weights.check import WeightCheck


def check_early(options: Options) -> None:
    """What can be told before the imports, which take seconds.

    Raises:
        UserError: Options that contradict each other or name what is not there.
    """
    if options.weights and not find.is_url(options.weights):
        find.verify_file(Path(options.weights))
    if options.resume not in (False, True, AUTO) and not Path(options.resume).is_file():
        raise UserError(
            f'There is no checkpoint {options.resume} to resume from',
            cure='pass --resume alone to take the last one of the work dir',
        )
    if options.gpus and launch.is_worker() and not launch.was_launched():
        raise UserError(
            '--gpus is for a run that starts its own processes, and torchrun or srun has started this one',
            cure='drop --gpus: their number says it',
        )
    if options.resume and options.lr is not None:
        raise UserError(
            '--lr would have no effect: --resume goes on with the learning rate of the checkpoint',
            cure='drop --lr, or start anew from the weights',
        )
    for flag, value in (('--accumulate', options.accumulate), ('--save-every', options.save_every)):
        if value is not None and value < 1:
            raise UserError(f'{flag} {value}: pass a number of at least 1')
    size = options.batch_size
    if size not in (None, AUTO) and not (str(size).isdigit() and int(size) > 0):
        raise UserError(f'--batch-size {size}: pass a number of images per GPU, or auto')
    if size == AUTO and options.resume:
        raise UserError(
            '--batch-size auto and --resume exclude each other: a run goes on with the batch size that it began with',
            cure='drop --batch-size',
        )


EARLIER = 'earlier_runs'
TEST_RESULTS = 'test_results.json'


def run(options: Options) -> int:
    """Do what the options ask for; training and testing if they name no part.

    Returns:
        Exit code.

    Raises:
        UserError: Anything the user can mend, found before training where possible.
    """
    check_early(options)
    do_train, do_test = options.whole or options.train, options.whole or options.test
    gpus = 1 if launch.is_worker() else launch.processes(options.gpus)
    cfg = load.load(options.config, options.cfg_options)
    if gpus > 1 and (do_train or do_test):
        print(f'Starting {gpus} processes (--gpus 1 for one)', flush=True)
        return launch.launch(gpus, sys.argv)
    world = max(gpus, launch.join_group(cfg))
    if options.weights and find.is_url(options.weights):
        # Once, and not by every process into the same file.
        options.weights = str(rank0_first(lambda: find.fetch(options.weights)))
    apply(cfg, options, world)
    paths.redirect_annotations(cfg)
    paths.check_heads(cfg)
    start = None
    if options.check_weights:
        start = _check_weights(cfg, options.json)
        if not (options.train or options.test):
            return 0
    if do_train or do_test:
        rank0_first(lambda: _check_writable(Path(cfg.work_dir)))
    # Only rank 0 writes; the others wait until data and weights are there.
    full = options.check and (do_train or do_test)
    splits = rank0_first(lambda: run_data.prepare_data(cfg, do_train or options.dry_run, full))
    if options.batch_size == 'auto':
        cfg.train_dataloader.batch_size = rank0_first(lambda: batch_size.find(cfg))
    plan = lr.plan_lr(cfg, world, options.lr, options.scale_lr)
    adapted = lr.adapt_schedule(cfg, world, options.scale_lr)
    say(summary(cfg, splits, plan, world, adapted))
    if options.dry_run:
        say('Dry run: nothing was trained.')
        return 0
    cfg.optim_wrapper.optimizer.lr = plan.lr
    # Done here, since Runner.scale_lr leaves out the accumulation.
    cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or {}, enable=False)
    if do_train:
        runner = _train(cfg, start)
        if do_test:
            best = weights_work_dir.best_checkpoint(Path(cfg.work_dir))
            say(f'Testing {best}')
            runner.load_checkpoint(str(best), map_location='cpu')
            _test(runner, best)
    elif options.head_init:
        _test_untrained(cfg)
    else:
        chosen = options.checkpoint or options.weights
        file = Path(chosen) if chosen else weights_work_dir.best_checkpoint(Path(cfg.work_dir))
        _test(test_runner(cfg, run_weights.checkpoint_of(cfg, file)), file)
    work_dir = cfg.work_dir
    say(
        f'Results: {work_dir}'
        + (' (pictures in figures/)' if do_test else '')
        + f'\nCurves:  tensorboard --logdir {work_dir}/{LOG_DIR}'
    )
    return 0


def summary(cfg: Config, splits: dict[str, Split], plan: lr.LrPlan, world: int, adapted: Sequence[str] = ()) -> str:
    """Data sizes, steps and learning rates of a run, as text."""
    lines = [
        f'Data:  {name:5} {s.images:,} images, {s.annotations:,} objects, {len(s.classes)} classes ({s.path})'
        for name, s in splits.items()
    ]
    if 'train' in splits:
        batch = cfg.train_dataloader.batch_size
        filters = views.dataset_configs(cfg)['train'].get('filter_cfg') or {}
        kept, kind = (
            (splits['train'].usable, 'images with objects')
            if filters.get('filter_empty_gt')
            else (splits['train'].images, 'images')
        )
        epochs = cfg.train_cfg.get('max_epochs')
        if epochs:
            # Each process gets the same number of images, rounded up, as its sampler does it.
            steps = math.ceil(math.ceil(kept / world) / batch)
            lines.append(
                f'Steps: {kept:,} {kind} / ({world} GPU x {batch}) = '
                f'{steps:,} an epoch x {epochs} epochs = {steps * epochs:,}'
            )
        lines += plan.lines()
        lines += [f'Schedule for this batch: {line}' for line in adapted]
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
        raise UserError(
            f'Cannot write to the work dir {work_dir}: {error.strerror}',
            cure='pass a folder that you may write to with --work-dir',
        ) from None


def _move_earlier_run(work_dir: Path) -> None:
    """Set an earlier run aside, or its curves and best checkpoint would mix with the new ones."""
    if not work_dir.is_dir():
        return
    # A test of the untrained model is epoch 0 of the run to come.
    old = [p for p in work_dir.iterdir() if p.name not in (EARLIER, paths.ANNOTATIONS, ZERO_SHOT)]
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
        say(f'{work_dir} held an earlier run: it is now in {target}. To go on with a run instead, pass --resume.')


def _train(cfg: Config, start: WeightCheck | None) -> Runner:
    from mmengine.dist import barrier

    from mmfinetune.engine.hooks.stop import stoppable
    from mmfinetune.engine.runner import FineTuningRunner

    # What cannot start must not leave logs, nor move an earlier run out of its way.
    if cfg.resume:
        run_weights.checkpoint_of(cfg, Path(cfg.load_from))
    else:
        if cfg.get('weights'):
            start = start or run_weights.start_of(cfg)
            start.require_good()
            cfg.weights.checkpoint = str(start.source.path)
        rank0_first(lambda: _move_earlier_run(Path(cfg.work_dir)))
    barrier()
    runner = FineTuningRunner.from_cfg(cfg)
    runner.start = start
    try:
        with stoppable(runner):
            runner.train()
    except Exception as error:
        explained = _explained(error, cfg)
        if explained is error:
            raise
        raise explained from error
    say(f'Trained; checkpoints in {cfg.work_dir}')
    return runner


def _explained(error: Exception, cfg: Config) -> Exception:
    """The error itself, but of memory that ran out what would help, in numbers."""
    import torch

    on_cpu = compat.is_out_of_cpu_memory(error)
    if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
        return error
    batch = cfg.train_dataloader.batch_size
    accumulation = cfg.optim_wrapper.get('accumulative_counts', 1)
    half = max(1, batch // 2)
    cures = (
        [
            f'--batch-size {half} --accumulate {math.ceil(batch * accumulation / half)}: the same '
            f'recipe at {half / batch:.0%} of the activations'
        ]
        if batch > 1
        else []
    )
    if not on_cpu and cfg.optim_wrapper.type != 'AmpOptimWrapper':
        cures.append('--amp bf16 (or fp16): activations of half the size')
    scale = next(
        (
            t['scale']
            for t in cfg.train_dataloader.dataset.get('pipeline', ())
            if t['type'] == 'Resize' and 'scale' in t
        ),
        None,
    )
    if scale:
        smaller = tuple(round(side * 0.7) for side in scale)
        cures.append(f'Resize to scale={smaller} instead of {tuple(scale)} in the pipelines: half the pixels')
    if not cfg.model.get('backbone', {}).get('with_cp'):
        cures.append(
            '--cfg-options model.backbone.with_cp=True: the backbone computes its '
            'activations again instead of keeping them; slower, the same result'
        )
    return UserError(
        f'Out of memory with {batch} images at a time ({str(error).strip().splitlines()[0]}). What helps:',
        cures,
        'try them from the top; `--batch-size auto` finds the largest that fits a GPU',
    )


def _test_untrained(cfg: Config) -> None:
    """Test the model as training would start from it."""
    start = run_weights.start_of(cfg)
    if start.plan.class_map is not None:
        say('\n'.join(start.plan.class_map.lines()))
    _test(test_runner(cfg, start), start.source.path, ZERO_SHOT)


def _check_weights(cfg: Config, as_json: bool) -> WeightCheck:
    """Print where each part of the model comes from.

    Raises:
        UserError: The weights should not be trained on.
    """
    if not cfg.get('weights'):
        raise UserError(
            'check-weights-none',
            'This config starts from random weights: there is nothing to check',
            hint='use a config with `weights`',
        )
    start = run_weights.start_of(cfg)
    say(json.dumps(start.as_dict(), indent=1) if as_json else start.text())
    start.require_good()
    if not as_json:
        say('OK: these weights can be used for training.')
    return start


def _test(runner: Runner, file: Path, name: str = TEST_RESULTS) -> dict[str, float]:
    """Test, print the headline numbers and write all of them to a file of the work dir."""
    from mmengine.dist import is_main_process

    from mmfinetune.engine.train_loop import translate_system_errors

    with translate_system_errors():
        metrics = runner.test()
    if is_main_process():
        out = Path(runner.work_dir) / name
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        atomic_write_json(out, {'checkpoint': str(file), 'metrics': finite})
        if name == TEST_RESULTS:
            run_results.report_test(
                Path(runner.work_dir), file, metrics, run_results.per_class_of(runner.test_evaluator, metrics)
            )
        rows = [
            f'{name:6}' + ''.join(f'{metrics.get(f"coco/{kind}_{stat}", math.nan):9.3f}' for stat in _HEADLINE)
            for name, kind in (('boxes', 'bbox'), ('masks', 'segm'))
        ]
        say(f'{"test":6}' + ''.join(f'{stat:>9}' for stat in _HEADLINE))
        say('\n'.join(rows))
        say(f'segm AP50 = {metrics.get("coco/segm_mAP_50", math.nan):.3f}   (all numbers: {out})')
    return metrics


_HEADLINE = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def read_results(work_dir: Path) -> dict:
    """What ``_test`` wrote."""
    return json.loads((Path(work_dir) / TEST_RESULTS).read_text())
