"""The files of a prediction: pictures, videos, a contact sheet and COCO JSON."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmfinetune.apis import media
from mmfinetune.apis.inference import Prediction, Predictor
from mmfinetune.apis.media import Input, Shot
from mmfinetune.data import drawing
from mmfinetune.evaluation.detections import result_rows
from mmfinetune.utils.console import wrapped
from mmfinetune.utils.files import atomic_write_all, atomic_write_bytes, json_bytes
from mmfinetune.utils.text import plural

ROWS, DATASET, PICTURES, SHEET = 'predictions.json', 'predictions_coco.json', 'pictures', 'sheet'
_QUALITY = [cv2.IMWRITE_JPEG_QUALITY, 92]
# A contact sheet: pictures on a page, their width in px, and the pages after which it ends.
_PER_PAGE, _CELL, _PAGES = 40, 400, 25
# Drawn at this long side, so that the labels stay legible in a cell.
_THUMBNAIL = 480


class Results:
    """What is found, and the files made of it.

    Args:
        out: Folder of all files.
        score_thr: Lowest score, for titles.
        pictures: Whether to draw each image and video.
        contact_sheet: Whether to make a contact sheet; by default for several images with pictures.
    """

    def __init__(
        self,
        predictor: Predictor,
        out: Path,
        inputs: Sequence[Input],
        score_thr: float,
        pictures: bool,
        contact_sheet: bool | None,
    ) -> None:
        self.predictor, self.out, self.score_thr, self.pictures = predictor, out, score_thr, pictures
        names = media.output_names([i.name for i in inputs], ['.mp4' if i.is_video else '.jpg' for i in inputs])
        paths = {i.name: os.path.realpath(i.path) for i in inputs}
        # Only if all have one, since those of the others could be the same.
        known = all(path in predictor.image_ids for path in paths.values())
        self._ids = {name: predictor.image_ids[path] for name, path in paths.items()} if known else {}
        self._names = {i.name: f'{PICTURES}/{n}' for i, n in zip(inputs, names, strict=True)}
        images = sum(not i.is_video for i in inputs)
        wanted = images > 1 and pictures if contact_sheet is None else contact_sheet
        self._sheet = Sheet(out, images) if wanted else None
        self._video: tuple[Input, media.VideoWriter] | None = None
        self._images: list[dict] = []
        self._rows: list[dict] = []

    def add(self, shot: Shot, prediction: Prediction) -> None:
        """Take the prediction on an image or a frame; they come in the order of the inputs."""
        (height, width, _), name = shot.image.shape, shot.source.name
        number = self._ids.get(name, len(self._images) + 1)
        info: dict[str, Any] = {'id': number, 'file_name': name, 'width': width, 'height': height}
        if shot.frame is not None:
            info['frame'] = shot.frame
        if self.pictures:
            info['picture'] = self._names[name]
            picture = draw(shot.image, prediction, self.predictor.classes, self.score_thr)
            if shot.frame is None:
                write_jpeg(self.out / info['picture'], picture)
            else:
                self._add_frame(shot, picture)
        if self._sheet and shot.frame is None:
            self._sheet.add(shot, prediction, self.predictor.classes)
        self._images.append(info)
        found, ids = prediction, self.predictor.category_ids
        self._rows += result_rows(number, ids, found.labels, found.scores, found.boxes, found.masks)

    def _add_frame(self, shot: Shot, picture: np.ndarray) -> None:
        if self._video is None or self._video[0] != shot.source:
            self.close_video()
            self._video = shot.source, media.VideoWriter(self.out / self._names[shot.source.name], shot.fps)
        self._video[1].write(picture)

    def close_video(self, keep: bool = True) -> None:
        """End the video that is being written, if there is one."""
        if self._video is not None:
            self._video[1].close(keep)
            self._video = None

    def finish(self, about: dict | None) -> None:
        """Write what belongs to all inputs together.

        Args:
            about: ``info`` of the COCO JSON; no JSON is written without it.
        """
        self.close_video()
        if self._sheet:
            self._sheet.finish()
        if about is None:
            return
        place = {i['id']: {k: i[k] for k in ('file_name', 'frame') if k in i} for i in self._images}
        rows = [{**row, **place[row['image_id']]} for row in self._rows]
        classes = zip(self.predictor.category_ids, self.predictor.classes, strict=True)
        dataset = {
            'info': about,
            'licenses': [],
            'images': self._images,
            'categories': [{'id': i, 'name': name, 'supercategory': ''} for i, name in classes],
            'annotations': [_annotation(number, row) for number, row in enumerate(self._rows, 1)],
        }
        atomic_write_all({self.out / ROWS: json_bytes(rows), self.out / DATASET: json_bytes(dataset)})

    def counts(self) -> dict[str, Any]:
        """Number of images, frames and objects, and of the objects of each class, the most frequent first."""
        names = dict(zip(self.predictor.category_ids, self.predictor.classes, strict=True))
        frames = sum('frame' in image for image in self._images)
        return {
            'images': len(self._images) - frames,
            'frames': frames,
            'objects': len(self._rows),
            'classes': dict(Counter(names[row['category_id']] for row in self._rows).most_common()),
        }

    def summary(self, failed: int = 0) -> str:
        """What was found, and in the last line where it is."""
        found = self.counts()
        images, frames = plural(found['images'], 'image'), plural(found['frames'], 'frame')
        shown = every = frames if found['frames'] else images
        if found['images'] and found['frames']:
            shown, every = f'{images} and {frames}', f'{len(self._images):,} images and frames'
        lines = []
        if self._rows:
            classes = ', '.join(f'{name} {n}' for name, n in found['classes'].items())
            lines.append(wrapped(f'Found on {len({r["image_id"] for r in self._rows}):,} of {every}: {classes}'))
        elif self._images:
            lines.append(
                f'Nothing found on {shown} with a score of {self.score_thr:g} or more: '
                'a lower --score-thr shows weaker candidates'
            )
        if self._sheet and self._sheet.left_out:
            lines.append(f'The contact sheet ends after {_PAGES} pages, {self._sheet.left_out} images are not on it')
        done = f'{shown}, {plural(len(self._rows), "object")}' + (f', {failed} failed' if failed else '')
        return '\n'.join([*lines, f'Results: {self.out} ({done})'])


class Sheet:
    """Pages of small pictures; each is written when it is full."""

    def __init__(self, out: Path, images: int) -> None:
        self._out, self._many = out, images > _PER_PAGE
        self._cells: list[np.ndarray] = []
        self._titles: list[str] = []
        self._pages = 0
        self.left_out = 0

    def add(self, shot: Shot, prediction: Prediction, names: Sequence[str]) -> None:
        """Put an image on the page; it is left out if the last page is full."""
        if self._pages == _PAGES:
            self.left_out += 1
            return
        factor = min(1.0, _THUMBNAIL / max(shot.image.shape[:2]))
        size = [max(1, round(n * factor)) for n in shot.image.shape[1::-1]]
        masks = prediction.masks
        if masks is not None and factor < 1:
            masks = np.array([cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_AREA) for m in masks], bool)
        small = dataclasses.replace(prediction, boxes=prediction.boxes * factor, masks=masks)
        self._cells.append(_instances(cv2.resize(shot.image, size, interpolation=cv2.INTER_AREA), small, names))
        self._titles.append(f'{shot.source.name} · {plural(len(prediction), "object")}')
        if len(self._cells) == _PER_PAGE:
            self.finish()

    def finish(self) -> None:
        """Write the current page unless it is empty."""
        if not self._cells:
            return
        self._pages += 1
        name = f'{SHEET}_{self._pages:02}.jpg' if self._many else f'{SHEET}.jpg'
        write_jpeg(self._out / name, drawing.contact_sheet(self._cells, width=_CELL, titles=self._titles))
        self._cells, self._titles = [], []


def draw(image: np.ndarray, prediction: Prediction, names: Sequence[str], score_thr: float = 0) -> np.ndarray:
    """Instances on an RGB image; its proposals, if there are any, on its left; with the lowest score as a title."""
    picture = _instances(image, prediction, names)
    if prediction.proposals is None or prediction.objectness is None:
        return picture
    left = drawing.draw_proposals(image, prediction.proposals, prediction.objectness)
    best, found = plural(len(prediction.proposals), 'proposal'), plural(len(prediction), 'object')
    titles = [f'best {best}', f'{found}, score ≥ {score_thr:g}']
    return drawing.with_colour_bar(drawing.side_by_side(left, picture, titles=titles), 'objectness')


def _instances(image: np.ndarray, found: Prediction, names: Sequence[str]) -> np.ndarray:
    what = {'labels': found.labels.tolist(), 'scores': found.scores.tolist(), 'names': names}
    return drawing.draw_instances(image, boxes=found.boxes, masks=found.masks, **what)


def write_jpeg(path: Path, picture: np.ndarray) -> None:
    """Write an RGB picture atomically."""
    _, data = cv2.imencode('.jpg', cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), _QUALITY)
    atomic_write_bytes(path, data.tobytes())


def _annotation(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A result row as an annotation of a COCO data set; the area is that of the mask, or of the box without one."""
    from pycocotools import mask as mask_api

    shape = row.get('segmentation', [])
    area = int(mask_api.area(shape)) if shape else row['bbox'][2] * row['bbox'][3]
    return {**row, 'id': number, 'iscrowd': 0, 'area': area, 'segmentation': shape}
