# The demo with its heads taken over from the 80 classes of the bundled weights.
# Run:     python tools/train_pretrained.py configs/mask_rcnn_demo_remap.py
# Expect:  a mask AP near that of the last epoch before the first step; see the README.
_base_ = './mask_rcnn_demo.py'

work_dir = 'work_dirs/demo_remap'
weights = dict(head_init='remap')
