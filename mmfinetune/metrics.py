"""COCO box and mask metrics with a choice of engine."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from mmdet.evaluation.metrics import CocoMetric
from mmdet.registry import METRICS
from mmengine.logging import MMLogger
from terminaltables import AsciiTable

ENGINES = ('hotcoco', 'pycocotools')
STATS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l',
         'AR@1', 'AR@10', 'AR@100', 'AR_s@100', 'AR_m@100', 'AR_l@100')


def _engine(name: str):
    if name == 'hotcoco':
        import hotcoco
        return hotcoco.COCO, hotcoco.COCOeval
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    return COCO, COCOeval


@METRICS.register_module()
class InstanceCocoMetric(CocoMetric):
    """COCO's 12 numbers for boxes and masks, and AP of each class for both.

    Unlike mmdet's metric the numbers are those of COCO (``maxDets`` 1, 10, 100), unrounded; box
    and mask AP of a class do not overwrite each other; nothing is written to disk unless
    ``outfile_prefix`` asks for it.

    Keys: ``coco/<bbox|segm>_<mAP|mAP_50|…|AR_l@100>`` and, with ``classwise``,
    ``coco/<bbox|segm>_AP/<class>``. A number for which the ground truth has no instance is -1 as
    in pycocotools; a class without instances has no key.

    Args:
        engine: ``'hotcoco'`` (Rust) or ``'pycocotools'``: the same numbers.
        **kwargs: See mmdet's ``CocoMetric``; ``metric`` takes ``bbox`` and ``segm``.
    """

    def __init__(self, *args, engine: str = 'hotcoco', **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if engine not in ENGINES:
            raise ValueError(f'engine must be one of {ENGINES}, got {engine!r}')
        wrong = sorted(set(self.metrics) - {'bbox', 'segm'})
        if wrong:
            raise ValueError(f'metric must be bbox or segm, got {wrong}')
        self.engine = engine

    def _detections(self, preds: Sequence[dict], iou_type: str) -> list[dict]:
        """COCO result rows; masks without a box, so that areas are those of the masks."""
        rows = []
        for pred in preds:
            boxes = pred['bboxes']
            xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
            scores = pred.get('mask_scores', pred['scores']) if iou_type == 'segm' \
                else pred['scores']
            for i, (label, score) in enumerate(zip(pred['labels'], scores, strict=True)):
                row = {'image_id': pred['img_id'], 'category_id': self.cat_ids[label],
                       'score': float(score)}
                if iou_type == 'segm':
                    rle = pred['masks'][i]
                    counts = rle['counts']
                    row['segmentation'] = {
                        'size': [int(n) for n in rle['size']],
                        'counts': counts.decode() if isinstance(counts, bytes) else counts}
                else:
                    row['bbox'] = [float(v) for v in xywh[i]]
                rows.append(row)
        return rows

    def evaluate_rows(self, rows: list[dict], iou_type: str) -> tuple[np.ndarray, np.ndarray]:
        """Run the engine.

        Args:
            rows: COCO result rows.
            iou_type: ``'bbox'`` or ``'segm'``.

        Returns:
            The 12 stats, and ``precision`` (IoU, recall, class, area, maxDets).
        """
        coco, coco_eval = _engine(self.engine)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco()
            truth.dataset = self._coco_api.dataset
            truth.createIndex()
            evaluator = coco_eval(truth, truth.loadRes(rows), iou_type)
            evaluator.params.catIds = list(self.cat_ids)
            evaluator.params.imgIds = list(self.img_ids)
            evaluator.params.iouThrs = np.asarray(self.iou_thrs)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return np.asarray(evaluator.stats, float), np.asarray(evaluator.eval['precision'])

    def compute_metrics(self, results: list) -> dict[str, float]:
        """COCO numbers of all ``(gt, pred)`` pairs that ``process`` gathered."""
        logger = MMLogger.get_current_instance()
        _, preds = zip(*results, strict=True)
        if self._coco_api is None:
            return super().compute_metrics(results)
        if self.cat_ids is None:
            self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta['classes'])
        if self.img_ids is None:
            self.img_ids = self._coco_api.get_img_ids()
        if self.outfile_prefix is not None:
            self.results2json(preds, self.outfile_prefix)
            if self.format_only:
                return {}
        names = [c['name'] for c in self._coco_api.loadCats(self.cat_ids)]
        metrics: dict[str, float] = {}
        per_class: dict[str, list[str]] = {n: [n] for n in names}
        for iou_type in self.metrics:
            rows = self._detections(preds, iou_type)
            if not rows:
                logger.warning(f'No {iou_type} detection on {len(preds)} images: all APs are 0.')
                metrics.update({f'{iou_type}_{s}': 0.0 for s in STATS})
                continue
            stats, precision = self.evaluate_rows(rows, iou_type)
            metrics.update({f'{iou_type}_{s}': float(v)
                            for s, v in zip(STATS, stats, strict=True)})
            for k, name in enumerate(names):
                for which, values in (('AP', precision[:, :, k, 0, -1]),
                                      ('AP50', precision[0, :, k, 0, -1])):
                    values = values[values > -1]
                    per_class[name].append(f'{values.mean():.3f}' if values.size else '-')
                    if values.size and self.classwise and which == 'AP':
                        metrics[f'{iou_type}_AP/{name}'] = float(values.mean())
        if self.classwise and all(len(row) == 1 + 2 * len(self.metrics)
                                  for row in per_class.values()):
            header = ['class', *(f'{t} {w}' for t in self.metrics for w in ('AP', 'AP50'))]
            logger.info('\n' + AsciiTable([header, *per_class.values()]).table)
        return metrics
