"""Find objects in any images and videos with a trained model.

Writes pictures with boxes and masks, a contact sheet, and the objects as COCO JSON:
predictions.json are COCO results (for loadRes and tools/evaluate.py), predictions_coco.json is a
whole COCO data set with images and categories (for CVAT, FiftyOne, pycocotools). Masks are RLE in
pixels of the upright image. Category ids are those of the run's test annotations, and image ids
too if all inputs are images of these; else both count from 1.
"""

import argparse
import sys
from pathlib import Path

from mmfinetune.apis.cli import make_parser, run

EXAMPLES = """
python tools/predict.py photos/ --run work_dirs/mask_rcnn_pretrained
python tools/predict.py a.jpg 'more/**/*.png' --run work_dirs/demo --score-thr 0.5 --out out
python tools/predict.py a.jpg --run work_dirs/demo --proposals      # the RPN's boxes beside
python tools/predict.py clip.mp4 --run work_dirs/demo --every 5     # a video, each fifth frame
python tools/predict.py photos/ --config my.py --checkpoint my.pth --classes person dog
"""


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not from 0 to 1')
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{text} is less than 1')
    return value


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'inputs', nargs='+', metavar='INPUT', help='image, video, folder (searched to the bottom) or quoted pattern'
    )
    model = parser.add_argument_group('model')
    model.add_argument(
        '--run', type=Path, metavar='WORK_DIR', help='folder of a run: its config and its best checkpoint are taken'
    )
    model.add_argument('--config', type=Path, help='another config than that of the run')
    model.add_argument('--checkpoint', type=Path, help='another checkpoint than the best')
    model.add_argument('--device', default='auto', help='cpu, cuda, cuda:1, … (default: a GPU if there is one)')
    model.add_argument(
        '--batch-size', type=positive, default=1, metavar='N', help='images at once (default: %(default)s)'
    )
    chosen = parser.add_argument_group('what to keep')
    chosen.add_argument(
        '--score-thr', type=share, default=0.3, metavar='SCORE', help='least score of an object (default: %(default)s)'
    )
    chosen.add_argument(
        '--max-per-image',
        type=positive,
        metavar='N',
        help="the most objects of an image (default: the config's max_per_img)",
    )
    chosen.add_argument(
        '--classes', nargs='+', default=[], metavar='NAME', help='of what the model finds keep only these classes'
    )
    chosen.add_argument('--every', type=positive, default=1, metavar='N', help='only every N-th frame of a video')
    made = parser.add_argument_group('what to make')
    made.add_argument(
        '--out',
        type=Path,
        metavar='DIR',
        help='new folder (default: predictions, predictions_2, … in the work dir, or here without --run)',
    )
    made.add_argument(
        '--proposals',
        nargs='?',
        type=positive,
        const=100,
        default=0,
        metavar='N',
        help="draw the RPN's N best proposals, coloured by objectness, beside the objects (default of N: 100)",
    )
    made.add_argument('--no-pictures', dest='pictures', action='store_false', help='no picture of each image, no video')
    made.add_argument(
        '--contact-sheet',
        action=argparse.BooleanOptionalAction,
        help='small pictures of all images on pages of 40 (default: for more than one image)',
    )
    made.add_argument(
        '--json', action=argparse.BooleanOptionalAction, default=True, help='the objects as COCO JSON (default: yes)'
    )
    args = parser.parse_args()

    from mmfinetune.apis import predict

    return predict.run(predict.Options(**vars(args)))


if __name__ == '__main__':
    sys.exit(run(main))
