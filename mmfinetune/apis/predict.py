"""Predict on files: what ``tools/predict.py`` calls."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.apis import media
from mmfinetune.apis.inference import Prediction, Predictor, model_files
from mmfinetune.apis.media import Input, Shot
from mmfinetune.apis.predict_files import DATASET, PICTURES, ROWS, SHEET, Results
from mmfinetune.evaluation.stats import SCORE_THR
from mmfinetune.utils import console
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import require_writable
from mmfinetune.weights import find

FOLDER = 'predictions'


@dataclass
class Options:
    """The command line; see ``tools/predict.py --help``."""

    inputs: Sequence[str]
    run: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    score_thr: float = SCORE_THR
    max_per_image: int | None = None
    classes: Sequence[str] = ()
    proposals: int = 0
    every: int = 1
    pictures: bool = True
    contact_sheet: bool | None = None
    coco_json: bool = True
    json: bool = False
    device: str = 'auto'
    batch_size: int = 1


def run(options: Options) -> int:
    """Predict on all inputs and write what was asked for.

    Returns:
        0, or 1 if an input could not be used; the others are done all the same.

    Raises:
        UserError: No input, an unusable model, or nowhere to write to.
    """
    if not (options.pictures or options.coco_json or options.contact_sheet):
        raise UserError('predict-nothing-to-write')
    files = model_files(options.run, options.config, options.checkpoint)
    find.verify_file(files.checkpoint)
    out = options.out or (options.run or Path()) / FOLDER
    earlier = _earlier_results(out, options.overwrite)
    inputs, root = media.find_inputs(options.inputs, [out])
    limits = {name: getattr(options, name) for name in ('score_thr', 'max_per_image', 'classes', 'proposals')}
    predictor = Predictor(files.config, files.checkpoint, options.device, **limits)
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    results = Results(predictor, out, inputs, options.score_thr, options.pictures, options.contact_sheet)
    failed: list[Message] = []
    try:
        for shot, prediction in _predictions(inputs, predictor, options, failed):
            results.add(shot, prediction)
    except BaseException:
        results.close_video(keep=False)
        raise
    about = {
        'description': 'Instances that a model found',
        'config': str(files.config),
        'checkpoint': str(files.checkpoint),
        'folder': str(root),
        'score_thr': options.score_thr,
    }
    results.finish(about if options.coco_json else None)
    if failed:
        print(UserError('predict-failed', problems=failed, count=len(failed), total=len(inputs)), file=sys.stderr)
    if options.json:
        found = {**results.counts(), 'failed': [str(problem) for problem in failed], 'out': str(out)}
        print(json.dumps(found))
    else:
        print(results.summary(len(failed)))
    return 1 if failed else 0


def _earlier_results(out: Path, overwrite: bool) -> list[Path]:
    """What an earlier call has left in the output folder, to be replaced.

    Raises:
        UserError: There is something and `overwrite` is not set, or the folder cannot be written.
    """
    earlier = [out / name for name in (ROWS, DATASET, PICTURES) if (out / name).exists()]
    earlier += sorted(out.glob(f'{SHEET}*.jpg'))
    if earlier and not overwrite:
        raise UserError('predict-exists', out=out, names=', '.join(path.name for path in earlier))
    require_writable(out)
    return earlier


def _predictions(
    inputs: Sequence[Input], predictor: Predictor, options: Options, failed: list[Message]
) -> Iterator[tuple[Shot, Prediction]]:
    """Images and frames in order with what is found on each; failures are added to the list."""
    import torch

    shots = _shots(inputs, predictor, options.every, failed)
    with console.bar(total=_length(inputs, options.every), unit='img') as bar:
        while batch := list(itertools.islice(shots, options.batch_size)):
            ready = []
            for shot in batch:
                try:
                    ready.append((shot, predictor.prepare(shot.image)))
                except ValueError as error:
                    failed.append(_failure(shot.source, error, shot.frame))
            try:
                found = predictor.forward([p for _, p in ready]) if ready else []
            except torch.OutOfMemoryError:
                reason = 'out of GPU memory (--device cpu, or a smaller --batch-size)'
                failed += [_failure(shot.source, reason, shot.frame) for shot, _ in ready]
            else:
                yield from ((shot, p) for (shot, _), p in zip(ready, found, strict=True))
            bar.update(len(batch))


def _shots(inputs: Sequence[Input], predictor: Predictor, every: int, failed: list[Message]) -> Iterator[Shot]:
    for source in inputs:
        try:
            if source.is_video:
                video = media.Video(source.path)
                for number, frame in video.read(every):
                    yield Shot(source, frame, number, video.fps / every)
            else:
                media.check_image(source.path)
                yield Shot(source, predictor.read(source.path))
        except ValueError as error:
            failed.append(_failure(source, error))


def _length(inputs: Sequence[Input], every: int) -> int:
    """Number of images and frames to expect, as far as the files tell."""
    total = 0
    for source in inputs:
        with contextlib.suppress(ValueError):
            total += -(-media.Video(source.path).frames // every) if source.is_video else 1
    return total


def _failure(source: Input, reason: object, frame: int | None = None) -> Message:
    if frame is None:
        return Message('predict-input', path=source.path, reason=str(reason))
    return Message('predict-frame', path=source.path, frame=frame, reason=str(reason))
