"""What lies in the event files of a run, as TensorBoard's own reader has it."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator


def read(folder: Path) -> EventAccumulator:
    """All of a folder, without the reader's limits."""
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(('scalars', 'images', 'tensors'), 0))
    events.Reload()
    return events


def order_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name event files in their order, although they are made within one second."""
    clock = SimpleNamespace(time=itertools.count(1e9).__next__)
    monkeypatch.setattr('tensorboard.summary.writer.event_file_writer.time', clock)


def curves(logs: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of all curves below a folder, by sub-run and tag, e.g. ``val/1_loss/loss``."""
    found = {}
    for run in sorted({path.parent for path in logs.rglob('events.out.tfevents.*')}):
        events, viewer = read(run), PluginEventAccumulator(str(run), tensor_size_guidance={'scalars': 0})
        viewer.Reload()
        for tag in events.Tags()['scalars']:
            found[f'{run.name}/{tag}'] = [(event.step, event.value) for event in events.Scalars(tag)]
            # The readers that other programs use, and that of TensorBoard, which restarts differently.
            assert [event.step for event in viewer.Tensors(tag)] == [step for step, _ in found[f'{run.name}/{tag}']]
    return found


def steps(logs: Path) -> dict[str, list[int]]:
    """The steps of all curves and pictures below a folder, by sub-run and tag."""
    found = {tag: [step for step, _ in points] for tag, points in curves(logs).items()}
    for run in sorted({path.parent for path in logs.rglob('events.out.tfevents.*')}):
        events = read(run)
        found |= {f'{run.name}/{tag}': [event.step for event in events.Images(tag)] for tag in events.Tags()['images']}
    return found


def texts(logs: Path, tag: str) -> list[tuple[int, str]]:
    """Steps and texts of a tag of ``train``."""
    return [
        (e.step, e.tensor_proto.string_val[0].decode()) for e in read(logs / 'train').Tensors(f'{tag}/text_summary')
    ]
