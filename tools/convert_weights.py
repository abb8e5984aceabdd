"""Bring weights of torchvision, Detectron2 or safetensors under MMDetection's names, or back."""

from pathlib import Path

from mmfinetune.apis.cli import add, make_parser, run

EXAMPLES = """
python tools/convert_weights.py maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth pretrain/tv_coco.pth
python tools/convert_weights.py model_final_f10217.pkl pretrain/detectron2_coco.pth
python tools/convert_weights.py work_dirs/try1/epoch_12.pth mine.pth --to torchvision
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument(
        'src',
        type=Path,
        help='weights of MMDetection, torchvision or Detectron2 (.pth, .pkl, .safetensors); recognised by content',
    )
    parser.add_argument('dst', type=Path, help='file to write (.pth)')
    parser.add_argument(
        '--to', choices=('mmdet', 'torchvision'), default='mmdet', help='whose names to write (default: %(default)s)'
    )
    parser.add_argument(
        '--bn-eps',
        type=float,
        metavar='EPS',
        help="eps of BN in torchvision's model (default: 0 for its released COCO file, else 1e-5; it is 0 too in models "
        'fine-tuned from that file)',
    )
    add(parser, '--overwrite')
    args = parser.parse_args()

    from mmfinetune.weights.publish import convert_file

    source = convert_file(args.src, args.dst, args.to, args.bn_eps, args.overwrite)
    print('\n'.join(source.lines()))
    print(f'Written: {args.dst}')
    return 0


if __name__ == '__main__':
    run(main)
