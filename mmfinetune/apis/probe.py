"""Runs a few steps and validation images of a training with all its hooks, in a temporary folder, and times them."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.apis import run_weights
from mmfinetune.apis.forecast import Forecast, Length, Measured, forecast, room, validations_of, with_loader
from mmfinetune.utils.errors import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmfinetune.config.resolve import RunPlan
    from mmfinetune.config.schedule import Course
    from mmfinetune.engine.runner import FineTuningRunner
    from mmfinetune.weights.check import WeightCheck

WARM_UP, STEPS = 2, 5
_VAL_IMAGES = 16
_LOAD_S = 20.0  # at most so long the loader is timed
# Validations of a trained model find about so many objects for each that is there.
_FOUND = 2


def probe(plan: RunPlan, course: Course, startup: float, start: WeightCheck | None) -> Forecast:
    """Forecast a training from some of its steps; nothing of them is kept.

    Args:
        plan: Of the run.
        course: Its length.
        startup: Seconds that the program has taken up to where training builds its runner.
        start: The weights that it starts from, where they have been looked at.
    """
    from mmfinetune.config.resolve import set_probe

    cfg = copy.deepcopy(plan.cfg)
    if start is None and cfg.get('weights'):
        with contextlib.suppress(UserError):  # still to be downloaded: random weights take as long
            start = run_weights.start_of(cfg)
    with tempfile.TemporaryDirectory(prefix='mmfinetune_probe_') as folder, contextlib.redirect_stdout(io.StringIO()):
        set_probe(cfg, folder, by_epoch=bool(course.epochs))
        measured, length = _measure(cfg, course, plan, start, startup)
    return forecast(measured, length, room(Path(plan.cfg.work_dir)))


def _measure(cfg: Config, course: Course, plan: RunPlan, start: Any, startup: float) -> tuple[Measured, Length]:
    from mmfinetune.engine.hooks.probe import Enough, ProbeHook
    from mmfinetune.engine.runner import FineTuningRunner

    begun = time.perf_counter()
    runner = FineTuningRunner.from_cfg(cfg)
    runner.start = start
    runner.build()
    hook = ProbeHook(min(WARM_UP + STEPS, course.steps))
    runner.register_hook(hook)
    with contextlib.suppress(Enough):
        runner.train()
    startup += hook.started - begun
    memory, on_gpu = _memory()
    warm = min(WARM_UP, len(hook.ends) - 1)
    step = statistics.fmean(e - b for b, e in zip(hook.begins[warm:], hook.ends[warm:], strict=True))
    loader, wait = _time_loader(runner.train_dataloader)
    end = _timed(lambda: _end_epoch(runner))
    val: dict[str, Any] = dict.fromkeys(('image', 'evaluate', 'evaluate_image', 'validation_end'), 0.0)
    if runner.val_loop is not None:
        val = _time_validation(runner)
    workers = runner.train_dataloader.num_workers
    usual = with_loader(step, loader, workers) * max(warm, 1)
    first = max(0.0, hook.ends[max(warm, 1) - 1] - hook.started - usual)
    sizes = _sizes(runner, Path(cfg.work_dir))
    measured = Measured(
        startup, first, step, loader, wait if workers else 0.0, end, **val, memory=memory, on_gpu=on_gpu, **sizes
    )
    return measured, _length(runner, course, plan)


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _memory() -> tuple[int, bool]:
    """Bytes, and whether they are of a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved(), True
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == 'darwin' else 1024), False


def _time_loader(loader: Any) -> tuple[float, float]:
    """Seconds of a batch where all is loading, and until the first one of a new epoch."""
    workers = loader.num_workers
    # What lies ready at the first batch must be few of them.
    count = min(len(loader), max(STEPS, 4 * workers) + 1)
    begun = time.perf_counter()
    times = []
    for _ in itertools.islice(loader, count):
        times.append(time.perf_counter())
        if times[-1] - begun > _LOAD_S:
            break
    first = times[0] - begun
    if len(times) == 1:
        return first / max(1, workers), first
    return (times[-1] - times[0]) / (len(times) - 1), first


def _end_epoch(runner: FineTuningRunner) -> None:
    runner.call_hook('after_train_epoch')
    place: dict[str, Any] = vars(runner.train_loop)  # type: ignore[assignment]
    for name in ('_epoch', '_iter'):  # as the loop does after its last step
        place[name] += 1


