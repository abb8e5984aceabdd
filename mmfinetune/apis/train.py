"""The main job: prepare data and weights, train, test. Each tool of it is one call here."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.apis import run_data, run_weights
from mmfinetune.apis.diagnose import diagnose
from mmfinetune.apis.testing import test_runner
from mmfinetune.config import load, paths, schedule, views
from mmfinetune.config.resolve import AUTO, LOG_DIR, Options, RunPlan, resolve
from mmfinetune.data.preflight import Split
from mmfinetune.engine import batch_size, compat, launch
from mmfinetune.evaluation import run_results
from mmfinetune.evaluation.compare import ZERO_SHOT
from mmfinetune.utils import console, run_lock
from mmfinetune.utils.dist import rank0_first, say
from mmfinetune.utils.download import OFFLINE
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.extras import extra
from mmfinetune.utils.files import atomic_write_json, require_writable
from mmfinetune.utils.processes import environment
from mmfinetune.utils.run_lock import RunLock
from mmfinetune.weights import find
from mmfinetune.weights import work_dir as weights_work_dir

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

    from mmfinetune.engine.runner import FineTuningRunner
    from mmfinetune.weights.check import WeightCheck

EARLIER = 'earlier_runs'
TEST_RESULTS = 'test_results.json'


def run(options: Options) -> int:
    """Do what the options ask for; training and testing if they name no part.

    Returns:
        Exit code.

    Raises:
        UserError: Anything the user can fix, found before training where possible.
    """
    begun = time.perf_counter()
    check_early(options)
    console.status('Loading PyTorch…')
    launch.take_place()
    with RunLock() as lock, _leaving_nothing() if options.dry_run else contextlib.nullcontext() as folder:
        return _run(options, folder, lock, begun)


def _run(options: Options, trial: Path | None, lock: RunLock, begun: float) -> int:
    """See `run`; a dry run has a folder for what would be made."""
    gpus = 1 if launch.is_worker() else launch.processes(options.gpus)
    if gpus > 1 and (options.trains or options.tests) and not options.dry_run:
        load.load(options.config, options.cfg_options)  # what is wrong with it is shown before processes start
        print(f'Starting {gpus} processes (--gpus 1 for one)', flush=True)
        return launch.launch(gpus, sys.argv)

    def join(cfg: Config) -> int:
        world = max(gpus, launch.join_group(cfg))
        # Before anything is read that another run may change. A new folder is made when all is known to be right.
        work_dir = Path(options.work_dir or cfg.work_dir)
        if (options.trains or options.tests) and not trial:
            # One process looks for all, or they would not wait for the same.
            rank0_first(lambda: lock.take(work_dir) if work_dir.is_dir() else None)
        return world

    def planned(options: Options) -> RunPlan:
        plan = resolve(options, join)
        if trial:
            to_make.update(run_data.set_trial_data(plan.cfg, trial))
        return plan

    to_make: dict[str, Path] = {}
    plan = planned(options)
    start = _check_weights(plan.cfg, options.json) if options.check_weights else None
    if start and not (options.trains or options.tests or (options.dry_run and not options.json)):
        return 0
    # Only rank 0 writes; the others wait until the data are there.
    splits = rank0_first(lambda: _prepare(plan))
    if options.batch_size == AUTO:
        size = rank0_first(lambda: batch_size.find(plan.cfg))
        plan = planned(dataclasses.replace(options, batch_size=size))
    if trial:
        _dry_run(plan, splits, to_make, start, trial, time.perf_counter() - begun)
        return 0
    runner = _build(plan, start, lock) if options.trains else None
    say(summary(plan, splits, schedule.course_of(runner) if runner else None))
    if runner is not None:
        if runner.start and not options.check_weights:
            say(runner.start.summary())
        _train(plan.cfg, runner)
    if options.tests:
        _test(plan, runner, lock)
    if runner is not None:
        diagnose(runner, options)
    _say_where(Path(plan.cfg.work_dir), options)
    return 0


def _say_where(folder: Path, options: Options) -> None:
    say(f'Results: {folder}{" (pictures in figures/)" if options.tests and (folder / "figures").is_dir() else ""}')
    if (folder / LOG_DIR).is_dir():
        say(f'Curves:  tensorboard --logdir {folder / LOG_DIR}')


@contextlib.contextmanager
def _leaving_nothing() -> Iterator[Path]:
    """A folder for all that is written, libraries' caches too; it is gone in the end."""
    with tempfile.TemporaryDirectory(prefix='mmfinetune_') as folder:
        caches = dict.fromkeys(('MPLCONFIGDIR', 'TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR'), folder)
        with environment({OFFLINE: '1', **caches}):
            yield Path(folder)


