"""The search for the largest batch: what is tried, and what is made of it. The GPU is a fake."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from mmfinetune.config import load
from mmfinetune.engine import batch_size
from tests.builders.errors import refused
from tests.builders.runs import inside


@pytest.mark.parametrize('limit', [*range(20), 31, 32, 33, 100, 255, 256, 300])
def test_largest(limit):
    asked = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    assert batch_size.largest(fits) == min(limit, batch_size.LIMIT)
    assert len(asked) == len(set(asked)) <= 18 and max(asked) <= batch_size.LIMIT


def test_largest_below_a_limit():
    assert batch_size.largest(lambda size: True, limit=6) == 6
    assert batch_size.largest(lambda size: size < 6, limit=6) == 5


@pytest.fixture
def cfg(site, monkeypatch):
    monkeypatch.chdir(site)
    return load.load('tiny.py')


def samples_of(*shapes: tuple[int, int, int]) -> list[dict]:
    """(height, width, objects) of images."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    return [
        {
            'inputs': torch.ones(3, height, width, dtype=torch.uint8),
            'data_samples': DetDataSample(gt_instances=InstanceData(bboxes=torch.zeros(objects, 4))),
        }
        for height, width, objects in shapes
    ]


def test_most_objects_come_first_and_all_shapes_are_there(cfg, site, monkeypatch):
    from mmdet.datasets import CocoDataset

    ratios = {0: (300, 100), 1: (100, 300), 2: (100, 100), 3: (200, 100)}
    loaded = []
    info = CocoDataset.get_data_info

    def shaped(self, index):
        found = info(self, index)
        width, height = ratios.get(index, (120, 100))
        return {**found, 'width': width, 'height': height}

    monkeypatch.setattr(CocoDataset, 'get_data_info', shaped)
    get = CocoDataset.__getitem__
    monkeypatch.setattr(CocoDataset, '__getitem__', lambda self, index: loaded.append(index) or get(self, index))
    samples = batch_size.worst_samples(cfg, count=3)
    objects = [len(s['data_samples'].gt_instances) for s in samples]
    assert objects == sorted(objects, reverse=True)
    truth = json.loads((site / 'data/demo/VOCdevkit/VOC2012/annotations/instances_train.json').read_text())
    counts = [sum(a['image_id'] == image['id'] for a in truth['annotations']) for image in truth['images']]
    assert objects[:3] == sorted(counts, reverse=True)[:3]
    # The widest and the highest, whatever is in them; and each once.
    assert {0, 1} <= set(loaded) and len(loaded) == len(set(loaded)) <= 6


def test_all_samples_of_a_data_set_smaller_than_asked_for(cfg):
    assert len(batch_size.worst_samples(cfg, count=50)) == 8


def test_a_batch_is_padded_to_the_highest_and_the_widest():
    batch = batch_size.worst_batch(samples_of((60, 100, 9), (100, 60, 5), (80, 80, 1)), 5)
    assert [tuple(s['inputs'].shape) for s in batch] == [
        (3, 100, 100),
        (3, 100, 60),
        (3, 80, 80),
        (3, 60, 100),
        (3, 100, 60),
    ]
    assert batch[0]['inputs'].sum() == 3 * 60 * 100  # zeros around it
    assert [len(s['data_samples'].gt_instances) for s in batch] == [9, 5, 1, 9, 5]


def test_a_single_image_is_padded_to_the_largest_one():
    # No other image is in its batch to be as high as.
    [only] = batch_size.worst_batch(samples_of((50, 80, 9), (60, 100, 5), (100, 30, 1)), 1)
    assert tuple(only['inputs'].shape) == (3, 60, 100)


def test_samples_are_not_spoilt():
    samples = samples_of((60, 100, 9), (100, 60, 5))
    batch_size.worst_batch(samples, 4)
    assert [s['inputs'].shape[-2:] for s in samples] == [(60, 100), (100, 60)]


def test_steps_have_updates_and_the_optimizers_state(cfg):
    before = copy.deepcopy(cfg.to_dict())
    cfg.optim_wrapper.accumulative_counts = 4
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, *args, **kwargs):
            seen.append(len(self.state))
            return super().step(*args, **kwargs)

    from mmengine.registry import OPTIMIZERS

    OPTIMIZERS.register_module(name='SpySGD', module=Spy, force=True)
    cfg.optim_wrapper.optimizer.type = 'SpySGD'
    batch = batch_size.worst_batch(batch_size.worst_samples(cfg), 2)
    model = batch_size.train_steps(cfg, batch, 'cpu')
    trained = [p for p in model.parameters() if p.requires_grad]
    # The second step finds the momentum of every parameter.
    assert seen == [0, len(trained)]
    cfg.optim_wrapper.optimizer.type = 'SGD'
    cfg.optim_wrapper.pop('accumulative_counts')
    assert cfg.to_dict() == before


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 100 bytes, of which 80 are free."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (80, 100))
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    monkeypatch.setattr(batch_size.gc, 'collect', lambda: None)
    monkeypatch.setattr(batch_size, 'worst_samples', lambda cfg: samples_of((10, 10, 1)))


@pytest.mark.parametrize(('bytes_per_image', 'expected'), [(7, 10), (8, 8), (9, 7), (60, 1)])
def test_the_largest_batch_leaves_a_tenth_of_what_is_free(gpu, monkeypatch, capsys, bytes_per_image, expected):
    def peak(cfg, batch: list) -> int:
        used = bytes_per_image * len(batch)
        if used > 80:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return used

    monkeypatch.setattr(batch_size, '_peak_of_steps', peak)
    assert batch_size.find(None) == expected
    assert capsys.readouterr().out == f'--batch-size auto: {expected} images per GPU\n'


def test_not_even_one_image_fits(gpu, monkeypatch):
    monkeypatch.setattr(batch_size, '_peak_of_steps', lambda cfg, batch: 79)
    with refused('batch-size-none-fits'):
        batch_size.find(None)


def test_other_errors_are_not_taken_for_memory(gpu, monkeypatch):
    def broken(cfg, batch):
        raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')

    monkeypatch.setattr(batch_size, '_peak_of_steps', broken)
    with pytest.raises(RuntimeError, match='mat1'):
        batch_size.find(None)


def test_without_a_gpu(monkeypatch, cfg):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with refused('batch-size-no-gpu'):
        batch_size.find(cfg)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_a_batch_that_is_found_trains(cfg, site):
    with inside(site):
        size = batch_size.find(cfg)
        batch = batch_size.worst_batch(batch_size.worst_samples(cfg), size)
        batch_size.train_steps(cfg, batch, 'cuda')
    assert size >= 1
