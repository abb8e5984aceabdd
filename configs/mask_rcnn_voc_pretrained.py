# The main run: COCO-pretrained Mask R-CNN R50-FPN, fine-tuned on PASCAL VOC 2012 with masks.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_voc_pretrained.py
# Expect:  work_dirs/mask_rcnn_pretrained/ with checkpoints, tensorboard_logs/ and figures/.
_base_ = [
    './_base_/models/mask_rcnn_r50_fpn.py',
    './_base_/weights/coco_r50.py',
    './_base_/datasets/voc2012_instance.py',
    './_base_/schedules/finetune_40e.py',
    './_base_/runtime.py',
]
