# The same run as mask_rcnn_voc_pretrained.py in one file without bases: to read, and to copy for your own data.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_voc_pretrained_simple.py
# Expect:  work_dirs/mask_rcnn_pretrained/ with checkpoints, tensorboard_logs/ and figures/.

# ---- Toolkit ------------------------------------------------------------------------------------
default_scope = 'mmdet'  # type='…' names are looked up in mmdet's registries first
# Registers this toolkit's parts and, where mmcv has no compiled ops, the torchvision-backed ones.
custom_imports = dict(imports=['mmfinetune.register'], allow_failed_imports=False)
work_dir = 'work_dirs/mask_rcnn_pretrained'  # checkpoints, logs, pictures; --work-dir changes it

# ---- Weights ------------------------------------------------------------------------------------
# The whole COCO model is loaded. Only the layers whose shape depends on the number of classes are
# re-initialized: weights from N(0, std), biases 0. Any other tensor that does not fit stops the run.
weights = dict(
    checkpoint='pretrain/mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth',
    url='https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_1x_coco/'
    'mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth',
    # Tried where the first is not available; converted on reading.
    fallbacks=[
        dict(
            checkpoint='pretrain/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth',
            url='https://download.pytorch.org/models/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth',
        )
    ],
    head_init='reinit',  # or 'remap': take over the rows of the classes that COCO knows
    reinit={
        'roi_head.bbox_head.fc_cls': dict(std=0.01),  # 20 classes + background = 21 rows
        'roi_head.bbox_head.fc_reg': dict(std=0.001),  # 20 classes x 4 deltas = 80 rows
        'roi_head.mask_head.conv_logits': dict(std=0.001),  # 20 class masks
    },
)

# ---- Model: Mask R-CNN, ResNet-50, FPN ----------------------------------------------------------
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        # ImageNet's mean and std in RGB order: what the weights were trained with.
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=32,
    ),  # the coarsest level of ResNet has stride 32
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,  # the stem and the first stage do not learn
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,  # 2 images are too few for batch statistics
        style='pytorch',  # stride in the 3x3 convolution; "caffe" weights do not fit
        init_cfg=None,
    ),  # `weights` brings the backbone too
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
    rpn_head=dict(
        type='RPNHead',
        in_channels=256,
        feat_channels=256,
        anchor_generator=dict(
            type='AnchorGenerator',
            scales=[8],  # x strides: anchors of 32, 64, 128, 256 and 512 pixels
            ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
            out_channels=256,
            featmap_strides=[4, 8, 16, 32],
        ),
        bbox_head=dict(
            type='Shared2FCBBoxHead',
            in_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=20,  # without background; change it here, in mask_head and in metainfo
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[0.1, 0.1, 0.2, 0.2]
            ),
            reg_class_agnostic=False,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        ),
        mask_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
            out_channels=256,
            featmap_strides=[4, 8, 16, 32],
        ),
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=4,
            in_channels=256,
            conv_out_channels=256,
            num_classes=20,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.7,
                neg_iou_thr=0.3,
                min_pos_iou=0.3,
                match_low_quality=True,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(nms_pre=2000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.5,
                match_low_quality=True,
                ignore_iof_thr=-1,
            ),
            sampler=dict(
                type='RandomSampler',
                num=512,  # boxes per image in the loss: less saves memory
                pos_fraction=0.25,
                neg_pos_ub=-1,
                add_gt_as_proposals=True,
            ),
            mask_size=28,
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            score_thr=0.05,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=100,  # as many as COCO's metric counts
            mask_thr_binary=0.5,
        ),
    ),
)

# ---- Data: PASCAL VOC 2012, 1464 training and 1449 validation images ----------------------------
data_root = 'data/VOCdevkit/VOC2012/'  # --data-root changes it
# The order is VOC's own and that of the categories in the annotation files; labels follow it.
metainfo = dict(
    classes=(
        'aeroplane',
        'bicycle',
        'bird',
        'boat',
        'bottle',
        'bus',
        'car',
        'cat',
        'chair',
        'cow',
        'diningtable',
        'dog',
        'horse',
        'motorbike',
        'person',
        'pottedplant',
        'sheep',
        'sofa',
        'train',
        'tvmonitor',
    )
)

