"""Metrics of a checkpoint on a split, or of saved predictions, and what is wrong with them.

COCO's 12 numbers for boxes and masks, AP of each class, AP at IoU 0.5 and 0.7 as for VOC, TIDE's
kinds of error, the confusion matrix of masks, and the worst images as pictures.
"""

import sys
from pathlib import Path

from mmfinetune.apis.cli import make_parser, run

EXAMPLES = """
python tools/evaluate.py work_dirs/mask_rcnn_pretrained              # best checkpoint, test split
python tools/evaluate.py work_dirs/demo --split train --worst 32
python tools/evaluate.py --config my.py --checkpoint my.pth --data-root /data/VOCdevkit
python tools/evaluate.py --predictions predictions.segm.json --boxes predictions.bbox.json \
--ann instances_val.json --data-root images/
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    model = parser.add_argument_group('a model')
    model.add_argument(
        'work_dir',
        nargs='?',
        type=Path,
        metavar='WORK_DIR',
        help='folder of a run: its config and its best checkpoint are taken',
    )
    model.add_argument('--config', type=Path, help='another config than that of the run')
    model.add_argument('--checkpoint', type=Path, help='another checkpoint than the best')
    model.add_argument(
        '--split',
        choices=('test', 'val', 'train'),
        default='test',
        help='train goes through the test pipeline too (default: %(default)s)',
    )
    model.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override settings of the config'
    )
    saved = parser.add_argument_group('saved predictions')
    saved.add_argument(
        '--predictions',
        type=Path,
        metavar='JSON',
        help='COCO results with masks; boxes in the same rows are evaluated too',
    )
    saved.add_argument('--boxes', type=Path, metavar='JSON', help='COCO results with boxes')
    saved.add_argument('--ann', type=Path, metavar='JSON', help='their ground truth')
    parser.add_argument(
        '--data-root', type=Path, metavar='DIR', help="folder of the data; of saved predictions the images'"
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='where results go (default: WORK_DIR/evaluation, with another split '
        'than test evaluation_SPLIT; work_dirs/evaluation for saved predictions)',
    )
    parser.add_argument(
        '--engine',
        choices=('hotcoco', 'pycocotools'),
        default='hotcoco',
        help='of the COCO numbers, which are the same (default: %(default)s)',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        metavar='SCORE',
        help='least score for confusion matrix and pictures (default: %(default)s)',
    )
    parser.add_argument(
        '--worst', type=int, default=16, metavar='N', help='how many of the worst images to show (default: %(default)s)'
    )
    parser.add_argument('--no-pictures', dest='pictures', action='store_false', help='tables and files of numbers only')
    parser.add_argument('--json', action='store_true', help='print everything as JSON instead of the tables')
    args = parser.parse_args()

    from mmfinetune.apis import evaluate

    return evaluate.run(evaluate.Options(**vars(args)))


if __name__ == '__main__':
    sys.exit(run(main))
