"""Write a short config for data of your own: classes, paths, input size and schedule from it."""

import sys
from pathlib import Path

from mmfinetune.apis.cli import make_parser, run
from mmfinetune.config.new import FLIPS, write

BASE = Path('configs/mask_rcnn_voc_pretrained.py')
EXAMPLES = """
python tools/new_config.py --data data/tiles --name tiles            # writes configs/tiles.py
python tools/new_config.py --data data/tiles --name tiles --images-per-gpu 4 --epochs 60
python tools/new_config.py --data data/tiles --name tiles_small --base configs/mask_rcnn_demo.py
python tools/new_config.py --data data/tiles --name tiles --flip horizontal vertical diagonal
python tools/new_config.py --data /data/parts --name parts --out /data/parts/parts.py --overwrite
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        '--data',
        type=Path,
        required=True,
        metavar='DIR',
        help='folder with annotations/instances_{train,val[,test]}.json and '
        'images/, as tools/prepare_data.py and tools/split_dataset.py make it',
    )
    parser.add_argument('--name', required=True, help='of the config and of its folder in work_dirs/')
    parser.add_argument('--out', type=Path, metavar='FILE', help='the file to write (default: configs/NAME.py)')
    parser.add_argument(
        '--base',
        type=Path,
        default=BASE,
        metavar='CONFIG',
        help='config to inherit from (default: %(default)s); '
        'configs/mask_rcnn_demo.py is a small model that trains on a CPU',
    )
    parser.add_argument(
        '--images-per-gpu',
        type=int,
        metavar='N',
        help="images in a step on one GPU (default: the base's); the learning rate follows",
    )
    parser.add_argument(
        '--epochs',
        type=int,
        metavar='N',
        help="length of the training (default: the base's, within 1,500 to 30,000 steps)",
    )
    parser.add_argument(
        '--flip',
        nargs='+',
        choices=FLIPS,
        default=[],
        metavar='DIRECTION',
        help='random flips in training: horizontal, vertical, diagonal; all three '
        'for what has no way up: parts, aerial and microscope images (default: '
        "the base's, horizontal)",
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the config file')
    args = parser.parse_args()

    written = write(
        args.data, args.name, args.out, args.base, args.images_per_gpu, args.epochs, args.flip, args.overwrite
    )
    print('\n'.join(written.lines))
    print(
        f'Next:    python tools/check_dataset.py --config {written.path}\n'
        f'         python tools/train_pretrained.py {written.path} --dry-run'
    )
    print(f'Written: {written.path}')
    return 0


if __name__ == '__main__':
    sys.exit(run(main))
