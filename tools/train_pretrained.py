"""Check the weights, train and test. Without a part named: train, then test."""

from mmfinetune.apis.cli import add, make_parser, note, positive_int, positive_int_or_auto, run

EXAMPLES = """
python tools/train_pretrained.py                                  # the VOC run: train, then test
python tools/train_pretrained.py --check-weights                  # what would be loaded
python tools/train_pretrained.py --dry-run                        # data sizes, steps, lr; no more
python tools/train_pretrained.py --dry-run --probe                # and time, memory, disk of the training
python tools/train_pretrained.py configs/mask_rcnn_demo.py        # minutes on a CPU
python tools/train_pretrained.py --data-root /data/VOCdevkit --work-dir work_dirs/try1
python tools/train_pretrained.py --resume                         # continue from the last checkpoint
python tools/train_pretrained.py --test                           # test the best checkpoint
python tools/train_pretrained.py --test --checkpoint my.pth      # test this file
python tools/train_pretrained.py --test --head-init remap         # what COCO knows, untrained
python tools/train_pretrained.py --cfg-options train_cfg.max_epochs=12 train_dataloader.batch_size=4
python tools/train_pretrained.py --gpus 4                         # of 8; all is the default
python tools/train_pretrained.py --batch-size 1 --accumulate 2    # the same recipe, less memory
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'config',
        nargs='?',
        default='configs/mask_rcnn_voc_pretrained.py',
        metavar='CONFIG',
        help='config file (default: %(default)s)',
    )
    add(parser, '--cfg-options')
    parts = parser.add_argument_group('parts')
    parts.add_argument(
        '--check-weights', action='store_true', help='find and verify the weights, show where each tensor comes from'
    )
    parts.add_argument('--train', action='store_true', help='train only')
    parts.add_argument('--test', action='store_true', help='test only: the best checkpoint of the work dir')
    add(parts, '--dry-run', more='data sizes, steps and the lr of each group')
    parts.add_argument(
        '--probe',
        action='store_true',
        help='with --dry-run: a few steps and validation images, and from them time, memory, disk and what limits',
    )
    add(parser, '--json', more='(with --check-weights or --probe)')
    parser.add_argument(
        '--weights',
        metavar='FILE',
        help='start from this file or URL: MMDetection, torchvision, Detectron2, safetensors, or a run of your own',
    )
    add(parser, '--checkpoint', more='to test, with --test', type=str)
    parser.add_argument(
        '--head-init',
        choices=('reinit', 'remap', 'keep'),
        help='re-initialize the heads, take the rows of the classes that the weights know, or keep the heads of weights '
        'for the same classes; with --test: test the model before any training',
    )
    add(parser, '--data-root')
    parser.add_argument('--work-dir', metavar='WORK_DIR', help='where results go (default: that of the config)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=False,
        metavar='FILE',
        help='continue from this checkpoint, or from the last of the work dir; `auto`: start where there is none',
    )
    parser.add_argument(
        '--new-schedule',
        action='store_true',
        help="with --resume: use the config's optimizer settings and schedule from there on, not the checkpoint's",
    )
    parser.add_argument(
        '--save-every', type=positive_int, metavar='N', help='save every N steps too, not only every epoch'
    )
    parser.add_argument('--no-check', dest='check', action='store_false', help='skip the check of the data set')
    parser.add_argument(
        '--gpus', metavar='N', help='GPUs of this machine, or `all` (default); without a GPU: processes'
    )
    add(parser, '--batch-size', type=positive_int_or_auto, more='; the lr scales with it; `auto`: as many as fit')
    parser.add_argument(
        '--accumulate', type=positive_int, metavar='N', help='update the weights every N steps; the lr scales with it'
    )
    parser.add_argument(
        '--amp', nargs='?', const='fp16', choices=('fp16', 'bf16'), help='mixed precision on a GPU (default: fp16)'
    )
    parser.add_argument('--lr', type=float, help='base learning rate, used unchanged; wins over config and scaling')
    parser.add_argument(
        '--no-scale-lr',
        dest='scale_lr',
        action='store_false',
        help="use the config's lr whatever the number of GPUs and the batch size",
    )
    args = parser.parse_args()
    if args.json and args.check_weights == args.probe:
        parser.error('--json prints the result of either --check-weights or --probe: pass one of them with it')
    if args.weights and args.test and not (args.train or args.head_init):
        note('the file to test is now named with --checkpoint; --weights will only mean what training starts from')
        args.checkpoint, args.weights = args.weights, None

    from mmfinetune.apis import train

    return train.run(train.Options(**vars(args)))


if __name__ == '__main__':
    run(main)
