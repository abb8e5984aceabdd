# The baseline: only the backbone is pretrained (ImageNet); one lr for all parts, ten times higher.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_voc_scratch.py
# Expect:  work_dirs/mask_rcnn_scratch/, to be compared with mask_rcnn_voc_pretrained.py.
_base_ = [
    './_base_/models/mask_rcnn_r50_fpn.py',
    './_base_/weights/imagenet_r50.py',
    './_base_/datasets/voc2012_instance.py',
    './_base_/schedules/finetune_40e.py',
    './_base_/runtime.py',
]

work_dir = 'work_dirs/mask_rcnn_scratch'

optim_wrapper = dict(
    # 0.02 as in the baseline this compares with. COCO's rule gives 0.0025 for 1 GPU x 2 images;
    # if the loss diverges on one GPU, pass --lr 0.0025.
    optimizer=dict(lr=0.02),
    clip_grad=dict(max_norm=35, norm_type=2),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0), neck=dict(lr_mult=1.0))),
)
