# The baseline: only the backbone is pretrained (ImageNet); one lr for all parts, ten times higher.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_voc_scratch.py
# Expect:  work_dirs/mask_rcnn_scratch/, to be compared with mask_rcnn_voc_pretrained.py.
_base_ = './mask_rcnn_voc_pretrained.py'

work_dir = 'work_dirs/mask_rcnn_scratch'

weights = dict(
    _delete_=True,
    checkpoint='pretrain/resnet50-0676ba61.pth',
    url='https://download.pytorch.org/models/resnet50-0676ba61.pth',
    into='backbone',  # the file's keys have no prefix; the rest of the model starts at random
    ignore=['fc.'],
)  # ImageNet's 1000-class layer

optim_wrapper = dict(
    # 0.02 as in the baseline this compares with. COCO's rule gives 0.0025 for 1 GPU x 2 images;
    # if the loss diverges on one GPU, pass --lr 0.0025.
    optimizer=dict(lr=0.02),
    clip_grad=dict(max_norm=35, norm_type=2),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=1.0), neck=dict(lr_mult=1.0))),
)
