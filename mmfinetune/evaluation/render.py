"""A report of an evaluation as text, Markdown, CSV and pictures."""

from __future__ import annotations

import functools
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfinetune.data import drawing
from mmfinetune.evaluation import coco_eval, confusion, error_plots
from mmfinetune.evaluation.confusion import ImageErrors
from mmfinetune.evaluation.report import CLASS_APS, VOC_IOUS, Report
from mmfinetune.evaluation.stats import KINDS, number, stat_rows
from mmfinetune.utils.console import bar
from mmfinetune.utils.extras import extra
from mmfinetune.utils.images import open_image
from mmfinetune.utils.text import block, cell, csv_text, plural

WORST = 'worst'
_PLURAL = {'segm': 'masks', 'bbox': 'boxes'}
_SIDE = 1000  # px; larger images are drawn smaller


def class_rows(report: Report) -> list[list[str]]:
    """Table of the objects and the AP of each class, and the mean over classes."""
    columns = [(report.kind, key) for key in CLASS_APS]
    if report.kind != 'bbox' and 'bbox' in report.scores:
        columns.append(('bbox', 'AP'))
    rows = [['class', 'objects', *(f'{KINDS[kind]} {key}' for kind, key in columns)]]
    counts = report.truth.counts.values()
    for (name, numbers), count in zip(report.per_class().items(), counts, strict=True):
        rows.append([name, str(count), *(number(numbers.get(f'{kind}_{key}')) for kind, key in columns)])
    means = [number(report.scores[kind].ap(None, CLASS_APS[key])) for kind, key in columns]
    return [*rows, ['mean', str(sum(counts)), *means]]


def tide_rows(report: Report) -> list[list[str]]:
    """Table of TIDE's errors: by how much AP50 would rise, and how many there are."""
    rows = [['TIDE', 'AP50', *coco_eval.TIDE_ERRORS]]
    for kind, found in report.tides.items():
        rows.append([f'{KINDS[kind]}: AP50 rises by', number(found.ap50), *map(number, found.d_ap.values())])
        rows.append([f'{KINDS[kind]}: errors', '', *(f'{n:,}' for n in found.counts.values())])
    return rows


def voc_line(report: Report) -> str:
    """AP at IoU 0.5 and 0.7."""
    values = ', '.join(f'{iou}: {number(report.scores[report.kind].ap(None, iou))}' for iou in VOC_IOUS)
    return f'{KINDS[report.kind]} AP at IoU {values}' + (' (mAP^r of VOC)' if report.kind == 'segm' else '')


def f1_line(report: Report) -> str:
    """F1 at the score threshold, and the threshold that would be best."""
    score_thr = report.score_thr
    f1, best = number(report.matches.f1(score_thr)), report.matches.best_f1()
    line = f'F1 of {_PLURAL[report.kind]} with a score from {score_thr:g} on: {f1}'
    return line if best is None else f'{line}; the best, {number(best[0])}, is from {best[1]:g} on'


def text(report: Report) -> str:
    """The report for the screen; its tables are Markdown, which can be read as it is."""
    lines = [
        *(f'{name}: {value}' for name, value in report.source.items()),
        _counts(report),
        *map(str, report.notes()),
        '',
        block(stat_rows(report.metrics())),
        voc_line(report),
        '',
        block(class_rows(report)),
        block(tide_rows(report)),
        f1_line(report),
    ]
    return '\n'.join(lines)


def markdown(report: Report, charts: Collection[str] = ()) -> str:
    """The report as a page with linked pictures, among them these of `charts`."""
    matrix_rule = (
        f'A {KINDS[report.kind]} finds an object with IoU ≥ {confusion.IOU_THR}; in each '
        'image detections take objects in the order of their scores, whatever the classes. '
        f'One that gets none, such as a second one on the same object, is in the row `{confusion.NOTHING}`.'
    )
    lines = ['# Evaluation', '']
    lines += [f'- {name}: `{value}`' for name, value in report.source.items()]
    lines += [f'- {line}' for line in (_counts(report), *report.notes())]
    lines += ['', block(stat_rows(report.metrics())), f'{voc_line(report)}. `-`: no ground truth.', '']
    lines += ['## Classes', '', block(class_rows(report)), '## Errors', '', block(tide_rows(report))]
    lines += [*(f'- {name}: {meaning}' for name, meaning in coco_eval.TIDE_ERRORS.items()), '']
    if 'tide.png' in charts:
        lines += ['![TIDE errors](tide.png)', '']
    lines += ['## Confusion', '', f'{f1_line(report)}. {matrix_rule}', '']
    if 'confusion.png' in charts:
        lines += ['![confusion matrix](confusion.png)', '']
    if report.worst:
        rule = (
            'Images with most objects missed, falsely found or confused with another class, then those with lower F1.'
        )
        lines += ['## Worst images', '', rule, '']
    for place, errors in enumerate(report.worst, 1):
        name, file = report.truth.images[errors.image_id]['file_name'], report.pictures.get(errors.image_id)
        what = cell(report.matches.describe(errors))
        lines += [f'{place}. `{name}`: {plural(errors.count, "error")}, F1 {number(errors.f1)}. {what}', '']
        if file:
            lines += [f'   ![{what}](<{file}>)', '']
    return '\n'.join(lines).rstrip() + '\n'


