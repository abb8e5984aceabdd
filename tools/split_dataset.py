"""Split a COCO file into train, val and test: each class in its share, series kept together."""

from pathlib import Path

from mmfinetune.apis.cli import add, make_parser, run
from mmfinetune.data.split import split_file

EXAMPLES = r"""
python tools/split_dataset.py data/tiles                 # annotations/instances_all.json, 70/15/15
python tools/split_dataset.py data/tiles --ratios 80 20  # train and val only
python tools/split_dataset.py data/film --group-by '^(.+)_\d+\.'     # a_0001.jpg, a_0002.jpg: a
python tools/split_dataset.py export/labels.json --out data/tiles/annotations --seed 7
python tools/split_dataset.py data/tiles --seed 1 --overwrite        # another split instead
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'source',
        type=Path,
        metavar='DIR_OR_JSON',
        help='COCO annotation file, or the folder made by tools/prepare_data.py',
    )
    parser.add_argument(
        '--ratios',
        nargs='+',
        type=float,
        default=[70, 15, 15],
        metavar='R',
        help='shares of train, val and test, or of train and val; any sum (default: 70 15 15)',
    )
    parser.add_argument('--seed', type=int, default=0, help='another number, another split (default: %(default)s)')
    parser.add_argument(
        '--group-by',
        metavar='REGEX',
        help='searched for in the file names; images with the same first group '
        '(or, without groups, the same match) stay in one split',
    )
    add(parser, '--out', metavar='DIR', more='instances_<split>.json (default: the folder of the source)')
    add(parser, '--overwrite')
    args = parser.parse_args()

    report = split_file(args.source, args.ratios, args.seed, args.group_by, args.out, args.overwrite)
    print(report.text())
    print(f'Written: {" ".join(map(str, report.files.values()))}')
    return 0


if __name__ == '__main__':
    run(main)
