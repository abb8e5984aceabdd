"""The classes of PASCAL VOC."""

from __future__ import annotations

# The groups of the VOC devkit's documentation, written as COCO's `supercategory`.
_GROUPS = {
    'person': 'person',
    'animal': 'bird cat cow dog horse sheep',
    'vehicle': 'aeroplane bicycle boat bus car motorbike train',
    'indoor': 'bottle chair diningtable pottedplant sofa tvmonitor',
}
VOC_GROUPS = {name: group for group, names in _GROUPS.items() for name in names.split()}
# The official order is alphabetical: the pixel value in SegmentationClass is the position here plus 1.
VOC_CLASSES = tuple(sorted(VOC_GROUPS))
