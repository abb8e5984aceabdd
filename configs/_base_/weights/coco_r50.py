# The whole COCO Mask R-CNN R50-FPN of the model zoo; only what depends on the classes is re-initialized.
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
    # Weights from N(0, std), biases 0; every other tensor must come from the checkpoint.
    reinit={
        'roi_head.bbox_head.fc_cls': dict(std=0.01),  # 20 classes + background = 21 rows
        'roi_head.bbox_head.fc_reg': dict(std=0.001),  # 20 classes x 4 deltas = 80 rows
        'roi_head.mask_head.conv_logits': dict(std=0.001),  # 20 class masks
    },
)
