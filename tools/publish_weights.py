"""Strip a checkpoint to its weights and name it by its SHA-256, as the model zoos do."""

from pathlib import Path

from mmfinetune.apis.cli import add, make_parser, run

EXAMPLES = """
python tools/publish_weights.py work_dirs/mask_rcnn_pretrained pretrain/my_voc_model
python tools/publish_weights.py work_dirs/try1/epoch_12.pth pretrain/my_model
"""


def main() -> int:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument('src', type=Path, help='checkpoint, or work dir (its best checkpoint)')
    parser.add_argument('dst', type=Path, help='file to write, without hash and suffix')
    add(parser, '--overwrite')
    args = parser.parse_args()

    from mmfinetune.weights.publish import publish

    print(f'Written: {publish(args.src, args.dst, args.overwrite)}')
    return 0


if __name__ == '__main__':
    run(main)
