"""Write a short config for data of your own: classes, paths, input size and schedule from it."""

from pathlib import Path

from mmfinetune.apis.cli import add, make_parser, old_option, run
from mmfinetune.config.new import FLIPS, write

BASE = Path('configs/mask_rcnn_voc_pretrained.py')
EXAMPLES = """
python tools/new_config.py --data-root data/tiles --name tiles            # writes configs/tiles.py
python tools/new_config.py --data-root data/tiles --name tiles --batch-size 4 --epochs 60
python tools/new_config.py --data-root data/tiles --name tiles_small --base configs/mask_rcnn_demo.py
python tools/new_config.py --data-root data/tiles --name tiles --flip horizontal vertical diagonal
python tools/new_config.py --data-root /data/parts --name parts --out /data/parts/parts.py --overwrite
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    old_option(parser, '--data', new='--data-root')
    old_option(parser, '--images-per-gpu', new='--batch-size')
    add(
        parser,
        '--data-root',
        required=True,
        more='(annotations/instances_{train,val[,test]}.json and images/, from prepare_data.py and split_dataset.py)',
    )
    parser.add_argument('--name', required=True, help='name of the config and of its folder in work_dirs/')
    add(parser, '--out', metavar='FILE', more='the config (default: configs/NAME.py)')
    parser.add_argument(
        '--base',
        type=Path,
        default=BASE,
        metavar='CONFIG',
        help='config to inherit from (default: %(default)s); '
        'configs/mask_rcnn_demo.py is a small model that trains on a CPU',
    )
    add(parser, '--batch-size', more="(default: the base's); the learning rate follows")
    add(parser, '--epochs', more="(default: the base's, within 1,500 to 30,000 steps)")
    parser.add_argument(
        '--flip',
        nargs='+',
        choices=FLIPS,
        default=[],
        metavar='DIRECTION',
        help='random flips in training: horizontal, vertical, diagonal; all three '
        'for images without a canonical orientation: parts, aerial and microscope images (default: '
        "the base's, horizontal)",
    )
    add(parser, '--overwrite')
    args = parser.parse_args()

    path, lines = write(
        args.data_root, args.name, args.out, args.base, args.batch_size, args.epochs, args.flip, args.overwrite
    )
    print('\n'.join(lines))
    print(
        f'Next:    python tools/check_dataset.py --config {path}\n'
        f'         python tools/train_pretrained.py {path} --dry-run'
    )
    print(f'Written: {path}')
    return 0


if __name__ == '__main__':
    run(main)
