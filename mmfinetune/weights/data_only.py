"""MMEngine's readers of files, each replaced through its own register, so that nothing they read can run code.

Where a checkpoint cannot be read as data, MMEngine unpickles whatever it holds; its readers of ``.pkl`` and ``.yaml`` do
that at once. Runner, hooks, MMDetection's models and data sets all read through these.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NoReturn

from mmfinetune.utils.dist import rank0_first
from mmfinetune.utils.errors import UserError
from mmfinetune.weights import find, read

# All that MMEngine has a loader for.
SCHEMES = (
    *('', 'http://', 'https://', 'torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://'),
    *('pavi://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://'),
)


@functools.cache
def install() -> None:
    """Let MMEngine read checkpoints, pickles and YAML as data only, in this process, for good."""
    from mmengine.fileio import PickleHandler, YamlHandler, register_handler
    from mmengine.runner import CheckpointLoader

    CheckpointLoader.register_scheme(SCHEMES, load_from_data_only, force=True)

    @register_handler(['pkl', 'pickle'])
    class NoPickleHandler(PickleHandler):
        def load_from_fileobj(self, *_: Any, **__: Any) -> NoReturn:
            raise UserError('pickle-refused')

    @register_handler(['yaml', 'yml'])
    class SafeYamlHandler(YamlHandler):
        def load_from_fileobj(self, file: Any, **_: Any) -> Any:
            import yaml

            return yaml.load(file, getattr(yaml, 'CSafeLoader', yaml.SafeLoader))


def load_from_data_only(name: str, map_location: Any = None) -> dict:  # noqa: ARG001 - MMEngine's signature
    """What a checkpoint holds, on the CPU, wherever MMEngine would look for it.

    Raises:
        UserError: Missing, damaged, or more than data.
    """
    file, url = address(name)
    path = rank0_first(lambda: find.find_weights(file, url)) if url else Path(file)
    find.verify_file(path)
    loaded = read.load(path)
    if isinstance(loaded.get('meta'), dict):
        loaded['meta'].pop('config', None)  # Runner.resume would run this text as Python
    if name.startswith('mmcls://'):
        # A classifier; what it is loaded into is the backbone.
        tensors = read.state_dict_of(loaded, path).items()
        return {'state_dict': {k.removeprefix('backbone.'): v for k, v in tensors if k.startswith('backbone.')}}
    return loaded


def address(name: str) -> tuple[str, str | None]:
    """The file that MMEngine means by the name of a checkpoint, and where to download it if it is not there.

    Raises:
        UserError: A place that weights cannot be read from, or a model that it does not know.
    """
    from mmengine.runner import checkpoint as known

    scheme, found, rest = str(name).partition('://')
    if not found:
        return str(Path(str(name)).expanduser()), None
    url: str | None = None
    if scheme in ('http', 'https'):
        url = name
    elif scheme in ('torchvision', 'modelzoo'):
        url = known.get_torchvision_models().get(rest)
    elif scheme in ('open-mmlab', 'openmmlab'):
        url = known.get_external_models().get(known.get_deprecated_model_names().get(rest, rest))
    elif scheme == 'mmcls':
        url = known.get_mmcls_models().get(rest)
    if url is None or not find.is_url(url):
        raise UserError('weights-address', address=name)
    return str(find.PRETRAIN_DIR / url.split('?')[0].rstrip('/').rpartition('/')[2]), url
