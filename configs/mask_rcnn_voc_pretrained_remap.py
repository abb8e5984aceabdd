# All 20 VOC classes are COCO classes under other names: start from what COCO knows of them.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_voc_pretrained_remap.py
#          … --test --head-init remap tests the transplanted model before any training
# Expect:  work_dirs/mask_rcnn_remap/; an AP well above 0 before the first step.
_base_ = [
    './_base_/models/mask_rcnn_r50_fpn.py',
    './_base_/weights/coco_r50_remap.py',
    './_base_/datasets/voc2012_instance.py',
    './_base_/schedules/finetune_40e.py',
    './_base_/runtime.py',
]

work_dir = 'work_dirs/mask_rcnn_remap'
