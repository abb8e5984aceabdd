"""MMDetection's own weights pass unchanged; a config in the file says how inputs are normalised."""

from __future__ import annotations

import pytest
import torch

from mmfinetune.weights.publish import convert_file, save
from mmfinetune.weights.source import RGB_MEAN, RGB_STD
from mmfinetune.weights.sources import open_source
from tests.builders.classes import COCO_CLASSES
from tests.builders.errors import codes, refused
from tests.builders.weights import mmdet_state, same, same_source

CONFIG_2X = """
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(type='MaskRCNN', backbone=dict(type='ResNet', depth=50, style='caffe'))
"""


CONFIG_3X = """
model = dict(
    backbone=dict(depth=50, style='pytorch', type='ResNet'),
    data_preprocessor=dict(bgr_to_rgb=True, mean=[123.675, 116.28, 103.53],
                           std=[58.395, 57.12, 57.375], type='DetDataPreprocessor'))
"""


def test_official_file_passes_unchanged(official_like):
    source = open_source(official_like)
    assert source.origin == 'mmdet'
    same(source.tensors, torch.load(official_like, weights_only=True)['state_dict'])
    # Its meta names two classes, which cannot be those of 80 rows.
    assert source.classes == COCO_CLASSES
    assert [(n.code, n.facts) for n in source.notes][:1] == [('weights-names-unused', {'named': 2, 'rows': 80})]
    assert (source.style, source.mean) == (None, None)


@pytest.mark.parametrize(
    ('key', 'text', 'expected'),
    [
        ('config', CONFIG_2X, ('caffe', (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False)),
        ('cfg', CONFIG_3X, ('pytorch', RGB_MEAN, RGB_STD, True)),
        ('cfg', 'not ( python', (None, None, None, None)),
        ('cfg', "backbone=dict(depth=50, style=open('x'))", (None, None, None, None)),
    ],
)
def test_config_in_the_file_tells_the_normalisation(key, text, expected, tmp_path):
    path = tmp_path / 'epoch_1.pth'
    torch.save(
        {
            'meta': {key: text, 'dataset_meta': {'classes': ('a', 'b', 'c')}},
            'state_dict': mmdet_state(3),
            'optimizer': {'state': {}},
            'message_hub': {},
        },
        path,
    )
    source = open_source(path)
    assert (source.style, source.mean, source.std, source.rgb) == expected
    assert (source.origin, source.classes) == ('mmdet run', ('a', 'b', 'c'))
    same_source(open_source(save(source, tmp_path / 'again.pth')), source)


@pytest.mark.parametrize('name', ['mask_rcnn_r50_caffe_fpn_1x.pth', 'mask-rcnn_r50-caffe_fpn_1x.pth'])
def test_caffe_in_the_name(tmp_path, name):
    path = tmp_path / name
    torch.save({'state_dict': mmdet_state()}, path)
    source = open_source(path)
    assert (source.style, source.classes) == ('caffe', COCO_CLASSES)
    # The cure for the style alone would leave the wrong inputs.
    assert (source.rgb, source.mean, source.std) == (False, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
    assert 'weights-caffe-by-name' in codes(source.notes)
    with refused('torchvision-style', style='caffe'):
        convert_file(path, tmp_path / 'tv.pth', 'torchvision')
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
