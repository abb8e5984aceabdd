"""COCO's numbers and TIDE's errors of detections: the one place that runs an evaluation engine."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfinetune.evaluation.stats import STATS

ENGINES = ('hotcoco', 'pycocotools')
# Bolya et al., TIDE (ECCV 2020), section 2.2; IoU_max is the largest IoU with any object.
TIDE_ERRORS = {
    'Cls': 'right place (IoU ≥ 0.5), wrong class',
    'Loc': 'right class, wrong place (0.1 ≤ IoU < 0.5)',
    'Both': 'wrong class and wrong place',
    'Dupe': 'right, but the object is taken by a better one',
    'Bkg': 'nothing there (IoU < 0.1)',
    'Miss': 'object not found, and not by Cls or Loc either',
}


@dataclass(frozen=True)
class Scores:
    """What an engine says of the detections of one kind, ``'bbox'`` or ``'segm'``.

    Attributes:
        stats: COCO's 12 numbers in the order of `STATS`; -1 where there is no ground truth.
        precision: (IoU, recall, class, area, maxDets), -1 where there is no ground truth.
        names: Names of the classes, in the order of the third axis.
    """

    iou_type: str
    stats: np.ndarray
    precision: np.ndarray
    iou_thrs: np.ndarray
    names: tuple[str, ...]

    def metrics(self) -> dict[str, float]:
        """The 12 numbers by name, e.g. ``segm_mAP_50``."""
        return {f'{self.iou_type}_{name}': float(value) for name, value in zip(STATS, self.stats, strict=True)}

    def ap(self, name: str | None = None, iou: float | None = None) -> float | None:
        """Average precision over COCO's 101 recall points, objects of all sizes.

        Args:
            name: Name of a class; by default the mean over all classes with ground truth.
            iou: IoU threshold; by default the mean over all thresholds.

        Returns:
            None where there is no ground truth, or no such threshold.
        """
        values = self.precision[..., 0, -1]
        if name is not None:
            values = values[:, :, self.names.index(name)]
        if iou is not None:
            values = values[np.isclose(self.iou_thrs, iou)]
        values = values[values > -1]
        return float(values.mean()) if values.size else None


@dataclass(frozen=True)
class Tide:
    """Errors by kind; see `TIDE_ERRORS`.

    Attributes:
        ap50: AP at IoU 0.5, mean over the classes with ground truth.
        d_ap: By how much AP50 rises if all errors of one kind, and only these, are fixed.
        counts: Number of errors of each kind, among the 100 best detections an image and class.
    """

    ap50: float
    d_ap: dict[str, float]
    counts: dict[str, int]


def evaluate(
    dataset: Mapping[str, Any],
    rows: Sequence[dict],
    iou_type: str,
    engine: str = 'hotcoco',
    cat_ids: Sequence[int] | None = None,
    img_ids: Sequence[int] | None = None,
    iou_thrs: Sequence[float] | None = None,
) -> Scores:
    """Evaluate detections of one kind by COCO's rules (``maxDets`` 1, 10, 100).

    Args:
        dataset: Content of a COCO annotation file; it is not changed.
        rows: COCO result rows, may be empty. Rows of masks must have no ``bbox``: COCO would take
            the areas of the boxes.
        cat_ids: Classes to evaluate; all in the order of the file by default.
        img_ids: Images to evaluate; all by default.
        iou_thrs: COCO's 0.5, 0.55, …, 0.95 by default.
    """
    names = {c['id']: c['name'] for c in dataset['categories']}
    cat_ids = list(names if cat_ids is None else cat_ids)
    if img_ids is not None and not img_ids:
        # Both engines would take no choice for all images.
        dataset, rows = {**dataset, 'images': [], 'annotations': []}, []
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # hotcoco warns of other thresholds than COCO's
        evaluator = _evaluator(engine, dataset, rows, iou_type)
        evaluator.params.catIds = sorted(cat_ids)  # pycocotools would do so, hotcoco does not
        if img_ids is not None:
            evaluator.params.imgIds = list(img_ids)
        if iou_thrs is not None:
            evaluator.params.iouThrs = np.asarray(iou_thrs)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    order = np.argsort(np.argsort(cat_ids))
    return Scores(
        iou_type,
        np.asarray(evaluator.stats, float),
        np.asarray(evaluator.eval['precision'])[:, :, order],
        np.asarray(evaluator.params.iouThrs),
        tuple(names[c] for c in cat_ids),
    )


def tide(dataset: Mapping[str, Any], rows: Sequence[dict], iou_type: str) -> Tide:
    """Decompose the errors of detections as TIDE does, at IoU 0.5 and 0.1; always by hotcoco.

    It differs from the authors' ``tidecv`` where scores are equal (there the order of equal ones
    changes between the AP and its corrections), near crowd regions (what partly covers one is
    mostly ``Loc`` here and ``Bkg`` there) and for classes without ground truth (left out of the
    mean here, 0 there).

    Args:
        dataset, rows, iou_type: See `evaluate`.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = _evaluator('hotcoco', dataset, rows, iou_type)
        evaluator.evaluate()
        found = evaluator.tide_errors()
    return Tide(
        float(found['ap_base']),
        {e: float(found['delta_ap'][e]) for e in TIDE_ERRORS},
        {e: int(found['counts'][e]) for e in TIDE_ERRORS},
    )


def _evaluator(engine: str, dataset: Mapping[str, Any], rows: Sequence[dict], iou_type: str):
    if engine == 'hotcoco':
        import hotcoco

        hot = hotcoco.COCO(dict(dataset))
        return hotcoco.COCOeval(hot, hot.loadRes(list(rows)), iou_type)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    found.dataset = {'annotations': []}
    # Copies, since pycocotools writes into both.
    truth.dataset = {**dataset, 'annotations': [dict(a) for a in dataset['annotations']]}
    truth.createIndex()
    if rows:  # pycocotools' loadRes looks at the first row
        found = truth.loadRes([dict(row) for row in rows])
    return COCOeval(truth, found, iou_type)
