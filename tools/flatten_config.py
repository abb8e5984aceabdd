"""Write a config with all its bases resolved, or check that two configs are the same run."""

from mmfinetune.apis.cli import add, make_parser, old_option, run

EXAMPLES = """
python tools/flatten_config.py configs/mask_rcnn_voc_pretrained.py                  # print
python tools/flatten_config.py configs/mask_rcnn_voc_pretrained.py --out configs/flat.py
python tools/flatten_config.py configs/mask_rcnn_voc_pretrained.py --check configs/flat.py
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    old_option(parser, '-o', new='--out')
    parser.add_argument('config', metavar='CONFIG', help='config with _base_')
    add(parser, '--out', metavar='FILE', more='the config (default: print it)')
    add(parser, '--overwrite')
    parser.add_argument(
        '--check', metavar='CONFIG', help='compare the resolved settings with those of this config instead'
    )
    args = parser.parse_args()

    from mmfinetune.config import flatten

    if args.check:
        lines = flatten.compare(args.config, args.check)
        print('\n'.join(map(str, lines)) or f'{args.config} and {args.check} are the same run.')
        return int(bool(lines))
    text = flatten.flatten(args.config)
    if args.out is None:
        print(text)
    else:
        flatten.write(args.out, text, args.overwrite)
        print(f'Written: {args.out}')
    return 0


if __name__ == '__main__':
    run(main)
