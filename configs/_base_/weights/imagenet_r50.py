# An ImageNet backbone; the rest of the model starts from random weights.
weights = dict(
    checkpoint='pretrain/resnet50-0676ba61.pth',
    url='https://download.pytorch.org/models/resnet50-0676ba61.pth',
    into='backbone',  # the file's keys have no prefix
    ignore=['fc.'],  # ImageNet's 1000-class layer
)
