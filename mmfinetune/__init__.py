"""Fine-tune a COCO-pretrained Mask R-CNN with MMDetection."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys

__version__ = '0.1.0'


class _OpsFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Offers `mmfinetune.models.ops` under the name `mmcv._ext`, of which mmcv takes its ops.

    It is the last finder, so Python asks it only where mmcv was installed without compiled ops.
    It sits here and not in `mmfinetune.models.ops`, so that every process that imports the package
    (a spawned worker does) has the ops without importing torch before it needs them.
    """

    def find_spec(self, fullname, _path=None, _target=None):
        if fullname != 'mmcv._ext':
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, self, origin='mmfinetune.models.ops')

    def exec_module(self, module):
        from mmfinetune.models import ops

        ops.populate_ext_module(module)


def add_ops_finder() -> None:
    """Make `mmcv.ops` importable; a second call changes nothing."""
    # By name: a reload of the package makes a new class, which `isinstance` would not match.
    if not any(type(finder).__name__ == '_OpsFinder' for finder in sys.meta_path):
        sys.meta_path.append(_OpsFinder())


add_ops_finder()

# What a notebook sets for its own environment ends `import matplotlib` in another one.
_backend = os.environ.get('MPLBACKEND', '')
if _backend.startswith('module://') and not importlib.util.find_spec(
    _backend.removeprefix('module://').partition('.')[0]
):
    os.environ['MPLBACKEND'] = 'Agg'
