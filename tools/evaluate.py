"""Metrics of a checkpoint on a split, or of saved predictions, and what is wrong with them.

COCO's 12 numbers for boxes and masks, AP of each class, AP at IoU 0.5 and 0.7 as for VOC, TIDE's
kinds of error, the confusion matrix of masks, and the worst images as pictures.
"""

import sys
from pathlib import Path

from mmfinetune.apis.cli import add, integer, make_parser, run

EXAMPLES = """
python tools/evaluate.py work_dirs/mask_rcnn_pretrained              # best checkpoint, test split
python tools/evaluate.py work_dirs/demo --split train --worst 32
python tools/evaluate.py --config my.py --checkpoint my.pth --data-root /data/VOCdevkit
python tools/evaluate.py --predictions predictions.segm.json --boxes predictions.bbox.json \
--ann instances_val.json --image-root images/
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    model = parser.add_argument_group('a model')
    model.add_argument('work_dir', nargs='?', type=Path, metavar='WORK_DIR', help='the same as --run WORK_DIR')
    add(model, '--run')
    add(model, '--config', more='other than that of the run')
    add(model, '--checkpoint', more='other than the best of the run')
    add(model, '--split', more='; train goes through the test pipeline too')
    add(model, '--data-root', '--cfg-options')
    saved = parser.add_argument_group('saved predictions')
    saved.add_argument(
        '--predictions',
        type=Path,
        metavar='JSON',
        help='COCO results with masks; boxes in the same rows are evaluated too',
    )
    saved.add_argument('--boxes', type=Path, metavar='JSON', help='COCO results with boxes')
    saved.add_argument('--ann', type=Path, metavar='JSON', help='their ground truth')
    add(saved, '--image-root', more='(default: near the annotation file)')
    add(
        parser,
        '--out',
        metavar='DIR',
        more='(default: WORK_DIR/evaluation, for another split than test evaluation_SPLIT; '
        'work_dirs/evaluation for saved predictions)',
    )
    parser.add_argument(
        '--engine',
        choices=('hotcoco', 'pycocotools'),
        default='hotcoco',
        help='engine of the COCO numbers; both give the same (default: %(default)s)',
    )
    add(parser, '--score-thr', more='in confusion matrix and pictures')
    parser.add_argument(
        '--worst',
        type=integer(0),
        default=16,
        metavar='N',
        help='how many of the worst images to show (default: %(default)s)',
    )
    add(parser, '--no-pictures', '--json')
    args = parser.parse_args()
    if args.work_dir and args.run:
        parser.error('the run is given twice: WORK_DIR and --run')
    if (args.predictions or args.boxes) and args.data_root and not args.image_root:
        print('note: the images of saved predictions are now named by --image-root', file=sys.stderr)
        args.image_root = args.data_root
    options = vars(args)
    options['run'] = options.pop('work_dir') or args.run

    from mmfinetune.apis import evaluate

    return evaluate.run(evaluate.Options(**options))


if __name__ == '__main__':
    run(main)
