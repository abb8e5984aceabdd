"""What the tests of the training path share: a small site to work in and a way to run the tools."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmfinetune.config import load
from mmfinetune.data import demo
from mmfinetune.utils.files import sha256_of
from tests.builders import voc

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / 'configs'
TOOLS = REPO / 'tools'
DEVKIT = Path('data/demo/VOCdevkit/VOC2012')
TRAIN_IMAGES, VAL_IMAGES = 8, 4
EPOCH_STEPS = 2  # 8 images / batch of 4

# The real demo config, only less of it: every part of the path runs, in seconds.
TINY = """
_base_ = {base!r}
work_dir = {work_dir!r}
demo_data = dict(num_train={train}, num_val={val})
_resize = dict(type='Resize', scale=({side}, {side}), keep_ratio=True)
_annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
train_pipeline = [dict(type='LoadImage'), _annotations, _resize,
                  dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]
test_pipeline = [dict(type='LoadImage'), _resize, _annotations,
                 dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape',
                                                       'img_shape', 'scale_factor'))]
_in_process = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**_in_process, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(**_in_process, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs={epochs})
param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=2)]
# Hardly trained heads score below the usual threshold, and two empty lists prove nothing.
model = dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))
test_evaluator = dict(outfile_prefix='predictions')
default_hooks = dict(logger=dict(interval=1), visualization=dict(num_images=3))
"""


def read_results(work_dir: Path) -> dict:
    """What a test wrote into the work dir of its run."""
    return json.loads((work_dir / 'test_results.json').read_text())


@dataclass
class Outcome:
    """How a tool ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str | None:
        """The code of the error it ended with, as in ``error[CODE]: …``."""
        found = re.search(r'^error\[([a-z0-9-]+)\]: ', self.err, re.MULTILINE)
        return found and found.group(1)

    def last_lines(self, count: int = 2) -> list[str]:
        return self.out.strip().splitlines()[-count:]


def write_tiny_config(
    path: Path,
    base: str = 'mask_rcnn_demo.py',
    work_dir: str = 'work_dirs/tiny',
    epochs: int = 2,
    side: int = 96,
    weights: Path | str | None = None,
    extra: str = '',
) -> Path:
    """A config file that inherits one of the repository's and takes seconds.

    Args:
        path: The file.
        base: Name in ``configs/``.
        work_dir: Default work dir of the config.
        epochs: Training epochs.
        side: Image side in pixels.
        weights: Replaces the config's checkpoint.
        extra: More config text, put last.
    """
    text = TINY.format(
        base=str(CONFIGS / base), work_dir=work_dir, train=TRAIN_IMAGES, val=VAL_IMAGES, side=side, epochs=epochs
    )
    if weights is not None:
        text += f'weights = dict(checkpoint={str(weights)!r})\n'
    path.write_text(text + extra)
    return path


@functools.cache
def random_state_dict(name: str = 'mask_rcnn_demo_pretrain.py') -> dict:
    """The state dict of a config's model, freshly initialised. Not to be changed."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    cfg = load.load(CONFIGS / name)
    init_default_scope('mmdet')
    torch.manual_seed(1)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    forget_runs()
    with contextlib.redirect_stdout(io.StringIO()):
        model.init_weights()  # logs every tensor
    forget_runs()
    return {k: v.clone() for k, v in model.state_dict().items()}


def save_hashed(content: object, stem: Path) -> Path:
    """Save like the model zoos do: the SHA-256 prefix ends the name."""
    import torch

    stem.parent.mkdir(parents=True, exist_ok=True)
    part = stem.with_name(stem.name + '.part')
    torch.save(content, part)
    target = stem.with_name(f'{stem.name}-{sha256_of(part)[:8]}.pth')
    part.replace(target)
    return target


def make_site(folder: Path, data: bool = True) -> Path:
    """A working folder: ``tiny.py``, ``pretrain/`` with 80-class weights, and the demo data.

    Returns:
        The weights file, relative to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = save_hashed(
        {'meta': {}, 'state_dict': random_state_dict()}, folder / 'pretrain' / 'tiny_coco80'
    ).relative_to(folder)
    write_tiny_config(folder / 'tiny.py', weights=weights)
    if data:
        devkit = demo.make_voc(folder / 'data/demo', TRAIN_IMAGES, VAL_IMAGES, progress=False)
        voc.convert(devkit, devkit / 'annotations', workers=1, progress=False)
    return weights


@dataclass
class FinishedRun:
    """A site in which the training tool has run once.

    Attributes:
        folder: The site.
        outcome: How the tool ended.
        weights: The file it started from.
        work_dir: Of the run.
        kept: A copy of ``work_dirs/`` and of the predictions as the run left them.
    """

    folder: Path
    outcome: Outcome
    weights: Path
    work_dir: Path
    kept: Path


def finish_run(folder: Path) -> FinishedRun:
    """Train and test the tiny config; its data are made on the way."""
    weights = make_site(folder, data=False)
    with inside(folder):
        outcome = train_tool('tiny.py')
    kept = folder / 'kept'
    shutil.copytree(folder / 'work_dirs', kept)
    for kind in ('bbox', 'segm'):
        shutil.copy(folder / f'predictions.{kind}.json', kept)
    return FinishedRun(folder, outcome, folder / weights, folder / 'work_dirs/tiny', kept)


def copy_site(site: Path, target: Path) -> Path:
    """A copy to spoil; the results of earlier runs stay behind."""
    return Path(shutil.copytree(site, target, ignore=shutil.ignore_patterns('work_dirs'), dirs_exist_ok=True))


def forget_runs() -> None:
    """Empty MMEngine's registers of loggers, message hubs and visualizers.

    They are found again by name, so that a second run in one process would log into the folder of
    the first.
    """
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.utils import ManagerMixin
    from mmengine.visualization import Visualizer

    def visit(cls: type) -> None:
        for child in cls.__subclasses__():
            getattr(child, '_instance_dict', {}).clear()
            visit(child)

    assert issubclass(MMLogger, ManagerMixin) and issubclass(MessageHub, ManagerMixin)
    assert issubclass(Visualizer, ManagerMixin)
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()
    visit(ManagerMixin)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder: ``data/``, ``pretrain/`` and ``work_dirs/`` are relative to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def drive(tool: str, *args: str | Path) -> Outcome:
    """Run a tool as the command line does, but in this process: importing mmdet takes seconds."""
    forget_runs()
    return drive_next(tool, *args)


def drive_next(tool: str, *args: str | Path) -> Outcome:
    """As `drive`, but of earlier runs in this process nothing is forgotten: as in a notebook."""
    out, err = io.StringIO(), io.StringIO()
    path = TOOLS / f'{tool}.py'
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, 'argv', [str(path), *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name='__main__')
    return Outcome(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def train_tool(*args: str | Path) -> Outcome:
    """``python tools/train_pretrained.py …`` in this process."""
    return drive('train_pretrained', *args)


def spawn(*args: str | Path, timeout: float = 240) -> Outcome:
    """Run ``python …`` as a real process, on one thread; torchrun's processes take no GPU, of which there may be one."""
    hidden = {'CUDA_VISIBLE_DEVICES': ''} if 'torch.distributed.run' in args else {}
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **hidden},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def files_in(folder: Path) -> list[str]:
    """All files below a folder, relative, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())
