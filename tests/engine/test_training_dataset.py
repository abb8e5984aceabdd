"""Randomness of each sample, and replaced images."""

from __future__ import annotations

import json
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmfinetune.engine.training_dataset import TrainingDataset, read_faults, seed_step
from mmfinetune.utils.errors import UserError
from tests.builders.errors import refused


class Draws:
    """A data set whose samples are what the three generators draw."""

    metainfo: ClassVar = {'classes': ('a',)}

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple:
        if index in self.bad:
            raise UserError('toy-image', '{file} cannot be read', file=f'img{index}.jpg')
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def collate(rows):
    return rows


def read(dataset, workers: int, epoch: int, order=range(6)) -> list[tuple]:
    dataset.set_epoch(epoch)
    loader = DataLoader(dataset, sampler=list(order), batch_size=1, num_workers=workers, collate_fn=collate)
    return sorted(row for batch in loader for row in batch)


def test_draws_depend_on_seed_epoch_and_sample_only(tmp_path):
    dataset = TrainingDataset(Draws(), 7, str(tmp_path), 0)
    here = read(dataset, 0, 3)
    assert read(dataset, 2, 3, (5, 3, 4, 0, 2, 1)) == here
    assert read(TrainingDataset(Draws(), 7, str(tmp_path), 0), 1, 3) == here
    assert read(dataset, 0, 4) != here
    assert read(TrainingDataset(Draws(), 8, str(tmp_path), 0), 0, 3) != here
    assert len({row[1] for row in here}) == 6


def test_living_workers_see_the_next_epoch(tmp_path):
    dataset = TrainingDataset(Draws(), 0, str(tmp_path), 0)
    loader = DataLoader(dataset, batch_size=1, num_workers=2, persistent_workers=True, collate_fn=collate)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(sorted(row for batch in loader for row in batch))
    assert epochs == [read(dataset, 0, epoch) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_state_of_the_main_process_is_kept(tmp_path):
    dataset = TrainingDataset(Draws(), 0, str(tmp_path), 0)
    seed_step(0, 1)
    expected = random.random(), np.random.rand(), torch.rand(())
    seed_step(0, 1)
    dataset[2]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_steps_draw_different_numbers():
    drawn = set()
    for step in range(50):
        seed_step(0, step)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 50


def test_faulty_image_is_replaced_and_noted_once(tmp_path):
    dataset = TrainingDataset(Draws(bad=(1, 4)), 0, str(tmp_path), 2)
    rows = [dataset[i] for i in (1, 4, 1, 0)]
    assert not {1, 4} & {row[0] for row in rows}
    assert rows[0] == rows[2]
    faults = read_faults(tmp_path / 'faulty_images_rank0.jsonl')
    assert [f['index'] for f in faults] == [1, 4]
    assert faults[0]['problem'] == 'img1.jpg cannot be read'


@pytest.mark.parametrize('workers', (0, 2))
def test_too_many_faults_stop_the_run_with_the_list(tmp_path, workers):
    dataset = TrainingDataset(Draws(bad=(1, 2, 4)), 0, str(tmp_path), 2)
    with refused('train-faulty-images') as caught:
        read(dataset, workers, 0)
    assert [index for index in range(6) if f'img{index}.jpg' in str(caught.value)] == [1, 2, 4]


def test_line_cut_by_a_kill_is_no_fault(tmp_path):
    path = tmp_path / 'f.jsonl'
    path.write_text(json.dumps({'index': 1}) + '\n{"index": 2, "pr')
    assert read_faults(path) == [{'index': 1}]


def test_attributes_are_those_of_the_data_set(tmp_path):
    dataset = TrainingDataset(Draws(), 0, str(tmp_path), 0)
    assert dataset.metainfo == {'classes': ('a',)} and len(dataset) == 6
    with pytest.raises(AttributeError):
        dataset.nothing  # noqa: B018
