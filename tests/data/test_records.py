"""What readers hand over."""

from __future__ import annotations

import pickle
from pathlib import Path

from mmfinetune.data.records import Instance, Item, Record


def test_records_go_to_worker_processes():
    record = Record(Path('a.jpg'), 4, 3, [Instance('a', [[0, 0, 1, 0, 1, 1]])], 'train')
    item = Item('a', Path('a.jpg'), (1, 2))
    assert pickle.loads(pickle.dumps((record, item))) == (record, item)
