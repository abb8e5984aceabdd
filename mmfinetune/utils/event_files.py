"""TensorBoard's event files, record by record."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_all, reason_of

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary


def rewrite(folder: Path, keep: Callable[[Event], Sequence[Summary.Value] | None]) -> None:
    """Reduce the event files of a folder; a file that has nothing left, or is not one, is removed.

    Args:
        folder: Folder of the files; it need not exist.
        keep: Gives the values of an event that remain; None removes the event. It is called in the order of time.

    Raises:
        UserError: A file cannot be read or written; all are as they were.
    """
    contents: dict[Path, bytes] = {}
    empty = []
    for path in sorted(folder.glob('events.out.tfevents.*')):  # the time is in their names
        try:
            original = path.read_bytes()
        except OSError as error:
            raise UserError('event-file-unreadable', path=path, why=reason_of(error)) from error
        kept, written = [], 0
        for record, event in read_records(original):
            values = keep(event)
            if values is not None:
                written += not event.file_version
                kept.append(record if len(values) == len(event.summary.value) else _with_values(event, values))
        content = b''.join(kept)
        if not written:
            empty.append(path)
        elif content != original:
            contents[path] = content
    atomic_write_all(contents)
    for path in empty:
        path.unlink()


def read_records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """The records of an event file with what they hold, up to the first that is damaged.

    A record is its length (uint64), the checksum of that (uint32), the event, and its checksum; see
    ``tensorboard.summary.writer.record_writer``. TensorBoard's reader computes all checksums in Python, which takes
    seconds for files with pictures. Here it is only that of the last event, which a killed writer may leave incomplete.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    start = 0
    while start + 16 <= len(data):
        length, checksum = struct.unpack_from('<QI', data, start)
        end = start + 12 + length + 4
        if masked_crc32c(data[start : start + 8]) != checksum or end > len(data):
            return
        content = data[start + 12 : end - 4]
        if end == len(data) and masked_crc32c(content) != struct.unpack('<I', data[-4:])[0]:
            return
        try:
            event = Event.FromString(content)
        except DecodeError:
            return
        yield data[start:end], event
        start = end


def _with_values(event: Event, values: Sequence[Summary.Value]) -> bytes:
    """The record of an event that has only these of its values left."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept = [type(value).FromString(value.SerializeToString()) for value in values]
    del event.summary.value[:]
    event.summary.value.extend(kept)
    out = io.BytesIO()
    RecordWriter(out).write(event.SerializeToString())
    return out.getvalue()
