"""PASCAL VOC 2012 to COCO JSON with the true masks."""

from __future__ import annotations

from pathlib import Path

from mmfinetune.apis.cli import add, make_parser, run
from mmfinetune.data.formats.voc_devkit import VOC_URL, download_voc, find_devkit
from mmfinetune.data.prepare import format_summary, prepare

EXAMPLES = """\
  # download VOC 2012 (2.0 GB, resumed after an interruption), verify, unpack to data/VOCdevkit, convert
  python tools/prepare_voc.py --download

  # a devkit in another folder, where nothing may be written
  python tools/prepare_voc.py --data-root /datasets/VOCdevkit --out data/voc_annotations

  # continue without the images whose files are missing, unreadable or contradictory; they are listed
  python tools/prepare_voc.py --skip-bad
"""


def main() -> int:
    """Parse, convert, print a table and where the results are."""
    parser = make_parser(
        'Convert PASCAL VOC 2012 to COCO JSON: each object of SegmentationObject becomes one '
        'annotation with exactly its pixels, split by ImageSets/Segmentation.',
        EXAMPLES,
    )
    add(parser, '--data-root', default=Path('data'), more='(default: %(default)s)')
    add(parser, '--out', metavar='DIR', more='instances_<split>.json (default: annotations/ in VOC2012)')
    parser.add_argument(
        '--download', action='store_true', help='download, verify and unpack the official archive if it is not there'
    )
    parser.add_argument('--url', default=VOC_URL, help='a mirror of the same archive (default: %(default)s)')
    add(parser, '--workers', '--skip-bad', '--trust-masks')
    parser.add_argument(
        '--splits',
        nargs='+',
        default=['train', 'val'],
        metavar='NAME',
        help='lists in ImageSets/Segmentation (default: train val)',
    )
    args = parser.parse_args()

    if args.download:
        download_voc(args.data_root, args.url)
    devkit = find_devkit(args.data_root)
    options = dict(splits=args.splits, trust_masks=args.trust_masks, workers=args.workers, skip_bad=args.skip_bad)
    summary = prepare(devkit, args.out or devkit / 'annotations', 'voc', 'in-place', **options)
    print(format_summary(summary, lines=None))
    print('written: ' + ' '.join(map(str, summary.files.values())))
    return 0


if __name__ == '__main__':
    run(main)
