"""What libraries raise while they build parts of a config, as a message."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from mmfinetune.utils.errors import Message, Stopped, UserError


@contextlib.contextmanager
def building(part: str) -> Iterator[None]:
    """Raise what a setting makes a library raise as a UserError that names the setting."""
    try:
        yield
    except Exception as error:
        # Memory is not the setting's fault alone; PyTorch's error is told by name, as nothing here imports it.
        if isinstance(error, (UserError, Stopped)) or type(error).__name__ == 'OutOfMemoryError':
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f'{"/".join(Path(last.filename).parts[-3:])}:{last.lineno}'
        # A KeyError's text is the repr of its message, and MMEngine's registries add advice on their own code.
        text = str(error.args[0] if len(error.args) == 1 and isinstance(error, KeyError) else error)
        why = text.partition(' Please check whether')[0].strip()
        facts = {'part': part, 'kind': type(error).__name__, 'why': why, 'place': place}
        raise UserError('config-cannot-build', problems=[Message('config-part', **facts)]) from error