def class_csv(report: Report) -> str:
    """The table of classes with all digits; empty where there is no ground truth."""
    keys = [f'{kind}_{key}' for kind in report.scores for key in CLASS_APS]
    rows = zip(report.per_class().items(), report.truth.counts.values(), strict=True)
    cells = ([name, count, *(numbers.get(k, '') for k in keys)] for (name, numbers), count in rows)
    return csv_text([['class', 'objects', *keys], *cells])


def confusion_csv(report: Report) -> str:
    """The confusion matrix; rows are the true classes."""
    names = [*report.matches.names, confusion.NOTHING]
    matrix = report.matches.confusion(report.score_thr).tolist()
    return csv_text([['true \\ predicted', *names], *([name, *row] for name, row in zip(names, matrix, strict=True))])


def charts(report: Report) -> dict[str, bytes]:
    """The TIDE errors and the confusion matrix; PNG by file name."""
    title = f'{_PLURAL[report.kind]}, IoU ≥ {confusion.IOU_THR}, score ≥ {report.score_thr:g}'
    matrix = report.matches.confusion(report.score_thr)
    drawn = {}
    with extra('tide.png'):
        drawn['tide.png'] = error_plots.tide_picture(report.tides)
    with extra('confusion.png'):
        drawn['confusion.png'] = error_plots.confusion_picture(matrix, report.matches.names, title)
    return drawn


def draw_worst(report: Report, root: Path) -> dict[str, bytes]:
    """Draw ground truth, prediction and what is wrong side by side; JPEG by file name.

    The names are noted in ``report.pictures``.

    Args:
        root: Folder that the file names of the images are relative to.
    """
    drawn = {}
    for place, errors in enumerate(bar(report.worst, desc='pictures'), 1):
        stem = Path(report.truth.images[errors.image_id]['file_name']).stem
        name = f'{WORST}/{place:02}_{stem}.jpg'
        with extra(name):
            drawn[name] = _draw(report, errors, root)
            report.pictures[errors.image_id] = name
    return drawn


def _draw(report: Report, errors: ImageErrors, root: Path) -> bytes:
    from PIL import Image

    name, m = report.truth.images[errors.image_id]['file_name'], report.matches
    objects = [i for i, o in enumerate(m.objects) if o['image_id'] == errors.image_id]
    found = [i for i, r in enumerate(m.rows) if r['image_id'] == errors.image_id and m.scores[i] >= report.score_thr]
    wrong = [(m.objects[i], f'missed {m.names[m.object_labels[i]]}') for i in errors.missed]
    wrong += [(m.rows[i], f'false {m.false_text(i)} {m.scores[i]:.2f}') for i in errors.false]
    wrong += [(m.rows[d], f'{m.confused_text(o, d)} {m.scores[d]:.2f}') for o, d in errors.confused]
    panel = functools.partial(_panel, report, _read_image(root / name))
    picture = drawing.side_by_side(
        panel([m.objects[i] for i in objects], m.names, m.object_labels[objects].tolist()),
        panel([m.rows[i] for i in found], m.names, m.labels[found].tolist(), m.scores[found].tolist()),
        panel([item for item, _ in wrong], [what for _, what in wrong], range(len(wrong))),
        titles=[
            f'{name}: truth, {plural(len(objects), "object")}',
            f'prediction, {len(found)} with a score ≥ {report.score_thr:g}',
            f'wrong: {len(errors.missed)} missed, {len(errors.false)} false, {len(errors.confused)} confused',
        ],
    )
    out = io.BytesIO()
    Image.fromarray(picture).save(out, 'JPEG', quality=90)
    return out.getvalue()


def _read_image(path: Path) -> np.ndarray:
    """An upright RGB image, made smaller if it is large."""
    import cv2
    from PIL import ImageOps

    with open_image(path) as opened:
        image = np.array(ImageOps.exif_transpose(opened).convert('RGB'))
    factor = min(1.0, _SIDE / max(image.shape[:2]))
    size = [max(1, round(n * factor)) for n in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _panel(
    report: Report,
    image: np.ndarray,
    items: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    labels: Sequence[int],
    scores: Sequence[float] | None = None,
) -> np.ndarray:
    """The image with the masks or boxes of some objects or detections."""
    import cv2
    from pycocotools import mask as mask_api

    size = image.shape[1::-1]
    shapes = []
    for item in items:
        if report.kind == 'segm':
            mask = mask_api.decode(report.truth.rle(item))
            shapes.append(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST).astype(bool))
        else:
            info = report.truth.images[item['image_id']]
            x, y, w, h = item['bbox']
            scale = np.tile([size[0] / info['width'], size[1] / info['height']], 2)
            shapes.append(np.array([x, y, x + w, y + h]) * scale)
    boxes, masks = (np.array(shapes) if report.kind == kind else None for kind in ('bbox', 'segm'))
    return drawing.draw_instances(image, boxes=boxes, masks=masks, names=names, labels=labels, scores=scores)


def _counts(report: Report) -> str:
    found = ', '.join(f'{n:,} {KINDS[kind]} detections' for kind, n in report.detections.items())
    return (
        f'{len(report.truth.images):,} images, {sum(report.truth.counts.values()):,} objects, '
        f'{report.truth.crowds:,} crowd regions, {found}'
    )
