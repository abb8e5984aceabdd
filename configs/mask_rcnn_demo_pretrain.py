# Trains the 80-class "COCO" model whose weights are bundled for the demo: about an hour on a CPU.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_demo_pretrain.py
#          python tools/publish_weights.py work_dirs/demo_pretrain pretrain/mask_rcnn_demo_coco80
_base_ = './mask_rcnn_demo.py'

work_dir = 'work_dirs/demo_pretrain'
data_root = 'data/demo_coco80/'
demo_data = dict(_delete_=True, kind='coco', root=data_root, num_train=6000, num_val=200, seed=0)

model = dict(roi_head=dict(bbox_head=dict(num_classes=80), mask_head=dict(num_classes=80)))

data_prefix = dict(img='images/')
train_dataloader = dict(batch_size=8, dataset=dict(data_root=data_root, data_prefix=data_prefix, metainfo=None))
val_dataloader = dict(batch_size=8, dataset=dict(data_root=data_root, data_prefix=data_prefix, metainfo=None))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json', classwise=False)
test_evaluator = val_evaluator

# 6000 images / 8 = 750 steps an epoch.
train_cfg = dict(max_epochs=5)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.002, weight_decay=0.01),
    clip_grad=dict(max_norm=10, norm_type=2),
)
auto_scale_lr = dict(base_batch_size=8)
param_scheduler = [dict(type='OneCycleLR', eta_max=0.002, total_steps=5 * 750, by_epoch=False)]
weights = None
