"""Detections matched to objects whatever their classes: confusion matrix, F1, the worst images.

hotcoco 1.3 has a confusion matrix, F scores and diagnostics of images too. They are not used,
since (tests/evaluation/test_confusion.py, ``test_hotcoco_…``):

- its matrix counts a detection in a crowd region as false; without crowd regions both agree;
- its image diagnostics match within each class and at every score, so that a cat predicted as a
  dog is two errors, and do not say which object a second detection covers;
- its F scores are a mean over classes, each at a threshold of its own that is not returned.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmfinetune.evaluation.detections import Truth
from mmfinetune.utils.console import bar

IOU_THR = 0.5
MAX_DETS = 100  # per image, as in COCO's AP
NOTHING = 'background'


@dataclass
class ImageErrors:
    """What is wrong in one image; numbers are places in `Matches.rows` and `Matches.objects`.

    Attributes:
        right: Number of objects found with the right class.
        missed: Objects without a detection.
        false: Detections without an object.
        confused: (object, detection) of different classes.
    """

    image_id: int
    right: int = 0
    missed: list[int] = field(default_factory=list)
    false: list[int] = field(default_factory=list)
    confused: list[tuple[int, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of errors; an object predicted as another class is one."""
        return len(self.missed) + len(self.false) + len(self.confused)

    @property
    def f1(self) -> float:
        """F1 of objects found with the right class; 1 where there is nothing and nothing is found."""
        total = 2 * self.right + self.count + len(self.confused)
        return 2 * self.right / total if total else 1.0


@dataclass(frozen=True)
class Matches:
    """Each detection with the object it covers, and what became of each object.

    In each image detections take objects in the order of their scores, each the free one with the
    largest IoU, at least 0.5, whatever the classes. So what a detection gets does not depend on
    those with lower scores, and one matching serves for all score thresholds. One that gets none
    and is at least by half in a crowd region of its class is ignored.

    Attributes:
        rows: The detections, at most 100 per image, as COCO result rows.
        objects: Annotations without crowd regions.
        labels, object_labels: Class number of each detection and object.
        found: Number of the object that each detection takes; -1 for none.
        over: Number of the object that each detection covers best, taken or not; -1 for none.
        ignored: Whether a detection is not counted.
    """

    names: tuple[str, ...]
    rows: list[dict]
    objects: list[dict]
    labels: np.ndarray
    scores: np.ndarray
    found: np.ndarray
    over: np.ndarray
    ignored: np.ndarray
    object_labels: np.ndarray

    def confusion(self, score_thr: float) -> np.ndarray:
        """Counts of detections from a score on.

        Returns:
            (K + 1, K + 1) int. Rows: class of the object, columns: of the detection; the last
            row holds detections without an object, the last column objects that were not found.
        """
        count = len(self.names)
        matrix = np.zeros((count + 1, count + 1), int)
        hit, false = self._hits(score_thr)
        np.add.at(matrix, (self.object_labels[self.found[hit]], self.labels[hit]), 1)
        np.add.at(matrix, (count, self.labels[false]), 1)
        missed = np.ones(len(self.objects), bool)
        missed[self.found[hit]] = False
        np.add.at(matrix, (self.object_labels[missed], count), 1)
        return matrix

    def _hits(self, score_thr: float) -> tuple[np.ndarray, np.ndarray]:
        """Which detections from a score on take an object, and which are false, both (N,) bool."""
        used = (self.scores >= score_thr) & ~self.ignored
        return used & (self.found >= 0), used & (self.found < 0)

    def f1(self, score_thr: float) -> float:
        """F1 of objects found with the right class, over all images and classes."""
        matrix = self.confusion(score_thr)
        total = int(matrix[:, :-1].sum() + matrix[:-1].sum())  # detections and objects
        return 2 * int(matrix[:-1].trace()) / total if total else 1.0

    def best_f1(self) -> tuple[float, float] | None:
        """The highest F1 over all score thresholds, and the shortest number that gives it.

        Returns:
            F1 and threshold; None if there is no detection.
        """
        order = np.argsort(-self.scores, kind='stable')
        order = order[~self.ignored[order]]
        if not order.size:
            return None
        scores, found = self.scores[order], self.found[order]
        right = found >= 0
        right[right] = self.object_labels[found[right]] == self.labels[order][right]
        f1 = 2 * np.cumsum(right) / (np.arange(1, len(order) + 1) + len(self.objects))
        # A threshold takes all detections of one score or none of them.
        last = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
        best = int(last[int(np.argmax(f1[last]))])
        below = scores[best + 1] if best + 1 < len(scores) else -1.0
        digits = (math.floor(scores[best] * 10**d) / 10**d for d in range(1, 17))
        return float(f1[best]), next((float(t) for t in digits if below < t), float(scores[best]))

    def errors(self, score_thr: float) -> list[ImageErrors]:
        """Images with errors, the worst first.

        Worse is more objects missed, falsely found or confused with another class; then a lower F1.
        """
        hit, false = self._hits(score_thr)
        taker = {int(self.found[i]): int(i) for i in np.flatnonzero(hit)}
        images = {item['image_id']: ImageErrors(item['image_id']) for item in (*self.objects, *self.rows)}
        for i, thing in enumerate(self.objects):
            image = images[thing['image_id']]
            if i not in taker:
                image.missed.append(i)
            elif self.labels[taker[i]] == self.object_labels[i]:
                image.right += 1
            else:
                image.confused.append((i, taker[i]))
        for i in np.flatnonzero(false):
            images[self.rows[i]['image_id']].false.append(int(i))
        return sorted((e for e in images.values() if e.count), key=lambda e: (-e.count, e.f1, e.image_id))

    def describe(self, errors: ImageErrors) -> str:
        """E.g. ``missed: 2 dog; false: cow on cat; confused: cat predicted as dog``."""

        def listed(texts: Sequence[str]) -> str:
            return ', '.join(f'{n} {t}' if n > 1 else t for t, n in Counter(texts).items())

        parts = {
            'missed': listed([self.names[self.object_labels[i]] for i in errors.missed]),
            'false': listed([self.false_text(i) for i in errors.false]),
            'confused': listed([self.confused_text(*pair) for pair in errors.confused]),
        }
        return '; '.join(f'{what}: {text}' for what, text in parts.items() if text)

    def false_text(self, detection: int) -> str:
        """What a false detection is: ``cow`` of nothing, ``cow on cat``, or a ``second cow``."""
        name, thing = self.names[self.labels[detection]], self.over[detection]
        if thing < 0:
            return name
        under = self.names[self.object_labels[thing]]
        return f'second {name}' if under == name else f'{name} on {under}'

    def confused_text(self, thing: int, detection: int) -> str:
        """``cat predicted as dog``."""
        return f'{self.names[self.object_labels[thing]]} predicted as {self.names[self.labels[detection]]}'