def _time_validation(runner: FineTuningRunner) -> dict[str, Any]:
    """Seconds of an image, of the evaluation, and of what follows it."""
    from mmfinetune.utils.dist import bare_model

    loop: Any = runner.val_loop
    dataset = loop.dataloader.dataset
    for metric in loop.evaluator.metrics:
        metric.outfile_prefix = None  # files of the user's
    infos = (
        [dataset.get_data_info(i) for i in range(min(200, len(dataset)))] if hasattr(dataset, 'get_data_info') else []
    )
    objects = sum(len(info.get('instances', ())) for info in infos) / max(1, len(infos))
    head = getattr(bare_model(runner), 'roi_head', None)
    if objects and head is not None and head.test_cfg is not None:
        # The heads have learned nothing yet: they would find none, or a hundred an image.
        head.test_cfg.update(score_thr=0.0, max_per_img=max(1, round(_FOUND * objects)))
    size = loop.dataloader.batch_sampler.batch_size
    passes = [_validate(runner, count) for count in (1, 1, max(2, -(-_VAL_IMAGES // size)))]
    (first, one, _, _), (images, all_, seconds, end) = passes[1:]
    slope = max(0.0, (all_ - one) / max(1, images - first))
    return {
        'image': seconds / images,
        'evaluate': max(0.0, all_ - slope * images),
        'evaluate_image': slope,
        'validation_end': end,
    }


def _validate(runner: FineTuningRunner, batches: int) -> tuple[int, float, float, float]:
    """Validate some batches; images, and seconds of the evaluation, of the images and of what follows."""
    from mmfinetune.engine.hooks.probe import now

    loop: Any = runner.val_loop
    runner.call_hook('before_val')
    runner.call_hook('before_val_epoch')
    runner.model.eval()
    images, begun = 0, time.perf_counter()
    for idx, batch in enumerate(itertools.islice(loop.dataloader, batches)):
        loop.run_iter(idx, batch)
        images += len(batch['inputs'])
    seconds = now() - begun
    begun = time.perf_counter()
    metrics = loop.evaluator.evaluate(images)
    evaluated = time.perf_counter() - begun
    begun = time.perf_counter()
    runner.call_hook('after_val_epoch', metrics=metrics)
    runner.call_hook('after_val')
    return images, evaluated, seconds, time.perf_counter() - begun


def _sizes(runner: FineTuningRunner, folder: Path) -> dict[str, int]:
    from mmfinetune.engine.hooks.checkpoint import checkpoint_bytes

    weights, whole = checkpoint_bytes(runner)  # where nothing was saved in so few steps
    files = {path: path.stat().st_size for path in folder.rglob('*') if path.is_file()}
    best = [size for path, size in files.items() if path.match('best_*.pth')]
    full = [size for path, size in files.items() if path.suffix == '.pth' and not path.match('best_*')]
    other = sum(size for path, size in files.items() if path.suffix != '.pth')
    return {'checkpoint': max(full, default=whole), 'best': max(best, default=weights), 'other': other}


def _length(runner: FineTuningRunner, course: Course, plan: RunPlan) -> Length:
    from mmfinetune.engine.hooks.checkpoint import SafeCheckpointHook

    cfg, world = plan.cfg, plan.world
    train, length = cfg.train_cfg, course.epochs or course.total
    dynamic, interval = train.get('dynamic_intervals') or (), train.get('val_interval', 1)
    validations = validations_of(length, train.get('val_begin', 1), interval, dynamic) if runner.val_loop else 0
    files, best = 1, 0
    for hook in runner.hooks:
        if isinstance(hook, SafeCheckpointHook):
            saves = -(-length // hook.interval) if hook.interval > 0 else 1
            files, best = hook.files.most(saves) + bool(hook.every_n_iters), len(hook.best_rules)
    val_images, test_images = (
        -(-len(loop.dataloader.dataset) // world) if loop is not None else 0
        for loop in (runner.val_loop, runner.test_loop)
    )
    steps, epochs = (course.steps, course.epochs) if course.epochs else (course.total, 1)
    return Length(steps, epochs, validations, val_images, test_images, runner.train_dataloader.num_workers, files, best)
