"""Evaluate a checkpoint on a split, or saved predictions: what ``tools/evaluate.py`` calls."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.apis import run_data, testing
from mmfinetune.config import load, paths, views
from mmfinetune.config.paths import select_split
from mmfinetune.config.views import innermost
from mmfinetune.data import coco_json
from mmfinetune.evaluation import detections, report, run_results
from mmfinetune.evaluation.coco_eval import KINDS
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, json_bytes
from mmfinetune.weights import find
from mmfinetune.weights import work_dir as weights_work_dir

if TYPE_CHECKING:
    from mmengine.config import Config

FOLDER = 'evaluation'


@dataclass
class Options:
    """What the command line says; see ``tools/evaluate.py --help``."""

    work_dir: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    split: str = 'test'
    data_root: Path | None = None
    predictions: Path | None = None
    boxes: Path | None = None
    ann: Path | None = None
    out: Path | None = None
    engine: str = 'hotcoco'
    score_thr: float = 0.3
    worst: int = 16
    pictures: bool = True
    json: bool = False
    cfg_options: Sequence[str] = field(default_factory=list)


@dataclass
class Inputs:
    """What is evaluated.

    Attributes:
        truth: The ground truth.
        rows: COCO result rows by kind.
        images: What the file names are relative to; None if that is not known.
        source: What the rows are, by name.
        new: Whether a model made them just now.
    """

    truth: detections.Truth
    rows: dict[str, list[dict]]
    images: Path | None
    source: dict[str, str]
    new: bool


def run(options: Options) -> int:
    """Evaluate and write the results; print them.

    Returns:
        Exit code.

    Raises:
        UserError: Anything the user can mend; nothing is written then.
    """
    _check(options)
    saved = options.predictions is not None or options.boxes is not None
    # What the parts say on the way is no result.
    with contextlib.redirect_stdout(sys.stderr):
        inputs = _read(options) if saved else _predict(options)
    found = report.analyse(inputs.truth, inputs.rows, inputs.source, options.engine, options.score_thr, options.worst)
    out = options.out or _default_out(options)
    write(found, out, inputs, options.pictures)
    print(json.dumps(found.as_dict(), ensure_ascii=False) if options.json else found.text())
    note = (
        ''
        if inputs.images or not options.pictures or not found.worst
        else ' (no pictures of images: --data-root names no folder that holds them)'
    )
    print(f'Results: {out / "evaluation.md"}{note}', file=sys.stderr if options.json else sys.stdout)
    return 0


def write(found: report.Report, out: Path, inputs: Inputs, pictures: bool = True) -> None:
    """Write all files of a report, or none; pictures of an earlier one that are no more go.

    Raises:
        UserError: They cannot be written.
    """
    contents: dict[str, bytes] = {}
    if pictures:
        contents |= found.charts()
        if inputs.images:
            contents |= found.draw_worst(inputs.images)
    if inputs.new:
        names = {i: image['file_name'] for i, image in inputs.truth.images.items()}
        contents |= {
            f'predictions.{kind}.json': json_bytes([{**row, 'file_name': names[row['image_id']]} for row in rows])
            for kind, rows in inputs.rows.items()
        }
    source = '; '.join(f'{name}: {value}' for name, value in inputs.source.items())
    contents |= {
        'evaluation.json': json_bytes(found.as_dict(), indent=1),
        'evaluation.md': found.markdown().encode(),
        'per_class.csv': found.class_csv().encode(),
        'confusion.csv': found.confusion_csv().encode(),
        run_results.RECORD_MAP: run_results.record_map_text(found.metrics(), found.per_class(), source).encode(),
    }
    atomic_write_all({out / name: content for name, content in contents.items()})
    for old in (*out.glob(f'{report.WORST}/[0-9]*_*.jpg'), out / 'tide.png', out / 'confusion.png'):
        if old.relative_to(out).as_posix() not in contents:
            old.unlink(missing_ok=True)


def _check(options: Options) -> None:
    """What can be said before anything heavy is imported."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise UserError('The evaluation runs in one process', cure='start it without torchrun')
    if not 0 <= options.score_thr <= 1:
        raise UserError(f'--score-thr {options.score_thr:g} is no score', cure='give a number from 0 to 1')
    if options.worst < 0:
        raise UserError(f'--worst {options.worst} is no number of images')
    model = {
        'WORK_DIR': options.work_dir,
        '--config': options.config,
        '--checkpoint': options.checkpoint,
        '--cfg-options': options.cfg_options,
    }
    if options.predictions or options.boxes:
        both = [name for name, value in model.items() if value]
        if both:
            raise UserError(
                'Saved predictions are evaluated without a model, but these name one:',
                both,
                'leave them out, or leave out --predictions and --boxes',
            )
        if not options.ann:
            raise UserError('--predictions needs the ground truth', cure='pass the annotation file with --ann')
    elif options.ann:
        raise UserError(
            '--ann goes with --predictions only',
            cure='to evaluate a model on other data name their folder with --data-root',
        )
    elif not (options.work_dir or (options.config and options.checkpoint)):
        raise UserError(
            'There is nothing to evaluate',
            cure='pass the work dir of a run, or --config and --checkpoint, or --predictions and --ann',
        )


