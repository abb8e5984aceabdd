"""What a pipeline cannot do with an image is told by its size alone."""

from __future__ import annotations

import pytest

from mmfinetune.engine.transforms import unfit_sizes

LOAD, PACK = dict(type='LoadImage'), dict(type='PackDetInputs', meta_keys=())
TRUTH = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)


@pytest.mark.parametrize(
    ('steps', 'bad'),
    [
        ([], []),
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], [(5000, 1), (1, 5000)]),
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=False)], []),
        ([dict(type='RandomResize', scale=[(64, 64), (2000, 800)], keep_ratio=True)], [(5000, 1), (1, 5000)]),
        ([dict(type='RandomChoiceResize', scales=[(1333, 800), (333, 200)], keep_ratio=True)], [(5000, 1), (1, 5000)]),
        ([dict(type='Resize', scale_factor=0.05, keep_ratio=True)], [(5000, 1), (1, 5000), (9, 9)]),
        ([dict(type='mmdet.CopyPaste')], []),
    ],
)
def test_unfit_sizes(steps, bad):
    sizes = [(5000, 1), (1, 5000), (100, 80), (9, 9)]
    for pipeline in ([LOAD, TRUTH, *steps, PACK], [LOAD, *steps, TRUTH, PACK]):
        assert list(unfit_sizes(pipeline, sizes)) == bad
    assert unfit_sizes(steps, sizes) == {}
