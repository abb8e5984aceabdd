"""COCO box and mask metrics with a choice of engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS
from mmengine.logging import MMLogger

from mmfinetune.engine.compat import truth_of
from mmfinetune.engine.hooks import warn
from mmfinetune.evaluation import coco_eval
from mmfinetune.evaluation.detections import result_rows
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.text import is_number, table


@METRICS.register_module()
class InstanceCocoMetric(CocoMetric):
    """COCO's 12 numbers for boxes and masks, and AP of each class for both.

    Unlike those of mmdet's metric the numbers are COCO's own (``maxDets`` 1, 10, 100), unrounded; box and mask AP of a
    class do not overwrite each other; nothing is written to disk unless ``outfile_prefix`` asks for it.

    The ground truth is that of the images in the data set: ``indices`` or a filter leaves out their objects too.

    Keys: ``coco/<bbox|segm>_<mAP|mAP_50|…|AR_l@100>`` and, with ``classwise``, ``coco/<bbox|segm>_AP/<class>``. A
    number for which the ground truth has no instance is -1 as in pycocotools; a class without instances has no key.

    Args:
        engine: ``'hotcoco'`` (Rust) or ``'pycocotools'``: the same numbers.
        **kwargs: See mmdet's ``CocoMetric``; ``metric`` takes ``bbox`` and ``segm``, and ``ann_file`` is needed.

    Raises:
        UserError: An argument is missing or not one of these.

    Attributes:
        per_class: Of the last evaluation, on the main process: ``<bbox|segm>_AP`` and ``<bbox|segm>_AP50`` by class
            name, whether or not ``classwise``. A class without instances has no numbers.
    """

    def __init__(self, *args, engine: str = 'hotcoco', **kwargs) -> None:
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        if engine not in coco_eval.ENGINES:
            raise UserError('metric-engine', metric=name, engine=engine, known=', '.join(coco_eval.ENGINES))
        if wrong := set(self.metrics) - {'bbox', 'segm'}:
            raise UserError('metric-kind', metric=name, wrong=', '.join(sorted(wrong)))
        thrs: Any = self.iou_thrs  # type: ignore[has-type]
        thrs = list(thrs) if isinstance(thrs, (list, tuple, np.ndarray)) else [thrs]
        if not thrs or not all(is_number(thr) and 0 < thr <= 1 for thr in thrs):
            raise UserError('metric-iou-thrs', metric=name, value=kwargs.get('iou_thrs'))
        self.iou_thrs = thrs
        truth = truth_of(self)
        if truth is None:
            # mmdet would convert what the data loader gives, and count and round it in its own way.
            raise UserError('metric-without-truth', metric=name)
        self.truth, self.engine = truth, engine
        self.per_class: dict[str, dict[str, float]] = {}

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Gather predictions; raises UserError where masks are to be judged and the model has none."""
        super().process(data_batch, data_samples)
        if 'segm' in self.metrics and any('masks' not in sample['pred_instances'] for sample in data_samples):
            raise UserError('metric-no-masks', metric=type(self).__name__)

    def _detections(self, preds: Sequence[dict], iou_type: str) -> list[dict]:
        """COCO result rows; masks without a box, so that areas are those of the masks."""
        rows = []
        for pred in preds:
            scores, found = pred['scores'], {'boxes': pred['bboxes']}
            if iou_type == 'segm':
                scores, found = pred.get('mask_scores', scores), {'masks': pred['masks']}
            rows += result_rows(pred['img_id'], self.cat_ids, pred['labels'], scores, **found)
        return rows

    def evaluate_rows(self, rows: list[dict], iou_type: str) -> coco_eval.Scores:
        """Run the engine on COCO result rows of one kind."""
        truth, ids = self.truth.dataset, (self.cat_ids, self.img_ids)
        return coco_eval.evaluate(truth, rows, iou_type, self.engine, *ids, self.iou_thrs)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """COCO numbers of all ``(gt, pred)`` pairs that ``process`` gathered."""
        logger = MMLogger.get_current_instance()
        # A data set that repeats images gives several predictions of one; a sampler may leave images out.
        preds = list({pred['img_id']: pred for _, pred in results}.values())
        seen = {pred['img_id'] for pred in preds}
        self.cat_ids = self.truth.get_cat_ids(cat_names=self.dataset_meta['classes'])
        self.img_ids = [i for i in self.truth.get_img_ids() if i in seen]
        if len(self.img_ids) < len(self.truth.imgs):
            warn(Message('metric-part', count=len(self.img_ids), total=len(self.truth.imgs)))
        if self.outfile_prefix is not None:
            self.results2json(preds, self.outfile_prefix)
            if self.format_only:
                return {}
        metrics: dict[str, float] = {}
        self.per_class = {c['name']: {} for c in self.truth.loadCats(self.cat_ids)}
        for iou_type in self.metrics:
            rows = self._detections(preds, iou_type)
            if not rows:
                logger.warning(f'No {iou_type} detection on {len(preds)} images: all APs are 0.')
            scores = self.evaluate_rows(rows, iou_type)
            metrics.update(scores.metrics())
            for name, numbers in self.per_class.items():
                found = {'AP': scores.ap(name), 'AP50': scores.ap(name, 0.5)}
                numbers.update({f'{iou_type}_{key}': ap for key, ap in found.items() if ap is not None})
                if self.classwise and f'{iou_type}_AP' in numbers:
                    metrics[f'{iou_type}_AP/{name}'] = numbers[f'{iou_type}_AP']
        if self.classwise:
            logger.info('\n' + self._table())
        return metrics

    def _table(self) -> str:
        columns = [f'{t}_{key}' for t in self.metrics for key in ('AP', 'AP50')]
        rows = [
            [name, *(f'{numbers[c]:.3f}' if c in numbers else '-' for c in columns)]
            for name, numbers in self.per_class.items()
        ]
        return table([['class', *(c.replace('_', ' ') for c in columns)], *rows], markdown=True)
