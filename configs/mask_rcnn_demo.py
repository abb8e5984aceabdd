# The whole way in minutes on a CPU: synthetic images with the 20 VOC class names, bundled weights.
# Run:     make demo
# Expect:  coco/segm_mAP_50 of at least 0.70 on 100 held-out images; see the README for the figures.
_base_ = [
    './_base_/models/mask_rcnn_demo.py',
    './_base_/weights/demo.py',
    './_base_/datasets/demo.py',
    './_base_/schedules/demo.py',
    './_base_/runtime.py',
]

work_dir = 'work_dirs/demo'
