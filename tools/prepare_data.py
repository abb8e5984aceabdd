"""Turn a data set of any usual kind into COCO JSON with images, checked on the way."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmfinetune.apis.cli import make_parser, run
from mmfinetune.data.prepare import SOURCES, format_summary, prepare

EXAMPLES = """
python tools/prepare_data.py /datasets/my_labelme data/mine
python tools/prepare_data.py /datasets/tiles data/tiles --kind binary-masks --min-area 20
python tools/prepare_data.py /datasets/coco data/animals --classes cat,dog,horse
python tools/prepare_data.py /datasets/benchmark_RELEASE data/sbd --voc /datasets/VOCdevkit
python tools/prepare_data.py export/result.json data/mine --image-root export/images --dry-run
"""


def main() -> int:
    kinds = '\n'.join(f'  {kind:<14}{known.layout}' for kind, known in SOURCES.items())
    parser = make_parser(f'{__doc__}\n\nkinds:\n{kinds}', EXAMPLES)
    parser.add_argument(
        'src', type=Path, metavar='SRC', help='the data set: a folder, or a COCO JSON file; never changed'
    )
    parser.add_argument(
        'out', type=Path, metavar='OUT', help='folder to make: annotations/instances_<split>.json and images/'
    )
    parser.add_argument(
        '--kind',
        choices=['auto', *SOURCES],
        default='auto',
        metavar='KIND',
        help='what SRC is (default: found out, and said)',
    )
    parser.add_argument(
        '--images',
        choices=['link', 'copy', 'reference'],
        default='link',
        help='hard links (copies on another disk), copies, or one symbolic link '
        'to the folder of the images (default: %(default)s)',
    )
    parser.add_argument(
        '--classes',
        type=_names,
        metavar='A,B,C',
        help='classes to keep, in label order (default: all, in the order of SRC); names them where SRC does not',
    )
    parser.add_argument(
        '--min-area', type=_count, metavar='PX', help='leave out objects of fewer pixels (default: 1; binary-masks: 10)'
    )
    parser.add_argument(
        '--workers', type=_count, metavar='N', help='processes (default: all cores); the result is the same'
    )
    parser.add_argument(
        '--skip-bad', action='store_true', help='leave images with problems out, and list them, instead of stopping'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace what this tool made in OUT before')
    parser.add_argument('--dry-run', action='store_true', help='read and check only')

    kind = parser.add_argument_group('for some kinds only')
    kind.add_argument('--image-root', type=Path, metavar='DIR', help='coco: folder that file names are relative to')
    kind.add_argument(
        '--trust-sizes', action='store_true', help='coco: take image sizes from the JSON and do not open the images'
    )
    kind.add_argument(
        '--boxes-as-masks', action='store_true', help='coco, yolo: a box without a mask becomes a rectangular mask'
    )
    kind.add_argument(
        '--trust-masks', action='store_true', help='voc: keep images whose classes or XML are at odds with the masks'
    )
    kind.add_argument(
        '--sbd-split',
        choices=['train_noval', 'trainval_noval', 'official'],
        default='train_noval',
        help='sbd: the list train_noval.txt; train and val without VOC 2012 val '
        '(needs --voc); or train and val as they are (default: %(default)s)',
    )
    kind.add_argument('--voc', type=Path, metavar='DIR', help='sbd: a VOC 2012 devkit')
    kind.add_argument(
        '--threshold',
        type=_count,
        metavar='GREY',
        help='binary-masks: pixels from this value on are object (default: 128)',
    )
    kind.add_argument(
        '--void',
        type=int,
        metavar='VALUE',
        help='mask-png: value of pixels that belong to nothing, -1 for none (default: 255 in palette PNGs)',
    )
    kind.add_argument(
        '--background', action='store_true', help='mask-png, binary-masks: images without a mask have no objects'
    )
    args = vars(parser.parse_args())

    out, dry_run = args['out'], args['dry_run']
    summary = prepare(args.pop('src'), args.pop('out'), args.pop('kind'), args.pop('images'), **args)
    print(format_summary(summary))
    if dry_run:
        print('nothing written (--dry-run)')
        return 0
    print(
        f'next: python tools/check_dataset.py {out}, then python tools/'
        + (f'split_dataset.py {out}' if len(summary.splits) == 1 else f'new_config.py --data {out} --name NAME')
    )
    print(
        'written: ' + ' '.join(f'{out}/annotations/instances_{name}.json' for name in summary.splits) + f' {out}/images'
    )
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(',')]
    if not all(names):
        raise argparse.ArgumentTypeError('names separated by commas are wanted')
    return names


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 on")
    return int(text)


if __name__ == '__main__':
    sys.exit(run(main))
