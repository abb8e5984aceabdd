# 40 epochs of SGD with one learning rate for each part of the model.
# VOC 2012: 1464 images / 2 per step = 732 steps an epoch, 29,280 steps in all on one GPU.
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
            roi_head=dict(lr_mult=1.0),  # 0.002
        )
    ),
)

param_scheduler = [
    # From 0.001 x lr to lr over the first 500 of 732 steps of epoch 1.
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    # lr x 0.1 after epoch 25, x 0.01 after epoch 35.
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=40, milestones=[25, 35], gamma=0.1),
]

# lr x (GPUs x images per GPU x accumulation) / 2: 0.002, 0.004, 0.008 for 1, 2, 4 GPUs.
auto_scale_lr = dict(enable=True, base_batch_size=2)
