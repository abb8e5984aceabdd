# MMDetection's Mask R-CNN, ResNet-50, FPN, for the 20 classes of VOC; `weights` bring the backbone too.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(init_cfg=None), roi_head=dict(bbox_head=dict(num_classes=20), mask_head=dict(num_classes=20))
)