def match(truth: Truth, rows: Sequence[dict], kind: str, iou_thr: float = IOU_THR) -> Matches:
    """Match detections to the objects of their images; see `Matches`.

    Args:
        rows: COCO result rows.
        kind: ``'segm'`` or ``'bbox'``: what the IoU is measured of.
        iou_thr: Least IoU, and least share of a detection in a crowd region.
    """
    from pycocotools import mask as mask_api

    shape_of = truth.rle if kind == 'segm' else lambda a: a['bbox']
    key = 'segmentation' if kind == 'segm' else 'bbox'
    label_of = {c: i for i, c in enumerate(truth.names)}
    by_image, in_image = defaultdict(list), defaultdict(list)
    for row in rows:
        by_image[row['image_id']].append(row)
    for annotation in truth.data['annotations']:
        in_image[annotation['image_id']].append(annotation)
    kept: list[dict] = []
    objects: list[dict] = []
    found, over, ignored = [], [], []
    for image_id in bar(truth.images, desc='matching', unit='image'):
        best = sorted(by_image[image_id], key=lambda r: -r['score'])[:MAX_DETS]
        # Crowd regions last, so that the column of an object is its place.
        things = sorted(in_image[image_id], key=lambda a: a['iscrowd'])
        crowd = np.array([a['iscrowd'] for a in things], bool)
        same_class = np.equal.outer([r['category_id'] for r in best], [a['category_id'] for a in things])
        ious = np.array(mask_api.iou([r[key] for r in best], [shape_of(a) for a in things], crowd))
        ious = ious.reshape(same_class.shape)  # pycocotools gives an empty list where one of both is empty
        hits = ious >= iou_thr
        ignorable = (hits & same_class)[:, crowd].any(1)
        # -1 is no object.
        taken, under = _taken(np.where(hits, ious, -1)[:, ~crowd])
        found += [len(objects) + place if place >= 0 else -1 for place in taken]
        over += [len(objects) + place if place >= 0 else -1 for place in under]
        ignored += list(ignorable & (taken < 0))
        kept += best
        objects += things[: len(things) - crowd.sum()]
    return Matches(
        names=tuple(truth.names.values()),
        rows=kept,
        objects=objects,
        labels=np.array([label_of[r['category_id']] for r in kept], int),
        scores=np.array([r['score'] for r in kept], float),
        found=np.array(found, int),
        over=np.array(over, int),
        ignored=np.array(ignored, bool),
        object_labels=np.array([label_of[a['category_id']] for a in objects], int),
    )


def _taken(ious: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The object that each detection of an image takes, and the one that it covers best; -1 for none.

    Args:
        ious: (detections, objects), the best detection first; -1 where an IoU is too small.
    """
    taken = np.full(len(ious), -1)
    if not ious.size:
        return taken, taken
    under = np.where(ious.max(1) < 0, -1, ious.argmax(1))
    for i, row in enumerate(ious):
        place = row.argmax()
        if row[place] >= 0:
            taken[i] = place
            ious[:, place] = -1
    return taken, under