def _default_out(options: Options) -> Path:
    if options.predictions or options.boxes:
        return Path('work_dirs') / FOLDER
    folder = options.work_dir or options.checkpoint.parent
    return folder / (FOLDER if options.split == 'test' else f'{FOLDER}_{options.split}')


def _read(options: Options) -> Inputs:
    """Saved predictions and their ground truth."""
    truth = detections.read_truth(options.ann, masks=options.predictions is not None)
    rows, source = {}, {}
    if options.predictions:
        found = detections.read_rows(options.predictions)
        rows['segm'] = detections.checked_rows(options.predictions, found, truth, 'segm')
        source['predictions'] = str(options.predictions)
        if not options.boxes and detections.holds(found, 'bbox'):
            rows['bbox'] = detections.checked_rows(options.predictions, found, truth, 'bbox')
    if options.boxes:
        rows['bbox'] = detections.checked_rows(options.boxes, detections.read_rows(options.boxes), truth, 'bbox')
        source['boxes'] = str(options.boxes)
    images = detections.image_folder(truth, options.data_root) if options.pictures else None
    return Inputs(truth, rows, images, {**source, 'annotations': str(options.ann)}, False)


def _predict(options: Options) -> Inputs:
    """Run a model on a split."""
    if options.work_dir:
        files = weights_work_dir.find_run(options.work_dir, options.config, options.checkpoint)
        config_file, weights = files.config, files.checkpoint
    else:
        config_file, weights = options.config, options.checkpoint
    find.verify_file(weights)
    cfg = load.load(config_file, options.cfg_options)
    if options.data_root:
        paths.set_data_root(cfg, options.data_root)
    select_split(cfg, options.split)
    paths.check_heads(cfg)
    dataset = innermost(cfg.test_dataloader.dataset)
    root = Path(dataset.get('data_root') or '')
    kinds = _kinds(cfg)
    with coco_json.parsed_once():
        run_data.prepare_data(cfg, train=False)
        truth = detections.read_truth(root / dataset.ann_file, 'segm' in kinds)
    rows = detect(cfg, weights, kinds)
    return Inputs(
        truth,
        rows,
        root / (dataset.get('data_prefix') or {}).get('img', ''),
        {
            'checkpoint': str(weights),
            'config': str(config_file),
            'split': options.split,
            'annotations': str(truth.path),
        },
        True,
    )


def detect(cfg: Config, weights: Path, kinds: Sequence[str]) -> dict[str, list[dict]]:
    """What a model finds in the test split of a config.

    Args:
        cfg: Changed in place: nothing of the run's logs, curves and pictures is touched.
        weights: Its checkpoint.
        kinds: ``'segm'``, ``'bbox'`` or both.

    Returns:
        COCO result rows by kind.

    Raises:
        UserError: The weights do not fit, or an image cannot be read.
    """
    dataset = innermost(cfg.test_dataloader.dataset)
    cfg.test_evaluator = dict(
        type='DetectionRows', metric=list(kinds), ann_file=str(Path(dataset.get('data_root') or '') / dataset.ann_file)
    )
    cfg.test_cfg = dict(type='TestLoop', fp16=(cfg.get('test_cfg') or {}).get('fp16', False))
    # Those of the training would write into its folder, or change the model (EMA).
    cfg.custom_hooks = []
    cfg.default_hooks = dict(logger=None, checkpoint=None)
    cfg.visualizer = dict(type='Visualizer', vis_backends=[], name='evaluation')
    cfg.log_level = 'WARNING'
    with (
        tempfile.TemporaryDirectory(prefix='mmfinetune_') as folder,
        contextlib.redirect_stdout(io.StringIO()),
    ):  # pycocotools tells what it loads
        cfg.work_dir = folder
        runner = testing.test_runner(cfg, weights)
        loop = runner.test_loop
        runner.register_hook(_progress(len(loop.dataloader.dataset)))
        runner.test()
        return {kind: loop.evaluator.metrics[0].rows[kind] for kind in kinds}


def _progress(images: int) -> Any:
    from mmengine.hooks import Hook
    from tqdm import tqdm

    class Progress(Hook):
        """A bar over the images."""

        def before_test(self, runner) -> None:
            self.bar = tqdm(total=images, desc='model', unit='image', disable=None)

        def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            self.bar.update(len(outputs or ()))

        def after_test(self, runner) -> None:
            self.bar.close()

    return Progress()


def _kinds(cfg: Config) -> list[str]:
    """What the evaluator of the split asks for; masks and boxes if it does not tell."""
    for evaluator in views.evaluators(cfg, 'test'):
        metric = evaluator.get('metric')
        asked = [metric] if isinstance(metric, str) else list(metric or ())
        if set(asked) & set(KINDS):
            return [k for k in KINDS if k in asked]
    return list(KINDS)
