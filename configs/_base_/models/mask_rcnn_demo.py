# A Mask R-CNN of 2 M parameters for 224 px images, which trains on a CPU.
_base_ = './mask_rcnn_r50_fpn.py'

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[64.0, 64.0, 64.0]),
    # ResNet-18 with 16 instead of 64 base channels, all of it trained, its BN too: from random
    # weights frozen statistics would be meaningless, and that run is what this compares with.
    backbone=dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),  # 16 to 256 px on 224 px images
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=150), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=150), rcnn=dict(max_per_img=20)),
)
