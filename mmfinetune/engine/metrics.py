"""COCO box and mask metrics with a choice of engine."""

from __future__ import annotations

from collections.abc import Sequence

from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS
from mmengine.logging import MMLogger

from mmfinetune.engine.compat import truth_of
from mmfinetune.evaluation import coco_eval
from mmfinetune.evaluation.coco_eval import ENGINES
from mmfinetune.evaluation.detections import result_rows
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.text import table


@METRICS.register_module()
class InstanceCocoMetric(CocoMetric):
    """COCO's 12 numbers for boxes and masks, and AP of each class for both.

    Unlike those of mmdet's metric the numbers are COCO's own (``maxDets`` 1, 10, 100), unrounded; box and mask AP of a
    class do not overwrite each other; nothing is written to disk unless ``outfile_prefix`` asks for it.

    Keys: ``coco/<bbox|segm>_<mAP|mAP_50|…|AR_l@100>`` and, with ``classwise``,
    ``coco/<bbox|segm>_AP/<class>``. A number for which the ground truth has no instance is -1 as
    in pycocotools; a class without instances has no key.

    Args:
        engine: ``'hotcoco'`` (Rust) or ``'pycocotools'``: the same numbers.
        **kwargs: See mmdet's ``CocoMetric``; ``metric`` takes ``bbox`` and ``segm``, and ``ann_file`` is needed.

    Raises:
        UserError: An argument is missing or not one of these.

    Attributes:
        per_class: Of the last evaluation, on the main process: ``<bbox|segm>_AP`` and
            ``<bbox|segm>_AP50`` by class name, whether or not ``classwise``. A class without
            instances has no numbers.
    """

    def __init__(self, *args, engine: str = 'hotcoco', **kwargs) -> None:
        super().__init__(*args, **kwargs)
        name, wrong, known = type(self).__name__, sorted(set(self.metrics) - {'bbox', 'segm'}), ', '.join(ENGINES)
        if engine not in ENGINES:
            raise UserError('metric-engine', metric=name, engine=engine, known=known)
        if wrong:
            raise UserError('metric-kind', metric=name, wrong=', '.join(wrong))
        truth = truth_of(self)
        if truth is None:
            # mmdet would convert what the data loader gives, and count and round it in its own way.
            raise UserError('metric-without-truth', metric=name)
        self.truth = truth
        self.cat_ids: list[int] = []
        self.img_ids: list[int] = []
        self.engine = engine
        self.per_class: dict[str, dict[str, float]] = {}

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

    def _read_ids(self) -> None:
        if not self.cat_ids:
            self.cat_ids = self.truth.get_cat_ids(cat_names=self.dataset_meta['classes'])
        if not self.img_ids:
            self.img_ids = self.truth.get_img_ids()

    def compute_metrics(self, results: list) -> dict[str, float]:
        """COCO numbers of all ``(gt, pred)`` pairs that ``process`` gathered."""
        logger = MMLogger.get_current_instance()
        preds = [pred for _, pred in results]
        self._read_ids()
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
                for key, iou in (('AP', None), ('AP50', 0.5)):
                    value = scores.ap(name, iou)
                    if value is not None:
                        numbers[f'{iou_type}_{key}'] = value
                if self.classwise and f'{iou_type}_AP' in numbers:
                    metrics[f'{iou_type}_AP/{name}'] = numbers[f'{iou_type}_AP']
        if self.classwise:
            logger.info('\n' + self._table())
        return metrics

    def _table(self) -> str:
        columns = [f'{t}_{key}' for t in self.metrics for key in ('AP', 'AP50')]
        rows = [['class', *(c.replace('_', ' ') for c in columns)]]
        for name, numbers in self.per_class.items():
            rows.append([name, *(f'{numbers[c]:.3f}' if c in numbers else '-' for c in columns)])
        return table(rows, markdown=True)
