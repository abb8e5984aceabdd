"""What an evaluation found, as text, Markdown, CSV, JSON and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmfinetune.data import drawing
from mmfinetune.evaluation import coco_eval, confusion, error_plots
from mmfinetune.evaluation.coco_eval import KINDS
from mmfinetune.evaluation.confusion import ImageErrors
from mmfinetune.evaluation.detections import Truth
from mmfinetune.utils import text as utils_text
from mmfinetune.utils.errors import UserError

# Hariharan et al., Simultaneous Detection and Segmentation (ECCV 2014), report AP^r at these IoUs.
VOC_IOUS = (0.5, 0.7)
WORST = 'worst'
_COLUMNS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')
_PLURAL = {'segm': 'masks', 'bbox': 'boxes'}
_ABSENT_SHOWN = 12
_SIDE = 1000  # px; larger images are drawn smaller


@dataclass
class Report:
    """The results of one evaluation.

    Attributes:
        truth: What the detections were held against.
        source: What was evaluated, by name: checkpoint, config, split or files.
        engine: Of the COCO numbers.
        detections: Number of them by kind.
        scores: COCO's numbers by kind, ``'segm'`` first.
        tides: TIDE's errors by kind.
        matches: Of the first kind.
        score_thr: Least score for confusion matrix and pictures.
        worst: Images with errors, the worst first.
        pictures: File by image id, relative to the report's folder.
    """

    truth: Truth
    source: dict[str, str]
    engine: str
    detections: dict[str, int]
    scores: dict[str, coco_eval.Scores]
    tides: dict[str, coco_eval.Tide]
    matches: confusion.Matches
    score_thr: float
    worst: list[ImageErrors]
    pictures: dict[int, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Of the confusion matrix: masks where there are any."""
        return next(iter(self.scores))

    def metrics(self) -> dict[str, float]:
        """COCO's numbers as a run logs them, ``coco/segm_mAP`` and so on; -1: no ground truth."""
        return {f'coco/{k}': v for s in self.scores.values() for k, v in s.metrics().items()}

    def per_class(self) -> dict[str, dict[str, float]]:
        """``<segm|bbox>_<AP|AP50|AP70>`` by class; absent where there is no ground truth."""
        found = {}
        for name in self.matches.names:
            numbers = {
                f'{kind}_{key}': scores.ap(name, iou)
                for kind, scores in self.scores.items()
                for key, iou in (('AP', None), ('AP50', 0.5), ('AP70', 0.7))
            }
            found[name] = {k: v for k, v in numbers.items() if v is not None}
        return found

    def notes(self) -> list[str]:
        """What a reader of the numbers should know, one line each."""
        absent = [n for c, n in self.truth.names.items() if not self.truth.counts[c]]
        lines = []
        if absent:
            lines.append(
                f'{len(absent)} of {len(self.truth.names)} classes have no objects here '
                'and count in no mean: ' + ', '.join(absent[:_ABSENT_SHOWN]) + ', …' * (len(absent) > _ABSENT_SHOWN)
            )
        empty = len(self.truth.images) - len({row['image_id'] for row in self.matches.rows})
        if 2 * empty > len(self.truth.images) and self.matches.rows:
            lines.append(
                f'There is no detection in {empty:,} of {len(self.truth.images):,} images: is this the right split?'
            )
        lines += [
            f'There is no {KINDS[kind]} detection at all: every AP is 0.'
            for kind, count in self.detections.items()
            if not count
        ]
        if 'bbox' not in self.scores:
            lines.append('No boxes were given (--boxes): the numbers are those of masks.')
        if 'segm' not in self.scores:
            lines.append('No masks were given: the numbers are those of boxes.')
        return lines

    def summary_rows(self) -> list[list[str]]:
        """COCO's 12 numbers, one row a kind."""
        return [['', *_COLUMNS]] + [[KINDS[kind], *map(_number, s.stats)] for kind, s in self.scores.items()]

    def class_rows(self) -> list[list[str]]:
        """Objects and AP of each class, and the mean over classes."""
        keys = [f'{self.kind}_{key}' for key in ('AP', 'AP50', 'AP70')]
        keys += ['bbox_AP'] if self.kind != 'bbox' and 'bbox' in self.scores else []
        head = [f'{KINDS[k.partition("_")[0]]} {k.partition("_")[2]}' for k in keys]
        rows = [['class', 'objects', *head]]
        for (name, numbers), count in zip(self.per_class().items(), self.truth.counts.values(), strict=True):
            rows.append([name, str(count), *(_number(numbers.get(k)) for k in keys)])
        iou = {'AP': None, 'AP50': 0.5, 'AP70': 0.7}
        means = [self.scores[kind].ap(None, iou[key]) for kind, _, key in (k.partition('_') for k in keys)]
        return [*rows, ['mean', str(sum(self.truth.counts.values())), *map(_number, means)]]

    def tide_rows(self) -> list[list[str]]:
        """TIDE's errors: by how much AP50 would rise, and how many there are."""
        rows = [['TIDE', 'AP50', *coco_eval.TIDE_ERRORS]]
        for kind, found in self.tides.items():
            rows.append([f'{KINDS[kind]}: AP50 rises by', _number(found.ap50), *map(_number, found.d_ap.values())])
            rows.append([f'{KINDS[kind]}: errors', '', *(f'{n:,}' for n in found.counts.values())])
        return rows

    def voc_line(self) -> str:
        """AP at IoU 0.5 and 0.7."""
        values = ', '.join(f'{iou}: {_number(self.scores[self.kind].ap(None, iou))}' for iou in VOC_IOUS)
        return (
            f'{KINDS[self.kind]} AP at IoU {values} (mAP^r of VOC)'
            if self.kind == 'segm'
            else f'{KINDS[self.kind]} AP at IoU {values}'
        )

    def f1_line(self) -> str:
        """F1 at the score threshold, and the threshold that would be best."""
        line = (
            f'F1 of {_PLURAL[self.kind]} with a score from {self.score_thr:g} on: '
            f'{_number(self.matches.f1(self.score_thr))}'
        )
        best = self.matches.best_f1()
        return line if best is None else f'{line}; the best, {_number(best[0])}, is from {best[1]:g} on'

    def text(self) -> str:
        """The report for the screen."""
        what = [f'{name}: {value}' for name, value in self.source.items()]
        return '\n'.join(
            [
                *what,
                self._counts(),
                *self.notes(),
                '',
                _table(self.summary_rows()),
                self.voc_line(),
                '',
                _table(self.class_rows()),
                _table(self.tide_rows()),
                self.f1_line(),
            ]
        )

    def markdown(self) -> str:
        """The report as a page with linked pictures."""
        cells = [[utils_text.cell(name), *rest] for name, *rest in self.class_rows()]
        lines = [
            '# Evaluation',
            '',
            *(f'- {n}: `{v}`' for n, v in self.source.items()),
            f'- {self._counts()}',
            *(f'- {note}' for note in self.notes()),
            '',
            _table(self.summary_rows()),
            f'{self.voc_line()}. `-`: no ground truth.',
            '',
            '## Classes',
            '',
            _table(cells),
            '## Errors',
            '',
            _table(self.tide_rows()),
            *(f'- {name}: {meaning}' for name, meaning in coco_eval.TIDE_ERRORS.items()),
            '',
        ]
        if self.pictures:
            lines += ['![TIDE errors](tide.png)', '']
        lines += ['## Confusion', '', f'{self.f1_line()}. {self._rule()}', '']
        if self.pictures:
            lines += ['![confusion matrix](confusion.png)', '']
        if self.worst:
            lines += [
                '## Worst images',
                '',
                'The more objects missed, falsely found or taken for another class, the worse; then the lower F1.',
                '',
            ]
            for place, e in enumerate(self.worst, 1):
                name = self.truth.images[e.image_id]['file_name']
                file = self.pictures.get(e.image_id)
                what = utils_text.cell(self.matches.describe(e))
                lines += [f'{place}. `{name}`: {_count(e.count)}, F1 {_number(e.f1)}. {what}', '']
                lines += [f'   ![{what}](<{file}>)', ''] if file else []
        return '\n'.join(lines).rstrip() + '\n'

    def class_csv(self) -> str:
        """The table of classes with all digits; empty where there is no ground truth."""
        keys = [f'{kind}_{key}' for kind in self.scores for key in ('AP', 'AP50', 'AP70')]
        rows = [
            [name, count, *(numbers.get(k, '') for k in keys)]
            for (name, numbers), count in zip(self.per_class().items(), self.truth.counts.values(), strict=True)
        ]
        return _csv([['class', 'objects', *keys], *rows])

    def confusion_csv(self) -> str:
        """The confusion matrix; rows are the true classes."""
        names = [*self.matches.names, confusion.NOTHING]
        matrix = self.matches.confusion(self.score_thr).tolist()
        return _csv([['true \\ predicted', *names], *([name, *row] for name, row in zip(names, matrix, strict=True))])

    def as_dict(self) -> dict[str, Any]:
        """All of it for machines; None: no ground truth."""
        best = self.matches.best_f1()
        voc = {
            f'voc/{kind}_AP{round(100 * iou)}': s.ap(None, iou) for kind, s in self.scores.items() for iou in VOC_IOUS
        }
        return {
            'source': self.source,
            'annotations': str(self.truth.path),
            'engine': self.engine,
            'images': len(self.truth.images),
            'objects': sum(self.truth.counts.values()),
            'crowd_regions': self.truth.crowds,
            'detections': self.detections,
            'notes': self.notes(),
            'metrics': {**{k: None if v == -1 else v for k, v in self.metrics().items()}, **voc},
            'per_class': {
                name: {'objects': count, **numbers}
                for (name, numbers), count in zip(self.per_class().items(), self.truth.counts.values(), strict=True)
            },
            'tide': {kind: asdict(found) for kind, found in self.tides.items()},
            'f1': {
                'kind': self.kind,
                'score_thr': self.score_thr,
                'f1': self.matches.f1(self.score_thr),
                'best_f1': best and best[0],
                'best_score_thr': best and best[1],
            },
            'confusion': {
                'kind': self.kind,
                'iou_thr': confusion.IOU_THR,
                'score_thr': self.score_thr,
                'classes': [*self.matches.names, confusion.NOTHING],
                'matrix': self.matches.confusion(self.score_thr).tolist(),
            },
            'worst': [
                {
                    'image_id': e.image_id,
                    'file_name': self.truth.images[e.image_id]['file_name'],
                    'errors': e.count,
                    'f1': e.f1,
                    'what': self.matches.describe(e),
                    'picture': self.pictures.get(e.image_id),
                }
                for e in self.worst
            ],
        }

    def charts(self) -> dict[str, bytes]:
        """PNG by file name."""
        title = f'{_PLURAL[self.kind]}, IoU ≥ {confusion.IOU_THR}, score ≥ {self.score_thr:g}'
        return {
            'tide.png': error_plots.tide_picture(self.tides),
            'confusion.png': error_plots.confusion_picture(
                self.matches.confusion(self.score_thr), self.matches.names, title
            ),
        }

    def draw_worst(self, root: Path) -> dict[str, bytes]:
        """Ground truth, prediction and what is wrong, side by side; JPEG by file name.

        Args:
            root: What the file names of the images are relative to.
        """
        drawn = {}
        for place, errors in enumerate(tqdm(self.worst, desc='pictures', leave=False, disable=None), 1):
            stem = Path(self.truth.images[errors.image_id]['file_name']).stem
            name = f'{WORST}/{place:02}_{stem}.jpg'
            drawn[name] = self._draw(errors, root)
            self.pictures[errors.image_id] = name
        return drawn

    def _draw(self, errors: ImageErrors, root: Path) -> bytes:
        import cv2
        from PIL import Image, ImageOps

        info, m = self.truth.images[errors.image_id], self.matches
        try:
            with Image.open(root / info['file_name']) as opened:
                image = np.array(ImageOps.exif_transpose(opened).convert('RGB'))
        except OSError as error:
            raise UserError(
                f'{root / info["file_name"]}: not an image that can be read: {error}',
                cure='put back a good copy, or leave the pictures out: --no-pictures',
            ) from None
        factor = min(1.0, _SIDE / max(image.shape[:2]))
        size = tuple(max(1, round(n * factor)) for n in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        objects = [i for i, o in enumerate(m.objects) if o['image_id'] == errors.image_id]
        shown = [i for i, r in enumerate(m.rows) if r['image_id'] == errors.image_id and m.scores[i] >= self.score_thr]
        shapes = {('object', i): self._shape(m.objects[i], size) for i in objects}
        shapes |= {('row', i): self._shape(m.rows[i], size) for i in shown}
        wrong = [(('object', i), f'missed {m.names[m.object_labels[i]]}') for i in errors.missed]
        wrong += [(('row', i), f'false {m.false_text(i)} {m.scores[i]:.2f}') for i in errors.false]
        wrong += [(('row', d), f'{m.confused_text(o, d)} {m.scores[d]:.2f}') for o, d in errors.confused]

        def panel(keys: Sequence, **options) -> np.ndarray:
            kind = 'masks' if self.kind == 'segm' else 'boxes'
            return (
                drawing.draw_instances(image, **{kind: np.array([shapes[k] for k in keys])}, **options)
                if keys
                else drawing.draw_instances(image)
            )

        picture = drawing.side_by_side(
            panel([('object', i) for i in objects], names=m.names, labels=[m.object_labels[i] for i in objects]),
            panel(
                [('row', i) for i in shown],
                names=m.names,
                labels=[m.labels[i] for i in shown],
                scores=[m.scores[i] for i in shown],
            ),
            panel([key for key, _ in wrong], names=[text for _, text in wrong], labels=range(len(wrong))),
            titles=[
                f'{info["file_name"]}: truth, {len(objects)} objects',
                f'prediction, {len(shown)} with a score ≥ {self.score_thr:g}',
                f'wrong: {len(errors.missed)} missed, {len(errors.false)} false, '
                f'{len(errors.confused)} taken for another class',
            ],
        )
        out = io.BytesIO()
        Image.fromarray(picture).save(out, 'JPEG', quality=90)
        return out.getvalue()

    def _shape(self, item: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
        """The mask or the box of an object or a detection in an image of this (width, height)."""
        import cv2
        from pycocotools import mask as mask_api

        info = self.truth.images[item['image_id']]
        if self.kind == 'bbox':
            x, y, w, h = item['bbox']
            return np.array([x, y, x + w, y + h]) * np.tile([size[0] / info['width'], size[1] / info['height']], 2)
        mask = mask_api.decode(self.truth.rle(item))
        return cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST).astype(bool)

    def _counts(self) -> str:
        found = ', '.join(f'{n:,} {KINDS[kind]} detections' for kind, n in self.detections.items())
        return (
            f'{len(self.truth.images):,} images, {sum(self.truth.counts.values()):,} objects, '
            f'{self.truth.crowds:,} crowd regions, {found}'
        )

    def _rule(self) -> str:
        return (
            f'A {KINDS[self.kind]} finds an object with IoU ≥ {confusion.IOU_THR}; in each '
            'image detections take objects in the order of their scores, whatever the classes. '
            'One that gets none, as a second one on the same object, is in the row '
            f'`{confusion.NOTHING}`.'
        )


def analyse(
    truth: Truth,
    rows: Mapping[str, Sequence[Mapping]],
    source: dict[str, str],
    engine: str = 'hotcoco',
    score_thr: float = 0.3,
    worst: int = 16,
) -> Report:
    """Evaluate detections and find out what is wrong with them.

    Args:
        truth: The ground truth.
        rows: COCO result rows by kind, ``'segm'``, ``'bbox'`` or both.
        source: What they are, by name.
        engine: One of `analysis.ENGINES`.
        score_thr: Least score for confusion matrix and worst images.
        worst: How many of these.
    """
    rows = {kind: rows[kind] for kind in KINDS if kind in rows}
    scores, tides = {}, {}
    with tqdm(total=2 * len(rows), leave=False, disable=None) as bar:
        for kind, found in rows.items():
            bar.set_description(f'COCO, {KINDS[kind]}')
            scores[kind] = coco_eval.evaluate(truth.data, found, kind, engine)
            bar.update()
            bar.set_description(f'TIDE, {KINDS[kind]}')
            tides[kind] = coco_eval.tide(truth.data, found, kind)
            bar.update()
    kind = next(iter(rows))
    matches = confusion.match(truth, rows[kind], kind)
    return Report(
        truth,
        source,
        engine,
        {k: len(v) for k, v in rows.items()},
        scores,
        tides,
        matches,
        score_thr,
        matches.errors(score_thr)[:worst],
    )


def _number(value: float | None) -> str:
    return '-' if value is None or value == -1 else f'{value:.3f}'


def _count(errors: int) -> str:
    return f'{errors} error' + 's' * (errors != 1)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return utils_text.table(rows, markdown=True) + '\n'


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    return utils_text.csv_text(rows)
