# The whole road in minutes on a CPU: synthetic images with the 20 VOC class names, bundled weights.
# Run:     make demo
# Expect:  coco/segm_mAP_50 of at least 0.70 on 100 held-out images; see the README for the figures.
_base_ = './mask_rcnn_voc_pretrained.py'

work_dir = 'work_dirs/demo'
data_root = 'data/demo/VOCdevkit/VOC2012/'
# Made by mmfinetune.data.demo.make_voc when the annotation files are missing.
demo_data = dict(kind='voc', root='data/demo', num_train=240, num_val=100, seed=0)

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

# No PhotoMetricDistortion: it permutes colour channels, and here colour is part of the class.
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(224, 224), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImage'),
    dict(type='Resize', scale=(224, 224), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

# 240 images / 4 = 60 steps an epoch, 3 epochs = 180 steps.
train_cfg = dict(max_epochs=3)
# 0.02 for 4 images; a small, unfrozen model on easy images takes ten times the VOC rate.
optim_wrapper = dict(optimizer=dict(lr=0.02))
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=30),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=3, milestones=[2], gamma=0.1),
]

weights = dict(checkpoint='pretrain/mask_rcnn_demo_coco80-72d9cfaf.pth', url=None, fallbacks=[])
