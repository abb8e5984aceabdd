"""Check the weights, train and test. Without a part named: train, then test."""

import sys

from mmfinetune.apis.cli import add_config_flags, make_parser, run

EXAMPLES = """
python tools/train_pretrained.py                                  # the VOC run: train, then test
python tools/train_pretrained.py --check-weights                  # what would be loaded
python tools/train_pretrained.py --dry-run                        # data sizes, steps, lr; no more
python tools/train_pretrained.py configs/mask_rcnn_demo.py        # minutes on a CPU
python tools/train_pretrained.py --data-root /data/VOCdevkit --work-dir work_dirs/try1
python tools/train_pretrained.py --resume                         # go on with the last checkpoint
python tools/train_pretrained.py --test                           # test the best checkpoint
python tools/train_pretrained.py --test --head-init remap         # what COCO knows, untrained
python tools/train_pretrained.py --cfg-options train_cfg.max_epochs=12 train_dataloader.batch_size=4
python tools/train_pretrained.py --gpus 4                         # of 8; all is the default
python tools/train_pretrained.py --batch-size 1 --accumulate 2    # the same recipe, less memory
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    add_config_flags(parser, default='configs/mask_rcnn_voc_pretrained.py')
    parts = parser.add_argument_group('parts')
    parts.add_argument(
        '--check-weights', action='store_true', help='find and verify the weights, show where each tensor comes from'
    )
    parser.add_argument('--json', action='store_true', help='print the report of --check-weights as JSON')
    parts.add_argument('--train', action='store_true', help='train only')
    parts.add_argument(
        '--test', action='store_true', help='test only: the best checkpoint of the work dir, or --weights'
    )
    parts.add_argument(
        '--dry-run', action='store_true', help='print data sizes, steps and the lr of each group, then stop'
    )
    parser.add_argument(
        '--weights',
        metavar='FILE',
        help='start from (with --test alone: test) this file or URL: MMDetection, '
        'torchvision, Detectron2, safetensors, or a run of your own',
    )
    parser.add_argument(
        '--head-init',
        choices=('reinit', 'remap'),
        help='draw the heads anew, or take over the rows of the classes that the '
        'weights know; with --test: test the model before any training',
    )
    parser.add_argument(
        '--data-root', metavar='DIR', help='folder that holds VOCdevkit/, or the annotation files of the config'
    )
    parser.add_argument('--work-dir', metavar='DIR', help='where results go')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='PATH',
        help='go on from this checkpoint, or from the last of the work dir; `auto`: begin where there is none',
    )
    parser.add_argument('--save-every', type=int, metavar='N', help='save each N steps too, not only each epoch')
    parser.add_argument('--no-check', dest='check', action='store_false', help='leave out the check of the data set')
    parser.add_argument(
        '--gpus', metavar='N', help='GPUs of this machine, or `all` (default); without a GPU: processes'
    )
    parser.add_argument(
        '--batch-size', metavar='N', help='images per GPU, the lr scaled by the rule; `auto`: as many as fit'
    )
    parser.add_argument(
        '--accumulate', type=int, metavar='N', help='update the weights every N steps; the lr is scaled by the rule'
    )
    parser.add_argument(
        '--amp', nargs='?', const='fp16', choices=('fp16', 'bf16'), help='mixed precision on a GPU (default: fp16)'
    )
    parser.add_argument('--lr', type=float, help='base learning rate as it is; wins over the config and the scaling')
    parser.add_argument(
        '--no-scale-lr',
        dest='scale_lr',
        action='store_false',
        help="use the config's lr whatever the number of GPUs and the batch size",
    )
    args = parser.parse_args()

    from mmfinetune.apis import train

    return train.run(train.Options(**vars(args)))


if __name__ == '__main__':
    sys.exit(run(main))
