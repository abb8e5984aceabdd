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
from typing import TYPE_CHECKING

from mmfinetune.apis import run_data, run_weights, testing
from mmfinetune.apis.inference import as_array, model_files
from mmfinetune.config import load, paths, views
from mmfinetune.config.resolve import set_detection
from mmfinetune.data import coco_json
from mmfinetune.evaluation import detections, foreign_rows, render, report, run_results
from mmfinetune.evaluation.stats import KINDS, SCORE_THR
from mmfinetune.utils.console import bar
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import atomic_write_all, json_bytes, require_writable
from mmfinetune.weights import find

if TYPE_CHECKING:
    from mmdet.structures import DetDataSample
    from mmengine.config import Config

FOLDER = 'evaluation'


@dataclass
class Options:
    """The command line; see ``tools/evaluate.py --help``."""

    run: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    split: str = 'test'
    data_root: Path | None = None
    predictions: Path | None = None
    boxes: Path | None = None
    ann: Path | None = None
    image_root: Path | None = None
    out: Path | None = None
    engine: str = 'hotcoco'
    score_thr: float = SCORE_THR
    worst: int = report.WORST_IMAGES
    pictures: bool = True
    json: bool = False
    cfg_options: Sequence[str] = field(default_factory=list)

    @property
    def saved(self) -> bool:
        """Whether saved predictions are evaluated, without a model."""
        return self.predictions is not None or self.boxes is not None


@dataclass
class Inputs:
    """What is evaluated.

    Attributes:
        rows: COCO result rows by kind.
        images: Folder that the file names are relative to; None if it is not known.
        source: What the rows are, by name.
        out: Where results go by default.
        new: Whether a model has just made the rows.
    """

    truth: detections.Truth
    rows: dict[str, list[dict]]
    images: Path | None
    source: dict[str, str]
    out: Path
    new: bool = False


def run(options: Options) -> int:
    """Evaluate, write the results and print them; return the exit code.

    Raises:
        UserError: Anything the user can fix; nothing is written then.
    """
    _check(options)
    # What the parts print on the way is not a result.
    with contextlib.redirect_stdout(sys.stderr):
        inputs = _read(options) if options.saved else _predict(options)
    found = report.analyse(inputs.truth, inputs.rows, inputs.source, options.engine, options.score_thr, options.worst)
    out = options.out or inputs.out
    write(found, out, inputs, options.pictures)
    print(json.dumps(found.as_dict()) if options.json else render.text(found))
    note = ''
    if options.pictures and found.worst and not inputs.images:
        note = ' (no pictures of images: --image-root names no folder that holds them)'
    print(f'Results: {out / "evaluation.md"}{note}', file=sys.stderr if options.json else sys.stdout)
    return 0


def write(found: report.Report, out: Path, inputs: Inputs, pictures: bool = True) -> None:
    """Write all files of a report, or none (UserError); outdated pictures of an earlier report are removed."""
    contents: dict[str, bytes] = {}
    if pictures:
        contents |= render.charts(found)
        if inputs.images:
            contents |= render.draw_worst(found, inputs.images)
    if inputs.new:
        images = inputs.truth.images
        for kind, rows in inputs.rows.items():
            named = [{**row, 'file_name': images[row['image_id']]['file_name']} for row in rows]
            contents[f'predictions.{kind}.json'] = json_bytes(named)
    source = '; '.join(f'{name}: {value}' for name, value in inputs.source.items())
    contents |= {
        'evaluation.json': json_bytes(found.as_dict(), indent=1),
        'evaluation.md': render.markdown(found, contents).encode(),
        'per_class.csv': render.class_csv(found).encode(),
        'confusion.csv': render.confusion_csv(found).encode(),
        run_results.RECORD_MAP: run_results.record_map_text(found.metrics(), found.per_class(), source).encode(),
    }
    atomic_write_all({out / name: content for name, content in contents.items()})
    for old in (*out.glob(f'{render.WORST}/[0-9]*_*.jpg'), out / 'tide.png', out / 'confusion.png'):
        if old.relative_to(out).as_posix() not in contents:
            old.unlink(missing_ok=True)


def _check(options: Options) -> None:
    """Check all that needs no heavy import."""
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        raise UserError('eval-processes')
    if options.saved:
        names = ('WORK_DIR', '--config', '--checkpoint', '--cfg-options')
        model = (options.run, options.config, options.checkpoint, options.cfg_options)
        if both := ', '.join(name for name, value in zip(names, model, strict=True) if value):
            raise UserError('eval-model-and-saved', options=both)
        if not options.ann:
            raise UserError('eval-no-truth')
    elif options.ann:
        raise UserError('eval-truth-of-model')
    elif not (options.run or (options.config and options.checkpoint)):
        raise UserError('eval-nothing')


