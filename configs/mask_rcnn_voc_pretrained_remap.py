# All 20 VOC classes are COCO classes under other names: start from what COCO knows of them.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_voc_pretrained_remap.py
#          … --test --head-init remap tests the transplanted model before any training
# Expect:  work_dirs/mask_rcnn_remap/; an AP well above 0 before the first step.
_base_ = './mask_rcnn_voc_pretrained.py'

work_dir = 'work_dirs/mask_rcnn_remap'
# For names of your own: aliases={'lorry': 'truck', 'my class': None}; None draws anew.
weights = dict(head_init='remap')
