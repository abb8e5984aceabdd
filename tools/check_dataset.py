"""Check a COCO-format data set: annotation files, masks, image files, one split against another."""

import json
import sys
from pathlib import Path

from mmfinetune.apis.cli import make_parser, run
from mmfinetune.utils.errors import UserError

EXAMPLES = """
python tools/check_dataset.py data/my_set
python tools/check_dataset.py train.json val.json --images photos --html report.html
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
    parser.add_argument(
        '--images',
        type=Path,
        metavar='DIR',
        help='folder that the image names are relative to (default: found near each file)',
    )
    parser.add_argument('--config', type=Path, help='take splits, image folders and class order from a config')
    parser.add_argument('--no-images', action='store_true', help='look at the annotation files only')
    parser.add_argument('--json', action='store_true', help='print the report as JSON')
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
        '--max-examples', type=int, default=5, metavar='N', help='places shown of each finding (default: %(default)s)'
    )
    parser.add_argument('--workers', type=int, metavar='N', help='processes that read images (default: all cores)')
    parser.add_argument(
        '--no-cache', action='store_true', help='check anew even if nothing has changed since the last time'
    )
    args = parser.parse_args()
    if bool(args.targets) == bool(args.config):
        parser.error('pass annotation files, a folder, or --config')
    if args.config and args.images:
        parser.error('--config names the image folders: leave --images out')
    if args.max_examples < 0 or (args.workers is not None and args.workers < 1):
        parser.error('--max-examples takes 0 or more, --workers 1 or more')

    from mmfinetune.apis import run_data
    from mmfinetune.config import load
    from mmfinetune.data import layout
    from mmfinetune.data.check import repair
    from mmfinetune.data.check import report as data_check_report
    from mmfinetune.data.check import run as data_check_run

    classes = None
    if args.config:
        splits, classes = run_data.splits_of_config(load.load(args.config))
    else:
        splits = layout.find_splits(args.targets, args.images)
    options = data_check_run.Options(
        images=not args.no_images, workers=args.workers, max_examples=args.max_examples, cache=not args.no_cache
    )
    if args.fix and args.no_images:
        raise UserError('--fix needs to see the images', cure='leave --no-images out')
    if args.fix:
        fixed = repair.fix(splits, args.fix, classes, options)
        report = fixed.report
    else:
        report = data_check_run.check(splits, classes, options)
    if args.html:
        data_check_report.write_html(report, args.html)
    if args.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        print(data_check_report.as_text(report, args.max_examples))
        if args.fix:
            print(fixed.text())
        if args.html:
            print(f'Report: {args.html}')
    return 0 if report.good else 1


if __name__ == '__main__':
    sys.exit(run(main))
