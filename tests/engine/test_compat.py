"""Each private part and each text of a dependency that the toolkit relies on, provoked for real."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import signal
import socket

import pytest
import torch
from mmdet.evaluation.metrics import CocoMetric
from mmengine.runner import BaseLoop, Runner
from torch.utils.data import DataLoader, Dataset

from mmfinetune.engine import compat
from mmfinetune.utils.errors import UserError
from tests.builders.errors import refused


class Unsendable:
    def __reduce__(self):
        raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')


def test_an_object_that_a_queue_cannot_send():
    queue, seen = multiprocessing.Queue(), []
    before = compat.queues.Queue._on_queue_feeder_error
    try:
        compat.when_not_sent(lambda *facts: seen.append(facts) or facts[0].put('instead'))
        queue.put(Unsendable())
        assert queue.get(timeout=20) == 'instead'
    finally:
        compat.queues.Queue._on_queue_feeder_error = staticmethod(before)
    ((at, error, item),) = seen
    assert at is queue and isinstance(item, Unsendable) and compat.is_out_of_shared_memory(error)


class Deadly(Dataset):
    """A data set whose first image ends, or fails in, the process that reads it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_the_runner_resumes_a_loop_by_these_two_names():
    # ExactTrainLoop is no subclass of MMEngine's.
    text = inspect.getsource(Runner.resume)
    assert 'self.train_loop._epoch = ' in text and 'self.train_loop._iter = ' in text
    assert not hasattr(BaseLoop, '_epoch')


def test_the_runner_takes_resume_from_its_config():
    text = inspect.getsource(Runner.from_cfg)
    assert "cfg.get('resume'" in text and "cfg.get('load_from')" in text


def test_a_killed_worker():
    with pytest.raises(RuntimeError) as caught:
        list(DataLoader(Deadly(), num_workers=1))
    assert compat.is_worker_killed(caught.value)
    # PyTorch's handler raises it again, where the process waits for its children.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def test_a_user_error_of_a_worker_keeps_its_code_and_its_text():
    error = UserError('file-odd', '{path} is odd:', problems=['line {1}', 'line 2'], hint='look at {path}', path='a')
    with refused('file-odd') as caught:
        list(DataLoader(Deadly(error), num_workers=1))
    assert str(caught.value) == str(error)


def test_another_error_of_a_worker_is_not_the_users():
    with pytest.raises(ValueError, match='Caught ValueError in DataLoader worker') as caught:
        list(DataLoader(Deadly(ValueError('x')), num_workers=1))
    assert not compat.is_worker_killed(caught.value)


def test_memory_that_runs_out_on_the_cpu():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert compat.is_out_of_cpu_memory(caught.value)
    assert not compat.is_out_of_cpu_memory(RuntimeError('shape'))


def test_a_port_that_is_taken():
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(torch.distributed.DistNetworkError) as caught:
            torch.distributed.TCPStore('127.0.0.1', port, 2, is_master=True)
    assert compat.is_port_taken(caught.value)


@pytest.mark.parametrize('text', ('Connection closed by peer [10.0.0.2]:2222', 'ncclRemoteError: a peer has gone'))
def test_a_lost_connection(text):
    assert compat.is_connection_lost(f'RuntimeError: {text}') and not compat.is_connection_lost('an error')


def test_the_file_in_which_a_process_leaves_its_error(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

    ours, theirs = tmp_path / 'ours.json', tmp_path / 'theirs.json'
    error = ValueError('a bug')
    compat.write_error_file(ours, 'what to show', error)
    monkeypatch.setenv(compat.ERROR_FILE, str(theirs))
    ErrorHandler().record_exception(error)

    def layout(path) -> dict:
        message = json.loads(path.read_text())['message']
        return {**message, 'extraInfo': message['extraInfo'].keys() - {'seconds'}, 'message': ''}

    assert layout(ours) == layout(theirs)
    assert compat.read_error_file(ours)[1] == 'what to show'
    assert compat.read_error_file(theirs) is None and compat.read_error_file(tmp_path / 'none') is None
    # What torchrun's own summary shows.
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(ours))
    assert failure.message['message'] == 'what to show'


def test_a_metric_has_its_ground_truth(tmp_path):
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps({'images': [{'id': 3}], 'annotations': [], 'categories': [{'id': 1, 'name': 'a'}]}))
    assert compat.truth_of(CocoMetric(ann_file=str(path))).get_img_ids() == [3]
    assert compat.truth_of(CocoMetric()) is None


def test_a_data_set_without_images(tmp_path):
    from mmdet.datasets import CocoDataset

    (tmp_path / 'none.json').write_text(json.dumps({'images': [], 'annotations': [], 'categories': []}))
    with pytest.raises(ValueError, match='array') as caught:
        CocoDataset(ann_file=str(tmp_path / 'none.json'), pipeline=[])
    assert compat.is_empty_dataset(caught.value)