def check_early(options: Options) -> None:
    """What can be told before the imports, which take seconds.

    Raises:
        UserError: Options that contradict each other or name what is not there.
    """
    resumes = options.resume is not False
    if isinstance(options.resume, str) and options.resume != AUTO and not Path(options.resume).is_file():
        raise UserError('resume-missing', path=options.resume)
    if options.gpus and launch.is_worker() and not launch.was_launched():
        raise UserError('gpus-already-started')
    if options.probe and not options.dry_run:
        raise UserError('probe-without-dry-run')
    if options.new_schedule and not resumes:
        raise UserError('new-schedule-without-resume')
    if resumes and options.lr is not None and not options.new_schedule:
        raise UserError('resume-with-lr')
    if resumes and options.batch_size == AUTO:
        raise UserError('resume-with-auto-batch')
    if options.checkpoint and (options.trains or not options.tests):
        raise UserError('checkpoint-without-test')
    for file in (options.weights, options.checkpoint):
        if file and not find.is_url(file):
            find.verify_file(Path(file))


def _prepare(plan: RunPlan) -> dict[str, Split]:
    """Make sure that results can be written, then make, read and check the data."""
    options = plan.options
    runs = options.trains or options.tests
    if runs:
        require_writable(Path(plan.cfg.work_dir))
    full, keeps = options.check and runs, not options.dry_run
    return run_data.prepare_data(plan.cfg, options.trains or options.dry_run, full, keeps)


def summary(plan: RunPlan, splits: Mapping[str, Split], course: schedule.Course | None) -> str:
    """Data sizes, steps and learning rates of a run, as text."""
    data, cfg = _data_lines(splits), plan.cfg
    if course is None:
        return '\n'.join(data)
    parts = [split for name, split in splits.items() if views.split_of(name) == 'train']
    kinds = {sum(s.usable for s in parts): 'images with objects', sum(s.images for s in parts): 'images'}
    kind = kinds.get(course.samples, 'samples')  # with `indices`, or wrappers that repeat
    lines = list(plan.resumed)
    line = f'{course.samples:,} {kind} / ({plan.world} GPU x {cfg.train_dataloader.batch_size}) = {course.steps:,} an epoch'
    line += f' x {course.epochs} epochs = {course.total:,}' if course.epochs else f', {course.total:,} in all'
    lines += [f'Steps: {line}', *plan.rates.lines(), course.line(plan.rates.lr)]
    lines += [f'Schedule for this batch: {line}' for line in plan.adapted]
    lines += [f'warning: {message}' for message in course.warnings(cfg, plan.rates.lr)]
    return '\n'.join([*data, console.wrapped('\n'.join(lines), ' ' * 7)])


def _data_lines(splits: Mapping[str, Split]) -> list[str]:
    """The sizes of the splits, and their files; the folder by itself where that makes the lines fit."""
    width = max(5, *map(len, splits))

    def lines(files: Iterable[object]) -> list[str]:
        return [
            f'Data:  {name:{width}} {s.images:,} images, {s.annotations:,} objects, {len(s.classes)} classes ({file})'
            for (name, s), file in zip(splits.items(), files, strict=True)
        ]

    whole = lines(s.path for s in splits.values())
    folders = {s.path.parent for s in splits.values()}
    if len(folders) > 1 or max(map(len, whole)) <= console.WIDTH:
        return whole
    return [*lines(s.path.name for s in splits.values()), f'       in {folders.pop()}']


