"""Predict on files: pictures, a contact sheet and COCO JSON of what a trained model finds."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from tqdm import tqdm

from mmfinetune.apis import media
from mmfinetune.apis.inference import Prediction, Predictor
from mmfinetune.data import drawing
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, atomic_write_bytes, json_bytes
from mmfinetune.utils.masks import mask_to_rle
from mmfinetune.weights import find, work_dir

if TYPE_CHECKING:
    from mmfinetune.apis.media import Input


FOLDER = 'predictions'
ROWS, DATASET, PICTURES, SHEET = 'predictions.json', 'predictions_coco.json', 'pictures', 'sheet'
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 92]
# A contact sheet: pictures on a page, their width, and the pages after which it ends.
_PER_PAGE, _CELL, _PAGES = 40, 400, 25
# Drawn at this long side, so that the labels stay legible in a cell.
_THUMBNAIL = 480


@dataclass
class Options:
    """What the command line says; see ``tools/predict.py --help``."""

    inputs: Sequence[str]
    run: Path | None = None
    config: Path | None = None
    checkpoint: Path | None = None
    out: Path | None = None
    score_thr: float = 0.3
    max_per_image: int | None = None
    classes: Sequence[str] = ()
    proposals: int = 0
    every: int = 1
    pictures: bool = True
    contact_sheet: bool | None = None
    json: bool = True
    device: str = 'auto'
    batch_size: int = 1


@dataclass
class Shot:
    """An image, or a frame of a video with its number and the frames a second to come."""

    source: Input
    image: np.ndarray
    frame: int | None = None
    fps: float = 0


def run(options: Options) -> int:
    """Predict on all inputs and write what was asked for.

    Returns:
        0, or 1 if an input could not be used; the others are done all the same.

    Raises:
        UserError: No input, a model that cannot be used, or nowhere to write to.
    """
    if not (options.pictures or options.json or options.contact_sheet):
        raise UserError(
            'There is nothing to write: neither pictures nor JSON', cure='leave out --no-pictures or --no-json'
        )
    config, weights = _model_files(options)
    find.verify_file(weights)
    out, earlier = _output_folder(options)
    inputs, root = media.find_inputs(options.inputs, [out, *earlier])
    predictor = Predictor(
        config,
        weights,
        options.device,
        score_thr=options.score_thr,
        classes=options.classes,
        max_per_image=options.max_per_image,
        proposals=options.proposals,
    )
    results = Results(predictor, out, inputs, options)
    try:
        for shot, prediction in _predictions(inputs, predictor, options, results.failed):
            results.add(shot, prediction)
    except BaseException:
        results.close_video(keep=False)
        raise
    results.finish(
        {
            'description': 'Instances that a model found',
            'config': str(config),
            'checkpoint': str(weights),
            'folder': str(root),
            'score_thr': options.score_thr,
        }
    )
    if results.failed:
        print(
            UserError(f'{len(results.failed)} of {len(inputs)} inputs could not be used:', results.failed),
            file=sys.stderr,
        )
    print(results.summary())
    return 1 if results.failed else 0


def coco_rows(prediction: Prediction, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """COCO rows of an image: ``image_id, category_id, bbox, score, segmentation, area``.

    Boxes are ``x, y, width, height`` in pixels, masks compressed RLE; a model without masks has
    no ``segmentation``. The area is that of the mask, else of the box.
    """
    rows = []
    for i, (left, top, right, bottom) in enumerate(prediction.boxes):
        row: dict[str, Any] = {
            'image_id': image_id,
            'category_id': category_ids[prediction.labels[i]],
            'bbox': [_short(v) for v in (left, top, right - left, bottom - top)],
            'score': _short(prediction.scores[i]),
        }
        if prediction.masks is not None:
            row['segmentation'] = mask_to_rle(prediction.masks[i])
            row['area'] = int(np.count_nonzero(prediction.masks[i]))
        else:
            row['area'] = _short((right - left) * (bottom - top))
        rows.append(row)
    return rows


def draw(image: np.ndarray, prediction: Prediction, names: Sequence[str], score_thr: float = 0) -> np.ndarray:
    """Instances on an image; the proposals, if there are, beside it.

    Args:
        image: (H, W, 3) RGB uint8.
        prediction: Of this image.
        names: Of the classes.
        score_thr: For the title.
    """
    picture = drawing.draw_instances(
        image,
        boxes=prediction.boxes,
        masks=prediction.masks,
        labels=prediction.labels,
        scores=prediction.scores,
        names=names,
    )
    if prediction.proposals is None:
        return picture
    left = drawing.draw_proposals(image, prediction.proposals, prediction.objectness)
    titles = [
        f'best {_count(len(prediction.proposals), "proposal")}',
        f'{_count(len(prediction), "object")}, score ≥ {score_thr:g}',
    ]
    return drawing.with_colour_bar(drawing.side_by_side(left, picture, titles=titles), 'objectness')


@dataclass
class Results:
    """What is found, and the files made of it.

    Attributes:
        predictor: The model.
        out: Folder of all files.
        inputs: What is predicted on.
        options: What to make.
        failed: A line for each input that could not be used.
    """

    predictor: Predictor
    out: Path
    inputs: Sequence[Input]
    options: Options
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = media.output_names(
            [i.name for i in self.inputs], ['.mp4' if i.is_video else '.jpg' for i in self.inputs]
        )
        # Only if all have one, since those of the others could be the same.
        known = [self.predictor.image_ids.get(os.path.realpath(i.path)) for i in self.inputs]
        self._ids = {} if None in known else {i.name: number for i, number in zip(self.inputs, known, strict=True)}
        self._names = {i.name: f'{PICTURES}/{n}' for i, n in zip(self.inputs, names, strict=True)}
        images = sum(not i.is_video for i in self.inputs)
        wanted = self.options.contact_sheet
        sheet = images > 1 and self.options.pictures if wanted is None else wanted
        self._sheet = _Sheet(self.out, images) if sheet else None
        self._video: tuple[Input, media.VideoWriter] | None = None
        self._images: list[dict] = []
        self._rows: list[dict] = []

    def add(self, shot: Shot, prediction: Prediction) -> None:
        """Take the prediction on an image or a frame, which come in the order of the inputs."""
        height, width = shot.image.shape[:2]
        info = {
            'id': self._ids.get(shot.source.name, len(self._images) + 1),
            'file_name': shot.source.name,
            'width': width,
            'height': height,
        }
        if shot.frame is not None:
            info['frame'] = shot.frame
        if self.options.pictures:
            info['picture'] = self._names[shot.source.name]
            picture = draw(shot.image, prediction, self.predictor.classes, self.options.score_thr)
            if shot.frame is None:
                write_jpeg(self.out / info['picture'], picture)
            else:
                self._add_frame(shot, picture)
        if self._sheet and shot.frame is None:
            self._sheet.add(shot, prediction, self.predictor.classes)
        self._images.append(info)
        self._rows += coco_rows(prediction, info['id'], self.predictor.category_ids)

    def _add_frame(self, shot: Shot, picture: np.ndarray) -> None:
        if self._video is None or self._video[0] != shot.source:
            self.close_video()
            path = self.out / self._names[shot.source.name]
            self._video = shot.source, media.VideoWriter(path, shot.fps)
        self._video[1].write(picture)

    def close_video(self, keep: bool = True) -> None:
        """End the video that is being written, if one is."""
        if self._video is not None:
            self._video[1].close(keep)
            self._video = None

    def finish(self, about: dict) -> None:
        """Write what belongs to all inputs together.

        Args:
            about: ``info`` of the COCO file.
        """
        self.close_video()
        if self._sheet:
            self._sheet.finish()
        if not self.options.json:
            return
        place = {i['id']: {k: i[k] for k in ('file_name', 'frame') if k in i} for i in self._images}
        rows = [{**{k: v for k, v in r.items() if k != 'area'}, **place[r['image_id']]} for r in self._rows]
        dataset = {
            'info': about,
            'licenses': [],
            'images': self._images,
            'categories': [
                {'id': i, 'name': name, 'supercategory': ''}
                for i, name in zip(self.predictor.category_ids, self.predictor.classes, strict=True)
            ],
            'annotations': [{'id': n, 'iscrowd': 0, 'segmentation': [], **row} for n, row in enumerate(self._rows, 1)],
        }
        atomic_write_all({self.out / ROWS: json_bytes(rows), self.out / DATASET: json_bytes(dataset)})

    def summary(self) -> str:
        """What was found, and in the last line where it is."""
        lines, images = [], len(self._images)
        frames = sum('frame' in i for i in self._images)
        kinds = [_count(images - frames, 'image')] if images > frames or not frames else []
        kinds += [_count(frames, 'frame')] if frames else []
        shown = ' and '.join(kinds)
        every = shown if len(kinds) == 1 else f'{images:,} images and frames'
        if self._rows:
            names = dict(zip(self.predictor.category_ids, self.predictor.classes, strict=True))
            counts = Counter(names[r['category_id']] for r in self._rows)
            lines.append(
                f'Found on {len({r["image_id"] for r in self._rows}):,} of {every}: '
                + ', '.join(f'{name} {n}' for name, n in counts.most_common())
            )
        elif images:
            lines.append(
                f'Nothing found on {shown} with a score of {self.options.score_thr:g} or '
                'more: a lower --score-thr shows what comes near'
            )
        if self._sheet and self._sheet.left_out:
            lines.append(f'The contact sheet ends after {_PAGES} pages, {self._sheet.left_out} images are not on it')
        lines.append(
            f'Results: {self.out} ({shown}, {_count(len(self._rows), "object")}'
            + (f', {len(self.failed)} failed)' if self.failed else ')')
        )
        return '\n'.join(lines)


class _Sheet:
    """Pages of small pictures, written as each is full."""

    def __init__(self, out: Path, images: int) -> None:
        self._out, self._many = out, images > _PER_PAGE
        self._cells: list[np.ndarray] = []
        self._titles: list[str] = []
        self._pages = 0
        self.left_out = 0

    def add(self, shot: Shot, prediction: Prediction, names: Sequence[str]) -> None:
        if self._pages == _PAGES:
            self.left_out += 1
            return
        factor = min(1.0, _THUMBNAIL / max(shot.image.shape[:2]))
        size = tuple(max(1, round(n * factor)) for n in shot.image.shape[1::-1])
        masks = prediction.masks
        if masks is not None and factor < 1:
            masks = np.array([cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_AREA) for m in masks], bool)
        self._cells.append(
            drawing.draw_instances(
                cv2.resize(shot.image, size, interpolation=cv2.INTER_AREA),
                boxes=prediction.boxes * factor,
                masks=masks,
                labels=prediction.labels,
                scores=prediction.scores,
                names=names,
            )
        )
        self._titles.append(f'{shot.source.name} · {_count(len(prediction), "object")}')
        if len(self._cells) == _PER_PAGE:
            self.finish()

    def finish(self) -> None:
        """Write the page begun, if there is one."""
        if not self._cells:
            return
        self._pages += 1
        name = f'{SHEET}_{self._pages:02}.jpg' if self._many else f'{SHEET}.jpg'
        write_jpeg(self._out / name, drawing.contact_sheet(self._cells, width=_CELL, titles=self._titles))
        self._cells, self._titles = [], []


def write_jpeg(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture, whole or not at all."""
    _, data = cv2.imencode('.jpg', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), _QUALITY)
    atomic_write_bytes(path, data.tobytes())


