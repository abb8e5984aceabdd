# The bundled 80-class weights of the demo model, from configs/mask_rcnn_demo_pretrain.py.
_base_ = './coco_r50.py'

weights = dict(checkpoint='pretrain/mask_rcnn_demo_coco80-72d9cfaf.pth', url=None, fallbacks=[])
