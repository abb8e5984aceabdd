"""Write a config with all its bases resolved, or check that two configs are the same run."""

import sys
from pathlib import Path

from mmfinetune.apis.cli import make_parser, run

EXAMPLES = """
python tools/flatten_config.py configs/mask_rcnn_voc_pretrained.py                  # print
python tools/flatten_config.py configs/mask_rcnn_voc_pretrained.py -o configs/flat.py
python tools/flatten_config.py configs/mask_rcnn_voc_pretrained.py --check configs/flat.py
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('config', help='config with _base_')
    parser.add_argument('-o', '--out', type=Path, metavar='FILE', help='write it there')
    parser.add_argument(
        '--check',
        metavar='FLAT',
        help='compare the resolved settings with those of this config; exit code 1 if they differ',
    )
    args = parser.parse_args()

    from mmfinetune.config import flatten

    if args.check:
        lines = flatten.compare(args.config, args.check)
        print('\n'.join(lines) or f'{args.config} and {args.check} are the same run.')
        return int(bool(lines))
    text = flatten.flatten(args.config)
    if args.out is None:
        print(text)
    else:
        flatten.write_new(args.out, text)
        print(f'Written: {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(run(main))