def _model_files(options: Options) -> tuple[Path, Path]:
    if options.run is not None:
        files = work_dir.find_run(options.run, options.config, options.checkpoint)
        return files.config, files.checkpoint
    if options.config is None or options.checkpoint is None:
        raise UserError('No model to predict with is named', cure='pass --run WORK_DIR, or --config and --checkpoint')
    return options.config, options.checkpoint


def _output_folder(options: Options) -> tuple[Path, list[Path]]:
    """Where results go, and folders of earlier results.

    Raises:
        UserError: It holds earlier results, or cannot be written to.
    """
    earlier = []
    if options.out is not None:
        out = options.out
        old = [name for name in (ROWS, DATASET, PICTURES) if (out / name).exists()]
        old += sorted(p.name for p in out.glob(f'{SHEET}*.jpg'))
        if old:
            raise UserError(
                f'{out} holds earlier predictions: {", ".join(old)}',
                cure='name another folder with --out, or delete it',
            )
    else:
        first = (options.run or Path()) / FOLDER
        for count in itertools.count(1):
            out = first if count == 1 else first.with_name(f'{FOLDER}_{count}')
            if not out.exists():
                break
            earlier.append(out)
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f'{out}: results cannot be written there, since {there} is '
            + ('read-only' if there.is_dir() else 'a file'),
            cure='name a folder you may write to with --out',
        )
    return out, earlier


