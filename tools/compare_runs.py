"""Compare runs by their validation metrics: tables, and a picture of the curves by epoch."""

from pathlib import Path

from mmfinetune.apis.cli import add, make_parser, run
from mmfinetune.evaluation.compare import METRIC, STEM, ZERO_SHOT, compare_runs

EXAMPLES = """
python tools/compare_runs.py work_dirs/mask_rcnn_pretrained work_dirs/from_scratch
python tools/compare_runs.py work_dirs/a work_dirs/b --names 'lr 0.002' 'lr 0.02'
python tools/compare_runs.py work_dirs/try*/ --metric coco/bbox_mAP val/loss --out work_dirs/boxes
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'dirs',
        nargs='+',
        type=Path,
        metavar='WORK_DIR',
        help='work dir of a run; resumed parts count as one run. Epoch 0 is read '
        f'from its {ZERO_SHOT} (form of test_results.json), if there',
    )
    parser.add_argument(
        '--names', nargs='+', metavar='NAME', help='names of the runs, one per WORK_DIR (default: the folder names)'
    )
    parser.add_argument(
        '--metric',
        nargs='+',
        default=[METRIC],
        metavar='METRIC',
        help='what to compare, each in a table and a panel of the picture; more '
        f'is better, except for losses (default: {METRIC})',
    )
    add(
        parser,
        '--out',
        default=STEM,
        metavar='STEM',
        more='the tables and the picture, without .md, .csv and .png (default: %(default)s)',
    )
    args = parser.parse_args()

    print(compare_runs(args.dirs, args.names, args.metric, args.out))
    return 0


if __name__ == '__main__':
    run(main)
