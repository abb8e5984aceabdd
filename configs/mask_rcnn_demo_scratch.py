# The demo's schedule and learning rates from random weights: what the pretrained start is worth.
# Run:     make demo-scratch
# Expect:  coco/segm_mAP_50 at least 0.25 below that of mask_rcnn_demo.py; figures in the README.
_base_ = './mask_rcnn_demo.py'

work_dir = 'work_dirs/demo_scratch'
weights = None
# A tenth of the lr would keep a random backbone from learning: all parts take the full 0.02.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0), neck=dict(lr_mult=1.0))))
