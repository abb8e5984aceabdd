# 3 epochs for the demo model, its learning rate ten times that of the VOC run.
_base_ = './finetune_40e.py'

# 240 images / 4 = 60 steps an epoch, 3 epochs = 180 steps.
train_cfg = dict(max_epochs=3)
# 0.02 for 4 images; a small, unfrozen model on easy images takes ten times the VOC rate.
optim_wrapper = dict(optimizer=dict(lr=0.02))
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=30),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=3, milestones=[2], gamma=0.1),
]
