"""PASCAL VOC 2012 to COCO JSON with the true masks."""

from __future__ import annotations

from pathlib import Path

from mmfinetune.apis.cli import make_parser, run
from mmfinetune.data.formats.voc import convert, format_summaries
from mmfinetune.data.formats.voc_devkit import VOC_URL, download_voc, find_devkit

EXAMPLES = """\
  # fetch VOC 2012 (2.0 GB, resumed when broken off), verify, unpack to data/VOCdevkit, convert
  python tools/prepare_voc.py --download

  # a devkit that lies elsewhere, in a folder where nothing may be written
  python tools/prepare_voc.py --data-root /datasets/VOCdevkit --out data/voc_annotations

  # go on without the images whose files are missing, unreadable or at odds; they are listed
  python tools/prepare_voc.py --skip-bad
"""


def main() -> None:
    """Parse, convert, print a table and where the results are."""
    parser = make_parser(
        'Convert PASCAL VOC 2012 to COCO JSON: each object of SegmentationObject becomes one '
        'annotation with exactly its pixels, split by ImageSets/Segmentation.',
        EXAMPLES,
    )
    parser.add_argument(
        '--data-root',
        type=Path,
        default=Path('data'),
        metavar='DIR',
        help='folder that holds VOCdevkit/VOC2012, or VOCdevkit or VOC2012 itself (default: %(default)s)',
    )
    parser.add_argument(
        '--out', type=Path, metavar='DIR', help='folder for instances_<split>.json (default: annotations/ in VOC2012)'
    )
    parser.add_argument(
        '--download', action='store_true', help='fetch, verify and unpack the official archive if no devkit is there'
    )
    parser.add_argument('--url', default=VOC_URL, help='a mirror of the same archive (default: %(default)s)')
    parser.add_argument(
        '--workers', type=_count, metavar='N', help='processes (default: all cores); the result is the same'
    )
    parser.add_argument(
        '--skip-bad', action='store_true', help='leave images with problems out, and list them, instead of stopping'
    )
    parser.add_argument(
        '--trust-masks',
        action='store_true',
        help='keep images in which only classes or the XML are at odds with the masks; they are listed',
    )
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
    out = args.out or devkit / 'annotations'
    summaries = convert(devkit, out, args.splits, args.workers, args.skip_bad, args.trust_masks)

    print(format_summaries(summaries))
    print('written: ' + ' '.join(str(summary.path) for summary in summaries.values()))


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


if __name__ == '__main__':
    run(main)