train_pipeline = [
    dict(type='LoadImage'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    # Brightness, contrast, saturation, hue and channel order; each with probability 0.5.
    dict(type='PhotoMetricDistortion'),
    # Short side 800, long side at most 1333: what the COCO weights were trained at.
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImage'),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    # After Resize, so that the ground truth stays in the image's own coordinates.
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]

train_dataloader = dict(
    batch_size=2,  # images per GPU; the lr follows it, see auto_scale_lr
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    # Wide images with wide ones, tall with tall: less padding.
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train.json',  # made by tools/prepare_voc.py
        data_prefix=dict(img=''),  # file names in it begin with JPEGImages/
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img=''),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
# VOC keeps the labels of its test split to itself: val is also the split of the final test.
test_dataloader = val_dataloader

val_evaluator = dict(
    type='InstanceCocoMetric',
    ann_file=data_root + 'annotations/instances_val.json',
    metric=['bbox', 'segm'],
    engine='hotcoco',  # or 'pycocotools': the same numbers, slower
    classwise=True,
)  # AP of each class as well
test_evaluator = val_evaluator

# ---- Schedule -----------------------------------------------------------------------------------
# 1464 images / 2 per step = 732 steps an epoch; x 40 epochs = 29,280 steps on one GPU.
train_cfg = dict(type='ExactTrainLoop', max_epochs=40, val_interval=1)
val_cfg = dict(type='ValLossLoop')  # validation loss too; loss=False leaves it out
test_cfg = dict(type='TestLossLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='LayeredOptimWrapperConstructor',  # one named param group for each key below
    # 0.002 = lr for (1 GPU) x (2 images per GPU); COCO's 0.02 is for 8 x 2 images, 0.0025 for 2.
    optimizer=dict(type='SGD', lr=0.002, momentum=0.9, weight_decay=0.0001),
    paramwise_cfg=dict(
        custom_keys=dict(
            backbone=dict(lr_mult=0.1),  # 0.0002
            neck=dict(lr_mult=0.5),  # 0.001
            rpn_head=dict(lr_mult=1.0),  # 0.002
            roi_head=dict(lr_mult=1.0),
        )
    ),
)  # 0.002

param_scheduler = [
    # From 0.001 x lr to lr over the first 500 of 732 steps of epoch 1.
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    # lr x 0.1 after epoch 25, x 0.01 after epoch 35.
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=40, milestones=[25, 35], gamma=0.1),
]

# lr x (GPUs x images per GPU x accumulation) / 2: 0.002, 0.004, 0.008 for 1, 2, 4 GPUs.
auto_scale_lr = dict(enable=True, base_batch_size=2)

# ---- Hooks, logging, TensorBoard ----------------------------------------------------------------
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # Every epoch, the last three kept, and the best by mask mAP.
    checkpoint=dict(type='SafeCheckpointHook', interval=1, max_keep_ckpts=3, save_best='coco/segm_mAP', rule='greater'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    # A loss or gradient that is NaN stops the run; nan_policy='skip' leaves such steps out.
    nonfinite=dict(type='NonFiniteHook', nan_policy='stop'),
    divergence=dict(type='DivergenceHook'),  # a warning where the loss jumps
    # Learning rates, gradient norm, resumed curves, hyperparameters, validation images, the first batch.
    tensorboard=dict(type='TensorBoardHook', lr=True, grad_norm=True, pictures=4),
    results=dict(type='ResultsHook'),  # results.csv, summary.md, curves.png and their like
    # Ground truth next to prediction for the first images of the test split.
    visualization=dict(type='TestPicturesHook', num_images=8),
)
custom_hooks = []  # your own; `default_hooks = dict(results=None)` in a config leaves one of the above out

env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='nccl')
)

vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorBoardBackend', save_dir=work_dir + '/tensorboard_logs')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(
    type='LogProcessor',
    window_size=20,
    by_epoch=True,
    # Means over the window; but a validation is logged as it is, not averaged with earlier epochs.
    mean_pattern=r'^(?!val/|test/).*(loss|time|grad_norm)',
)
log_level = 'INFO'

randomness = dict(seed=0)
load_from = None
resume = False