def _dry_run(
    plan: RunPlan,
    splits: Mapping[str, Split],
    to_make: Mapping[str, Path],
    start: WeightCheck | None,
    trial: Path,
    startup: float,
) -> None:
    from mmfinetune.engine.runner import rehearse

    options = plan.options
    # YAPF, with which MMEngine writes configs, keeps its grammar there.
    with environment({'XDG_CACHE_HOME': str(trial)}):
        course = rehearse(plan.cfg, plan.world)
    if not (options.probe and options.json):  # then JSON is all that is printed
        if to_make:
            say('Data:  not made yet; training will make it:')
        splits = {name: dataclasses.replace(s, path=to_make.get(name, s.path)) for name, s in splits.items()}
        say(summary(plan, splits, course))
    if options.probe:
        from mmfinetune.apis.probe import probe

        with _explaining(plan.cfg):
            found = probe(plan, course, startup, start)
        if options.json:
            say(json.dumps(found.as_dict(), indent=1))
            return
        say('\n'.join(found.lines()))
    say('Dry run: nothing was trained.')


def _move_earlier_run(work_dir: Path, log_dir: Path) -> None:
    """Set an earlier run aside, or its curves and best checkpoint would mix with those of the run that logs here."""
    if not work_dir.is_dir():
        return
    # A test of the untrained model is epoch 0 of the run to come.
    old = [
        p
        for p in work_dir.iterdir()
        if p.name not in (EARLIER, paths.ANNOTATIONS, ZERO_SHOT, run_lock.NAME, log_dir.name)
    ]
    if any(p.suffix == '.pth' for p in old) or (work_dir / LOG_DIR).exists():
        stamp = work_dir / EARLIER / time.strftime('%Y%m%d_%H%M%S')
        more = (stamp.with_name(f'{stamp.name}_{count}') for count in itertools.count(2))
        target = next(path for path in itertools.chain([stamp], more) if not path.exists())
        target.mkdir(parents=True)
        for path in old:
            shutil.move(path, target / path.name)
        text = f'{work_dir} held an earlier run: it is now in {target}. To continue a run instead, pass --resume.'
        say(console.wrapped(text))


def _build(plan: RunPlan, start: WeightCheck | None, lock: RunLock) -> FineTuningRunner:
    """Build all of a run. What cannot start leaves no logs, and does not move an earlier run out of its way."""
    from mmengine.dist import barrier, is_main_process

    from mmfinetune.engine.runner import FineTuningRunner

    cfg = plan.cfg
    if cfg.resume:
        run_weights.checkpoint_of(cfg, Path(cfg.load_from))
    elif cfg.get('weights'):
        start = start or run_weights.start_of(cfg)
        start.require_good()
        cfg.weights.checkpoint = str(start.source.path)
    rank0_first(lambda: lock.take(Path(cfg.work_dir)))
    barrier()
    work_dir = Path(cfg.work_dir)
    logs = f'{"[0-9]" * 8}_{"[0-9]" * 6}'  # MMEngine's folder; others may write into the work dir at this time
    before = set(work_dir.glob(logs))
    try:
        with _explaining(cfg):
            runner = FineTuningRunner.from_cfg(cfg)
            runner.start, runner.new_schedule = start, plan.options.new_schedule
            runner.build()
    except BaseException:
        if is_main_process():
            for path in set(work_dir.glob(logs)) - before:
                shutil.rmtree(path, ignore_errors=True)
        raise
    return runner


def _train(cfg: Config, runner: FineTuningRunner) -> None:
    from mmengine.dist import barrier

    from mmfinetune.engine.hooks.stop import stoppable

    if not cfg.resume:
        rank0_first(lambda: _move_earlier_run(Path(cfg.work_dir), Path(runner.log_dir)))
    barrier()
    with _explaining(cfg), stoppable(runner):
        runner.train()


@contextlib.contextmanager
def _explaining(cfg: Config) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        explained = _explained(error, cfg)
        if explained is error:
            raise
        raise explained from error


