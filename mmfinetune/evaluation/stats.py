"""COCO's twelve numbers: what they are called, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# The kinds of result: COCO's name and the word for people. Masks come first where there are both.
KINDS = {'segm': 'mask', 'bbox': 'box'}
# A run logs metrics as ``coco/segm_mAP``.
PREFIX = 'coco/'
# COCO's 12 numbers in pycocotools' order: our name, column title, IoU, area, detections per image.
STATS = {
    'mAP': ('AP', '0.50:0.95', 'all', 100),
    'mAP_50': ('AP50', '0.50', 'all', 100),
    'mAP_75': ('AP75', '0.75', 'all', 100),
    'mAP_s': ('APs', '0.50:0.95', 'small', 100),
    'mAP_m': ('APm', '0.50:0.95', 'medium', 100),
    'mAP_l': ('APl', '0.50:0.95', 'large', 100),
    'AR@1': ('AR1', '0.50:0.95', 'all', 1),
    'AR@10': ('AR10', '0.50:0.95', 'all', 10),
    'AR@100': ('AR100', '0.50:0.95', 'all', 100),
    'AR_s@100': ('ARs', '0.50:0.95', 'small', 100),
    'AR_m@100': ('ARm', '0.50:0.95', 'medium', 100),
    'AR_l@100': ('ARl', '0.50:0.95', 'large', 100),
}
# Score from which a detection counts in pictures, confusion matrix and F1 unless the user says otherwise.
SCORE_THR = 0.3


def number(value: float | None, digits: int = 3) -> str:
    """A metric as text; ``-`` for None and for -1, COCO's sign of no ground truth."""
    return '-' if value is None or value == -1 else f'{value:.{digits}f}'


def stat_rows(metrics: Mapping[str, float], kinds: Iterable[str] = KINDS, digits: int = 3) -> list[list[str]]:
    """COCO's 12 numbers as a table: a header, and one row for each of these kinds in `metrics`.

    Args:
        metrics: ``coco/<segm|bbox>_<stat>`` as a run logs them.
        kinds: Kinds in the order of the rows.
        digits: Digits after the point.
    """
    rows = [['', *(title for title, *_ in STATS.values())]]
    for kind in kinds:
        if f'{PREFIX}{kind}_mAP' in metrics:
            rows.append([KINDS[kind], *(number(metrics.get(f'{PREFIX}{kind}_{stat}'), digits) for stat in STATS)])
    return rows
