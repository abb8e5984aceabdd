# The same, the heads too: each class takes the rows of the COCO class that it is under another name.
_base_ = './coco_r50.py'

# For names of your own: aliases={'lorry': 'truck', 'my class': None}; None re-initializes.
weights = dict(head_init='remap')