def _predictions(
    inputs: Sequence[Input], predictor: Predictor, options: Options, failed: list[str]
) -> Iterator[tuple[Shot, Prediction]]:
    """Images and frames in order, each with what is found; what fails is put on the list."""
    import torch

    shots = _shots(inputs, predictor, options.every, failed)
    with tqdm(total=_length(inputs, options.every), unit='img', disable=None) as bar:
        while batch := list(itertools.islice(shots, options.batch_size)):
            ready = []
            for shot in batch:
                try:
                    ready.append((shot, predictor.prepare(shot.image)))
                except ValueError as error:
                    failed.append(_line(shot, error))
            try:
                found = predictor.forward([p for _, p in ready]) if ready else []
            except torch.OutOfMemoryError:
                failed += [
                    _line(shot, 'out of GPU memory (--device cpu, or a smaller --batch-size)') for shot, _ in ready
                ]
                found = []
            yield from ((shot, p) for (shot, _), p in zip(ready, found, strict=False))
            bar.update(len(batch))


def _shots(inputs: Sequence[Input], predictor: Predictor, every: int, failed: list[str]) -> Iterator[Shot]:
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
            failed.append(f'{source.path}: {error}')


def _length(inputs: Sequence[Input], every: int) -> int:
    """Images and frames to come, as far as the files tell."""
    total = 0
    for source in inputs:
        try:
            total += -(-media.Video(source.path).frames // every) if source.is_video else 1
        except ValueError:
            continue
    return total


def _line(shot: Shot, reason: object) -> str:
    frame = '' if shot.frame is None else f', frame {shot.frame}'
    return f'{shot.source.path}{frame}: {reason}'


def _short(value: np.floating) -> float:
    """A float32 in as many digits as it has; as a double it would get ten more."""
    return float(str(np.float32(value)))


def _count(number: int, what: str) -> str:
    return f'{number:,} {what}' + ('' if number == 1 else 's')
