"""Turn a data set of any common format into COCO JSON with images, checked on the way."""

from __future__ import annotations

from pathlib import Path

from mmfinetune.apis.cli import add, integer, make_parser, old_option, positive_int, run
from mmfinetune.data.formats import FORMATS
from mmfinetune.data.prepare import format_summary, prepare

EXAMPLES = """
python tools/prepare_data.py /datasets/my_labelme data/mine
python tools/prepare_data.py /datasets/tiles data/tiles --format binary-masks --min-area 20
python tools/prepare_data.py /datasets/coco data/animals --classes cat dog horse
python tools/prepare_data.py /datasets/benchmark_RELEASE data/sbd --voc /datasets/VOCdevkit
python tools/prepare_data.py export/result.json data/mine --image-root export/images --dry-run
"""


def main() -> int:
    """Parse, prepare, print a table, what to do next, and where the results are."""
    formats = '\n'.join(f'  {name:<14}{row.layout}' for name, row in FORMATS.items())
    parser = make_parser(f'{__doc__}\n\nformats:\n{formats}', EXAMPLES)
    parser.add_argument(
        'src', type=Path, metavar='SRC', help='the data set: a folder, or a COCO JSON file; never changed'
    )
    parser.add_argument(
        'out', type=Path, metavar='OUT', help='folder to make: annotations/instances_<split>.json and images/'
    )
    parser.add_argument(
        '--format',
        choices=['auto', *FORMATS],
        default='auto',
        metavar='FORMAT',
        help='format of SRC (default: auto-detected and printed)',
    )
    old_option(parser, '--kind', '--format')
    parser.add_argument(
        '--place',
        choices=['link', 'copy', 'reference'],
        default='link',
        help='how images come into OUT: hard links (copies on another disk), copies, or one symbolic link '
        'to the folder of the images (default: %(default)s)',
    )
    old_option(parser, '--images', '--place')
    add(
        parser,
        '--classes',
        more='in label order (default: all, in the order of SRC), or their names where SRC has none',
    )
    parser.add_argument(
        '--min-area',
        type=positive_int,
        metavar='PX',
        help='leave out objects of fewer pixels (default: 1; binary-masks: 10)',
    )
    add(parser, '--workers', '--skip-bad', '--overwrite', '--dry-run')
    some = parser.add_argument_group('for some formats only')
    add(some, '--image-root', more='(coco, labelme, yolo: images elsewhere than in SRC)')
    some.add_argument(
        '--trust-sizes',
        action='store_true',
        help='coco: take image sizes from the JSON and do not look into the images',
    )
    some.add_argument(
        '--boxes-as-masks', action='store_true', help='coco, yolo: a box without a mask becomes a rectangular mask'
    )
    some.add_argument(
        '--relative', action='store_true', help='coco: coordinates are from 0 to 1, parts of the width and the height'
    )
    some.add_argument(
        '--crowd-as-objects',
        action='store_true',
        help='coco: what is marked as a crowd region (iscrowd) is an object, as with brush masks of CVAT',
    )
    add(some, '--trust-masks', more='(voc)')
    some.add_argument(
        '--sbd-split',
        choices=['train_noval', 'trainval_noval', 'official'],
        help='sbd: the list train_noval.txt; train and val without VOC 2012 val '
        '(needs --voc); or train and val as they are (default: train_noval)',
    )
    some.add_argument('--voc', type=Path, metavar='DIR', help='sbd: a VOC 2012 devkit')
    some.add_argument(
        '--threshold',
        type=integer(1, 255),
        metavar='GREY',
        help='binary-masks: pixels of this value or more are object (default: 128)',
    )
    some.add_argument(
        '--void',
        type=integer(-1),
        metavar='VALUE',
        help='mask-png: value of pixels that belong to nothing, -1 for none (default: 255 in palette PNGs)',
    )
    some.add_argument(
        '--background', action='store_true', help='mask-png, binary-masks: images without a mask have no objects'
    )
    args = vars(parser.parse_args())

    out = args['out']
    summary = prepare(placing=args.pop('place'), **args)
    print(format_summary(summary))
    if not summary.files:
        print('nothing written (--dry-run)')
        return 0
    then = f'split_dataset.py {out}' if len(summary.splits) == 1 else f'new_config.py --data-root {out} --name NAME'
    print(f'next: python tools/check_dataset.py {out}, then python tools/{then}')
    print('written: ' + ' '.join(map(str, summary.files.values())) + f' {out}/images')
    return 0


if __name__ == '__main__':
    run(main)
