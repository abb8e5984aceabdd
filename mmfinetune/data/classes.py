"""Class lists of PASCAL VOC and COCO, and how the one names what the other calls otherwise."""

from __future__ import annotations

import difflib

from mmfinetune.utils.errors import UserError

# The order is the official one: the pixel value in SegmentationClass is the position here plus 1.
VOC_CLASSES = (
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
)

# The groups of the VOC devkit's documentation, written as COCO's `supercategory`.
_GROUPS = {
    'person': 'person',
    'animal': 'bird cat cow dog horse sheep',
    'vehicle': 'aeroplane bicycle boat bus car motorbike train',
    'indoor': 'bottle chair diningtable pottedplant sofa tvmonitor',
}
VOC_GROUPS = {name: group for group, names in _GROUPS.items() for name in names.split()}

# MMDetection's order: row k of a COCO box head's classifier is class k of this list.
COCO_CLASSES = (
    'person',
    'bicycle',
    'car',
    'motorcycle',
    'airplane',
    'bus',
    'train',
    'truck',
    'boat',
    'traffic light',
    'fire hydrant',
    'stop sign',
    'parking meter',
    'bench',
    'bird',
    'cat',
    'dog',
    'horse',
    'sheep',
    'cow',
    'elephant',
    'bear',
    'zebra',
    'giraffe',
    'backpack',
    'umbrella',
    'handbag',
    'tie',
    'suitcase',
    'frisbee',
    'skis',
    'snowboard',
    'sports ball',
    'kite',
    'baseball bat',
    'baseball glove',
    'skateboard',
    'surfboard',
    'tennis racket',
    'bottle',
    'wine glass',
    'cup',
    'fork',
    'knife',
    'spoon',
    'bowl',
    'banana',
    'apple',
    'sandwich',
    'orange',
    'broccoli',
    'carrot',
    'hot dog',
    'pizza',
    'donut',
    'cake',
    'chair',
    'couch',
    'potted plant',
    'bed',
    'dining table',
    'toilet',
    'tv',
    'laptop',
    'mouse',
    'remote',
    'keyboard',
    'cell phone',
    'microwave',
    'oven',
    'toaster',
    'sink',
    'refrigerator',
    'book',
    'clock',
    'vase',
    'scissors',
    'teddy bear',
    'hair drier',
    'toothbrush',
)

# Only the names that differ; the other 14 VOC classes carry the same name in COCO.
VOC_TO_COCO = {
    'aeroplane': 'airplane',
    'diningtable': 'dining table',
    'motorbike': 'motorcycle',
    'pottedplant': 'potted plant',
    'sofa': 'couch',
    'tvmonitor': 'tv',
}


def coco_name(voc_name: str) -> str:
    """The COCO name of a VOC class.

    Raises:
        UserError: `voc_name` is none of the 20 VOC classes.
    """
    if voc_name not in VOC_CLASSES:
        near = difflib.get_close_matches(voc_name, VOC_CLASSES, n=1)
        raise UserError(
            f"'{voc_name}' is no VOC class" + (f"; did you mean '{near[0]}'?" if near else ''),
            cure='use one of: ' + ', '.join(VOC_CLASSES),
        )
    return VOC_TO_COCO.get(voc_name, voc_name)
