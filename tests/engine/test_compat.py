"""Private parts of dependencies: each fails here, and only here, when a new version changes it."""

from __future__ import annotations

import json

from mmdet.evaluation.metrics import CocoMetric
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from mmfinetune.engine import compat
from mmfinetune.utils import event_files


def test_a_metric_has_its_ground_truth(tmp_path):
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps({'images': [{'id': 3}], 'annotations': [], 'categories': [{'id': 1, 'name': 'a'}]}))
    assert compat.truth_of(CocoMetric(ann_file=str(path))).get_img_ids() == [3]
    assert compat.truth_of(CocoMetric()) is None


def test_a_closed_writer_opens_its_file_again(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for step in (1, 2):
        compat.write_summary(writer, Summary(value=[Summary.Value(tag='a', simple_value=1)]), step)
        writer.close()
    events = [event for path in tmp_path.iterdir() for event in event_files.read_events(path)]
    assert sorted(event.step for event in events if event.summary.value) == [1, 2]
