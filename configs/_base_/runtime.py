# What every run shares: hooks, logging, TensorBoard.
default_scope = 'mmdet'
# Registers this toolkit's parts and, where mmcv has no compiled ops, the torchvision-backed ones.
custom_imports = dict(imports=['mmfinetune.register'], allow_failed_imports=False)

work_dir = 'work_dirs/mask_rcnn_pretrained'

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
