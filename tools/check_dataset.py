"""Check a COCO-format data set: annotation files, masks, image files, one split against another."""

from pathlib import Path

from mmfinetune.apis.cli import add, integer, make_parser, old_option, run

EXAMPLES = """
python tools/check_dataset.py data/my_set
python tools/check_dataset.py train.json val.json --image-root photos --html report.html
python tools/check_dataset.py --config configs/mask_rcnn_voc_pretrained.py
python tools/check_dataset.py instances_train2017.json --no-images
python tools/check_dataset.py data/my_set --fix data/my_set_fixed
python tools/check_dataset.py data/my_set --json | jq '.findings[].code'
"""


def main() -> int:
    parser = make_parser(__doc__ + '\nThe exit code is 1 if there are errors.', EXAMPLES)
    parser.add_argument(
        'targets',
        nargs='*',
        type=Path,
        metavar='ANN.json|DIR',
        help='annotation files, or a folder with annotations/instances_<split>.json and images/',
    )
    add(parser, '--image-root', more='(default: found near each file)')
    old_option(parser, '--images', '--image-root')
    add(parser, '--config', more='that names splits, image folders and class order')
    parser.add_argument('--no-images', dest='images', action='store_false', help='look at the annotation files only')
    add(parser, '--json')
    parser.add_argument(
        '--html', type=Path, metavar='FILE', help='write the report as one HTML page, the worst places as pictures'
    )
    parser.add_argument(
        '--fix',
        type=Path,
        metavar='OUT',
        help='write a repaired copy of the annotation files to a new folder, with '
        'a list of the changes; images are linked',
    )
    parser.add_argument(
        '--exif-masks',
        choices=['stored', 'upright'],
        help='with --fix, for images that EXIF turns: what masks were drawn on, if none leaves one of the two pictures',
    )
    parser.add_argument(
        '--max-examples',
        type=integer(0),
        default=5,
        metavar='N',
        help='places shown of each finding (default: %(default)s)',
    )
    add(parser, '--workers')
    parser.add_argument(
        '--no-cache', dest='cache', action='store_false', help='check again even if nothing has changed since last time'
    )
    args = parser.parse_args()
    if bool(args.targets) == bool(args.config):
        parser.error('pass annotation files, a folder, or --config')
    if args.config and args.image_root:
        parser.error('--config names the image folders: leave --image-root out')
    if args.fix and not args.images:
        parser.error('--fix needs to see the images: leave --no-images out')

    from mmfinetune.apis import check_data

    return check_data.run(check_data.Options(**vars(args)))


if __name__ == '__main__':
    run(main)