def _read(options: Options) -> Inputs:
    """Saved predictions and their ground truth."""
    assert options.ann is not None  # see _check
    truth = detections.read_truth(options.ann, masks=options.predictions is not None)
    rows, source = {}, {}
    notes: list[Message] = []
    if options.predictions:
        found, notes = foreign_rows.regular(options.predictions, detections.read_rows(options.predictions), truth)
        rows['segm'] = detections.checked_rows(options.predictions, found, truth, 'segm')
        source['predictions'] = str(options.predictions)
        if not options.boxes and detections.holds(found, 'bbox'):
            rows['bbox'] = detections.checked_rows(options.predictions, found, truth, 'bbox')
    if options.boxes:
        found, of_boxes = foreign_rows.regular(options.boxes, detections.read_rows(options.boxes), truth)
        rows['bbox'] = detections.checked_rows(options.boxes, found, truth, 'bbox')
        notes += [note for note in of_boxes if note not in notes]
        source['boxes'] = str(options.boxes)
    images = detections.image_folder(truth, options.image_root) if options.pictures else None
    source['annotations'] = str(options.ann)
    if notes:
        source['note'] = '; '.join(map(str, notes))
    return Inputs(truth, rows, images, source, Path('work_dirs') / FOLDER)


def _predict(options: Options) -> Inputs:
    """Run a model on a split."""
    files = model_files(options.run, options.config, options.checkpoint)
    find.verify_file(files.checkpoint)
    cfg = load.load(files.config, options.cfg_options)
    if options.data_root:
        paths.set_data_root(cfg, options.data_root)
    paths.select_split(cfg, options.split)
    paths.check_heads(cfg)
    dataset = views.innermost(cfg.test_dataloader.dataset)
    root = Path(dataset.get('data_root') or '')
    kinds = _kinds(cfg)
    with coco_json.parsed_once():
        run_data.prepare_data(cfg, train=False)
        truth = detections.read_truth(root / dataset.ann_file, 'segm' in kinds)
    source = {
        'checkpoint': str(files.checkpoint),
        'config': str(files.config),
        'split': options.split,
        'annotations': str(truth.path),
    }
    out = (options.run or files.work_dir) / (FOLDER if options.split == 'test' else f'{FOLDER}_{options.split}')
    require_writable(options.out or out)
    rows, seen = detect(cfg, files.checkpoint, kinds, list(truth.names))
    if len(seen) < len(truth.images):  # `indices`, say
        source['images'] = f'{len(seen)} of {len(truth.images)}'
        truth = truth.of_images(seen)
    images = root / (dataset.get('data_prefix') or {}).get('img', '')
    return Inputs(truth, rows, images, source, out, new=True)


def detect(
    cfg: Config, weights: Path, kinds: Sequence[str], category_ids: Sequence[int]
) -> tuple[dict[str, list[dict]], set[int]]:
    """COCO result rows by kind of what a checkpoint finds in the test split of a config, and the ids of its images.

    Args:
        cfg: Config; it is changed so that none of the run's logs, curves and pictures is touched.
        category_ids: Category id of each label.

    Raises:
        UserError: The weights do not fit, or an image cannot be read.
    """
    import torch
    from mmengine.runner.amp import autocast

    rows: dict[str, list[dict]] = {kind: [] for kind in kinds}
    seen: set[int] = set()
    with (
        tempfile.TemporaryDirectory(prefix='mmfinetune_') as folder,
        contextlib.redirect_stdout(io.StringIO()),  # pycocotools prints what it loads
    ):
        set_detection(cfg, folder)
        runner = testing.test_runner(cfg, run_weights.checkpoint_of(cfg, weights))
        runner.load_or_resume()
        model, loop = runner.model.eval(), runner.test_loop
        with torch.no_grad(), autocast(enabled=loop.fp16):
            for batch in bar(loop.dataloader, desc='model', unit='batch'):
                for sample in model.test_step(batch):
                    _add_rows(rows, sample, category_ids)
                    seen.add(sample.img_id)
    return rows, seen


def _add_rows(rows: dict[str, list[dict]], sample: DetDataSample, category_ids: Sequence[int]) -> None:
    found = sample.pred_instances
    labels, scores = as_array(found.labels), as_array(found.scores)
    image = sample.img_id, category_ids, labels
    if 'bbox' in rows:
        rows['bbox'] += detections.result_rows(*image, scores, boxes=as_array(found.bboxes))
    if 'segm' in rows:
        scores = as_array(found.get('mask_scores', found.scores))
        rows['segm'] += detections.result_rows(*image, scores, masks=as_array(found.masks))


def _kinds(cfg: Config) -> list[str]:
    """The kinds that the evaluator of the split asks for; both if it does not say."""
    for evaluator in views.evaluators(cfg, 'test'):
        metric = evaluator.get('metric')
        asked = [metric] if isinstance(metric, str) else list(metric or ())
        if set(asked) & set(KINDS):
            return [k for k in KINDS if k in asked]
    return list(KINDS)
