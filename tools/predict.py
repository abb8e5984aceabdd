"""Find objects in any images and videos with a trained model.

Writes pictures with boxes and masks, a contact sheet, and the objects as COCO JSON:
predictions.json are COCO results (for loadRes and tools/evaluate.py), predictions_coco.json is a
complete COCO data set with images and categories (for CVAT, FiftyOne, pycocotools). Masks are RLE in
pixels of the upright image. Category ids are those of the run's test annotations, and image ids
too if all inputs are images of these; otherwise both count from 1.
"""

import argparse

from mmfinetune.apis.cli import add, make_parser, old_option, positive_int, run

EXAMPLES = """
python tools/predict.py photos/ --run work_dirs/mask_rcnn_pretrained
python tools/predict.py a.jpg 'more/**/*.png' --run work_dirs/demo --score-thr 0.5 --out out
python tools/predict.py a.jpg --run work_dirs/demo --proposals      # with the boxes of the RPN
python tools/predict.py clip.mp4 --run work_dirs/demo --every 5     # a video, every fifth frame
python tools/predict.py photos/ --config my.py --checkpoint my.pth --classes person dog
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'inputs', nargs='+', metavar='INPUT', help='image, video, folder (searched recursively) or quoted pattern'
    )
    model = parser.add_argument_group('model')
    add(model, '--run')
    add(model, '--config', more='other than that of the run')
    add(model, '--checkpoint', more='other than the best of the run')
    model.add_argument('--device', default='auto', help='cpu, cuda, cuda:1, … (default: a GPU if there is one)')
    add(model, '--batch-size', default=1, more='(default: %(default)s)')
    chosen = parser.add_argument_group('what to keep')
    add(chosen, '--score-thr')
    chosen.add_argument(
        '--max-per-image',
        type=positive_int,
        metavar='N',
        help="most objects of an image (default: the config's max_per_img)",
    )
    add(chosen, '--classes', default=())
    chosen.add_argument('--every', type=positive_int, default=1, metavar='N', help='only every N-th frame of a video')
    made = parser.add_argument_group('what to write')
    add(made, '--out', metavar='DIR', more='(default: predictions in the work dir, or here without --run)')
    made.add_argument(
        '--proposals',
        nargs='?',
        type=positive_int,
        const=100,
        default=0,
        metavar='N',
        help="draw the RPN's N best proposals, coloured by objectness, next to the objects (default of N: 100)",
    )
    made.add_argument(
        '--contact-sheet',
        action=argparse.BooleanOptionalAction,
        help='small pictures of all images on pages of 40 (default: for more than one image)',
    )
    made.add_argument('--no-coco-json', dest='coco_json', action='store_false', help='write no COCO JSON')
    add(made, '--no-pictures', '--overwrite', '--json')
    old_option(parser, '--no-json', '--no-coco-json')
    args = parser.parse_args()

    from mmfinetune.apis import predict

    return predict.run(predict.Options(**vars(args)))


if __name__ == '__main__':
    run(main)