def _explained(error: Exception, cfg: Config) -> Exception:
    """The error itself, or for memory that ran out an error with settings that reduce memory, in numbers."""
    import torch

    on_cpu = compat.is_out_of_cpu_memory(error)
    if not isinstance(error, torch.OutOfMemoryError) and not on_cpu:
        return error
    batch = cfg.train_dataloader.batch_size
    helps = []
    if batch > 1:
        half = batch // 2
        steps = math.ceil(batch * cfg.optim_wrapper.get('accumulative_counts', 1) / half)
        helps.append(Message('memory-batch', half=half, steps=steps, share=half / batch))
    if not on_cpu and cfg.optim_wrapper.type != 'AmpOptimWrapper':
        helps.append(Message('memory-amp'))
    steps = [step for _, dataset in views.parts_of(cfg, 'train') for step in dataset.get('pipeline', ())]
    scale = next((step['scale'] for step in steps if step['type'] == 'Resize' and 'scale' in step), None)
    if scale:
        smaller = tuple(round(side * 0.7) for side in scale)
        helps.append(Message('memory-scale', smaller=smaller, scale=tuple(scale)))
    if not cfg.model.get('backbone', {}).get('with_cp'):
        helps.append(Message('memory-checkpointing'))
    return UserError('out-of-memory', problems=helps, batch=batch, why=str(error).strip().splitlines()[0])


def _check_weights(cfg: Config, as_json: bool) -> WeightCheck:
    """Print where each part of the model comes from.

    Raises:
        UserError: The weights should not be trained on.
    """
    if not cfg.get('weights'):
        raise UserError('check-without-weights')
    start = run_weights.start_of(cfg)
    say(json.dumps(start.as_dict(), indent=1) if as_json else start.text())
    start.require_good()
    if not as_json:
        say('OK: these weights can be used for training.')
    return start


def _test(plan: RunPlan, trained: Runner | None, lock: RunLock) -> None:
    """Test what was trained, the model as training would start from it, or the best checkpoint."""
    cfg, options, name = plan.cfg, plan.options, TEST_RESULTS
    if trained is not None:
        file = weights_work_dir.best_checkpoint(Path(cfg.work_dir))
        say(f'Testing {file}')
        trained.load_checkpoint(str(file))
        _measure(trained, file)
        return
    if options.head_init:
        start, name = run_weights.start_of(cfg), ZERO_SHOT
        file = start.source.path
        if start.plan.class_map is not None:
            say('\n'.join(start.plan.class_map.lines()))
        say('\n'.join(f'note: {note}' for note in start.source.notes if note.code == 'weights-roi-align'))
    else:
        file = plan.checkpoint or weights_work_dir.best_checkpoint(Path(cfg.work_dir))
        start = run_weights.checkpoint_of(cfg, file)
    start.require_good()
    rank0_first(lambda: lock.take(Path(cfg.work_dir)))
    _measure(test_runner(cfg, start), file, name)


def _measure(runner: Runner, file: Path, name: str = TEST_RESULTS) -> None:
    """Test, print the headline numbers and write all of them to a file of the work dir."""
    from mmengine.dist import is_main_process

    from mmfinetune.engine.train_loop import translate_system_errors

    with translate_system_errors(runner.work_dir):
        metrics = runner.test()
    if is_main_process():
        headline = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        say(f'{"test":6}' + ''.join(f'{stat:>9}' for stat in headline))
        for row, kind in (('boxes', 'bbox'), ('masks', 'segm')):
            say(f'{row:6}' + ''.join(f'{metrics.get(f"coco/{kind}_{stat}", math.nan):9.3f}' for stat in headline))
        folder, where = Path(runner.work_dir), ''
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        with extra(folder / name):
            atomic_write_json(folder / name, {'checkpoint': str(file), 'metrics': finite})
            where = f'   (all numbers: {console.near(folder / name)})'
        say(f'segm AP50 = {metrics.get("coco/segm_mAP_50", math.nan):.3f}{where}')
        if name == TEST_RESULTS:
            with extra(run_results.SUMMARY):
                per_class = run_results.per_class_of(runner.test_evaluator, metrics)
                run_results.report_test(folder, file, metrics, per_class)
