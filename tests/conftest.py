"""What several test files share: paths, loaded configs, and the slow things made once."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from mmfinetune.config import load as config_load
from tests.builders.runs import FinishedRun, copy_site, finish_run, make_site

ROOT = Path(__file__).parents[1]
# The same examples each time, so that a change is what makes a test fail. HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile('steady', derandomize=True, deadline=None)
hypothesis.settings.register_profile('search', deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'steady'))
# nohup has it ignored, here and in the processes that tests start, which then wait for it for ever.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope='session', autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep checks of made data sets out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(scope='session', autouse=True)
def strict_results() -> Iterator[None]:
    """Let a run fail where it cannot write its results, of which it only warns otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMFINETUNE_STRICT_RESULTS', '1')
        yield


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Take back what a test's code sets: a rank or a port would make the next one join a group."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope='session')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config, weights and data; tests put results into work dirs of their own, and change nothing else."""
    folder = tmp_path_factory.mktemp('site')
    make_site(folder)
    return folder


@pytest.fixture
def in_site(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(site)
    return site


@pytest.fixture
def own_site(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the site that a test may damage."""
    monkeypatch.chdir(copy_site(site, tmp_path))
    return tmp_path


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """One run of the training tool by default, from config and weights only, for all that only look at one."""
    return finish_run(tmp_path_factory.mktemp('finished'))


@pytest.fixture
def in_finished_run(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> FinishedRun:
    monkeypatch.chdir(finished_run.folder)
    return finished_run


@pytest.fixture(scope='session')
def configs_dir() -> Path:
    return ROOT / 'configs'


@pytest.fixture(scope='session')
def real_data() -> Path:
    """Real images, which the repository must not hold."""
    folder = os.environ.get('MMFINETUNE_REAL_DATA')
    if not folder:
        pytest.skip('MMFINETUNE_REAL_DATA does not name a folder with real images')
    return Path(folder)


@pytest.fixture(scope='session')
def loaded(configs_dir: Path) -> Callable:
    """Loads a config of the repository by its name; do not change what it returns."""
    cache = {}

    def load(name: str):
        if name not in cache:
            cache[name] = config_load.load(configs_dir / name)
        return cache[name]

    return load


@pytest.fixture(scope='session')
def voc_cfg(loaded: Callable):
    """The resolved main config; do not change it."""
    return loaded('mask_rcnn_voc_pretrained.py')


@pytest.fixture(scope='session')
def build_model(voc_cfg) -> Callable:
    """Builds the 20-class Mask R-CNN of the main config, with PyTorch's own random start."""

    def build():
        from mmdet.registry import MODELS

        # A copy, since mmdet's detectors write into the config they are built from.
        return MODELS.build(copy.deepcopy(voc_cfg.model))

    return build


@pytest.fixture(scope='session')
def official_like(voc_cfg, tmp_path_factory) -> Path:
    """A file with the keys, shapes and meta of the zoo's 80-class Mask R-CNN R50-FPN.

    The numbers are random, so that no tensor can be right by chance (BN starts at 0 and 1).
    """
    import mmdet
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config

    base = Path(mmdet.__file__).parent / '.mim/configs/_base_/models/mask-rcnn_r50_fpn.py'
    model_cfg = Config.fromfile(base).model
    model_cfg.backbone.init_cfg = None
    model_cfg['_scope_'] = 'mmdet'  # there is no Runner here to set the default scope
    tensors = MODELS.build(model_cfg).state_dict()
    generator = torch.Generator().manual_seed(80)
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
        else:
            tensor.fill_(7)
    path = tmp_path_factory.mktemp('official') / 'mask_rcnn_r50_fpn_1x_coco.pth'
    torch.save(
        {'meta': {'mmdet_version': '2.0.0', 'epoch': 12, 'CLASSES': ('person', 'bicycle')}, 'state_dict': tensors}, path
    )
    return path
