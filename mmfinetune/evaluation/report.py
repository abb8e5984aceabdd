"""What an evaluation found, as numbers; see `render` for text and pictures of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmfinetune.evaluation import coco_eval, confusion
from mmfinetune.evaluation.confusion import ImageErrors
from mmfinetune.evaluation.detections import Truth
from mmfinetune.evaluation.stats import KINDS, PREFIX, SCORE_THR
from mmfinetune.utils import console
from mmfinetune.utils.errors import Message

# Hariharan et al., Simultaneous Detection and Segmentation (ECCV 2014), report AP^r at these IoUs.
VOC_IOUS = (0.5, 0.7)
# The IoU threshold of each AP of a class; None: the mean over all thresholds.
CLASS_APS = {'AP': None, 'AP50': 0.5, 'AP70': 0.7}
WORST_IMAGES = 16
_MAX_ABSENT_SHOWN = 12


@dataclass
class Report:
    """The results of one evaluation.

    Attributes:
        source: What was evaluated, by name: checkpoint, config, split or files.
        detections, scores, tides: Number of detections, COCO's numbers and TIDE's errors by kind, ``'segm'`` first.
        matches: Matched detections of the first kind.
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
        """The kind of the confusion matrix: masks where there are any."""
        return next(iter(self.scores))

    def metrics(self) -> dict[str, float]:
        """COCO's numbers as a run logs them, ``coco/segm_mAP`` and so on; -1: no ground truth."""
        return {f'{PREFIX}{k}': v for s in self.scores.values() for k, v in s.metrics().items()}

    def per_class(self) -> dict[str, dict[str, float]]:
        """``<segm|bbox>_<AP|AP50|AP70>`` by class; absent where there is no ground truth."""
        columns = [(f'{kind}_{key}', s, iou) for kind, s in self.scores.items() for key, iou in CLASS_APS.items()]
        return {
            name: {column: value for column, s, iou in columns if (value := s.ap(name, iou)) is not None}
            for name in self.matches.names
        }

    def notes(self) -> list[Message]:
        """What a reader of the numbers should know."""
        notes = []
        absent = [n for c, n in self.truth.names.items() if not self.truth.counts[c]]
        if absent:
            names = ', '.join(absent[:_MAX_ABSENT_SHOWN])
            if len(absent) > _MAX_ABSENT_SHOWN:
                names += ', …'
            notes.append(Message('eval-absent-classes', count=len(absent), total=len(self.truth.names), names=names))
        images = len(self.truth.images)
        empty = images - len({row['image_id'] for row in self.matches.rows})
        if 2 * empty > images and self.matches.rows:
            notes.append(Message('eval-empty-images', empty=empty, images=images))
        notes += [
            Message('eval-no-detections', kind=KINDS[kind]) for kind, count in self.detections.items() if not count
        ]
        if 'bbox' not in self.scores:
            notes.append(Message('eval-no-boxes'))
        if 'segm' not in self.scores:
            notes.append(Message('eval-no-masks'))
        return notes

    def as_dict(self) -> dict[str, Any]:
        """All of it for machines; None: no ground truth."""
        best = self.matches.best_f1()
        metrics = {k: None if v == -1 else v for k, v in self.metrics().items()}
        for kind, scores in self.scores.items():
            metrics |= {f'voc/{kind}_AP{round(100 * iou)}': scores.ap(None, iou) for iou in VOC_IOUS}
        counts = self.truth.counts.values()
        per_class = zip(self.per_class().items(), counts, strict=True)
        return {
            'source': self.source,
            'annotations': str(self.truth.path),
            'engine': self.engine,
            'images': len(self.truth.images),
            'objects': sum(counts),
            'crowd_regions': self.truth.crowds,
            'detections': self.detections,
            'notes': [str(note) for note in self.notes()],
            'metrics': metrics,
            'per_class': {name: {'objects': count, **numbers} for (name, numbers), count in per_class},
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


def analyse(
    truth: Truth,
    rows: Mapping[str, Sequence[dict]],
    source: dict[str, str],
    engine: str = 'hotcoco',
    score_thr: float = SCORE_THR,
    worst: int = WORST_IMAGES,
) -> Report:
    """Evaluate detections and find out what is wrong with them.

    Args:
        rows: COCO result rows by kind, ``'segm'``, ``'bbox'`` or both.
        source: What the rows are, by name.
        score_thr: Least score for confusion matrix and worst images.
        worst: How many of the worst images to keep.
    """
    rows = {kind: rows[kind] for kind in KINDS if kind in rows}
    scores, tides = {}, {}
    with console.bar(total=2 * len(rows)) as bar:
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
        truth=truth,
        source=source,
        engine=engine,
        detections={k: len(v) for k, v in rows.items()},
        scores=scores,
        tides=tides,
        matches=matches,
        score_thr=score_thr,
        worst=matches.errors(score_thr)[:worst],
    )
