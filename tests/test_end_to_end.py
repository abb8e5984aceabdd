"""Whole runs, minutes long each: `pytest -m slow`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.builders.locales import shell
from tests.builders.runs import (
    CONFIGS,
    DEVKIT,
    REPO,
    TOOLS,
    copy_site,
    files_in,
    make_site,
    random_state_dict,
    read_results,
    save_hashed,
    spawn,
)

pytestmark = pytest.mark.slow

# What the demo's configs and the README promise on the 100 held-out images.
DEMO_AP50 = 0.70
DEMO_GAIN = 0.25
SMALL = (333, 200)  # instead of (1333, 800): an eighth of the time


def _run(*args: str | Path, timeout: float = 1800) -> str:
    """Run the training tool; what it printed."""
    outcome = spawn(TOOLS / 'train_pretrained.py', *args, timeout=timeout)
    assert outcome.code == 0, outcome.err[-3000:]
    return outcome.out


def _losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r'  loss: (\S+)', text)]


@pytest.fixture(scope='module')
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the bundled weights; both demo runs draw their data once."""
    folder = tmp_path_factory.mktemp('demo')
    (folder / 'pretrain').mkdir()
    for file in (REPO / 'pretrain').glob('mask_rcnn_demo_*.pth'):
        shutil.copy(file, folder / 'pretrain')
    return folder


@pytest.fixture(scope='module')
def pretrained_ap50(demo_folder: Path) -> float:
    from mmfinetune.config import load

    checkpoint = Path(load.load(CONFIGS / 'mask_rcnn_demo.py').weights.checkpoint)
    if not (REPO / checkpoint).is_file():
        pytest.skip(f'{checkpoint} is not there; the config says how to make it')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(demo_folder)
        # As `make demo` does.
        out = _run(CONFIGS / 'mask_rcnn_demo.py', '--check-weights', '--train', '--test')
        assert 'OK: these weights can be used for training.' in out
        lines = out.splitlines()
        assert len(lines) <= 55 and max(map(len, lines)) <= 100 and len([x for x in lines if x[:6] == 'Epoch ']) == 3
    work_dir = demo_folder / 'work_dirs/demo'
    assert len(list(work_dir.glob('figures/*.png'))) == 8
    return read_results(work_dir)['metrics']['coco/segm_mAP_50']


def test_demo_reaches_what_it_promises(pretrained_ap50):
    assert pretrained_ap50 >= DEMO_AP50, f'coco/segm_mAP_50 is {pretrained_ap50:.3f}'


def test_demo_is_far_above_random_weights(pretrained_ap50, demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    _run(CONFIGS / 'mask_rcnn_demo_scratch.py')
    scratch = read_results(demo_folder / 'work_dirs/demo_scratch')['metrics']['coco/segm_mAP_50']
    assert pretrained_ap50 - scratch >= DEMO_GAIN, (
        f'coco/segm_mAP_50 is {pretrained_ap50:.3f}, from random weights {scratch:.3f}'
    )


def _copy_devkit(source: Path, folder: Path, limit: int = 0) -> None:
    """Copy the real devkit, since the annotations are written into it.

    Args:
        source: Folder of the real data.
        folder: Working folder of the run.
        limit: Images of each split, for a quick look; 0 takes all.
    """
    devkit = folder / 'data/VOCdevkit/VOC2012'
    shutil.copytree(source / 'voc2012_real/VOCdevkit/VOC2012', devkit)
    for split in ('train', 'val') if limit else ():
        names = devkit / f'ImageSets/Segmentation/{split}.txt'
        names.write_text('\n'.join(names.read_text().split()[:limit]) + '\n')


def test_r50_on_real_images(real_data, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    _copy_devkit(real_data, tmp_path, int(os.environ.get('MMFINETUNE_TEST_IMAGES', 0)))
    # All keys and shapes of the official 80-class file; the numbers are random.
    state = dict(random_state_dict('mask_rcnn_voc_pretrained.py'))
    for key in ('bbox_head.fc_cls', 'bbox_head.fc_reg', 'mask_head.conv_logits'):
        rows = {'fc_cls': 81, 'fc_reg': 320, 'conv_logits': 80}[key.split('.')[1]]
        for name in (f'roi_head.{key}.weight', f'roi_head.{key}.bias'):
            state[name] = torch.zeros(rows, *state[name].shape[1:])
    weights = save_hashed({'meta': {}, 'state_dict': state}, tmp_path / 'pretrain/official_like')
    scales = [
        f'{loader}_dataloader.dataset.pipeline.{step}.scale={SMALL}'.replace(' ', '')
        for loader, step in (('train', 3), ('val', 1), ('test', 1))
    ]
    out = _run(
        CONFIGS / 'mask_rcnn_voc_pretrained.py',
        '--weights',
        weights,
        '--cfg-options',
        *scales,
        'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
        '--verbose',
    )
    losses = _losses(out)
    assert losses and all(math.isfinite(loss) for loss in losses), losses
    work_dir = tmp_path / 'work_dirs/mask_rcnn_pretrained'
    files = files_in(work_dir)
    assert {'epoch_1.pth', 'last_checkpoint', 'test_results.json'} <= set(files)
    assert any(f.startswith('best_') for f in files)
    assert any(f.startswith('tensorboard_logs/mask_rcnn_pretrained/train/events') for f in files)
    assert any(f.startswith('figures/') for f in files)
    metrics = read_results(work_dir)['metrics']
    assert 0 <= metrics['coco/segm_mAP'] <= metrics['coco/segm_mAP_50'] <= 1


def test_a_mistake_under_torchrun_ends_all_processes(tmp_path, monkeypatch):
    make_site(tmp_path / 'made')
    monkeypatch.chdir(copy_site(tmp_path / 'made', tmp_path / 'site'))
    (DEVKIT / 'JPEGImages/demo_train_0002.jpg').unlink()
    # The check runs on one process; the other must not wait for it for ever.
    outcome = spawn(
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        TOOLS / 'train_pretrained.py',
        'tiny.py',
        timeout=120,
    )
    assert outcome.code != 0
    assert 'image-missing' in outcome.err and 'demo_train_0002.jpg' in outcome.err
    assert not list(Path('work_dirs').rglob('*.pth'))


@pytest.mark.parametrize('coding', ['gbk', 'latin-1'])
def test_class_names_in_a_locale_that_is_not_utf8(demo_folder, tmp_path, monkeypatch, coding):
    monkeypatch.chdir(demo_folder)
    for name, value in shell(coding, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('PYTHONIOENCODING', 'utf-8')  # as the outcome is read
    names, rng = ('größe', 'nut'), np.random.default_rng(0)
    images, annotations = [], []
    (tmp_path / 'src/images').mkdir(parents=True)
    for k in range(16):
        pixels = rng.integers(0, 60, (96, 96, 3), np.uint8)
        x, y = rng.integers(4, 52, 2).tolist()
        pixels[y : y + 40, x : x + 40, k % 2] = 250
        Image.fromarray(pixels).save(tmp_path / f'src/images/{k}.png')
        images.append({'id': k, 'file_name': f'{k}.png', 'width': 96, 'height': 96})
        outline = [x, y, x + 40, y, x + 40, y + 40, x, y + 40]
        annotations.append({'id': k + 1, 'image_id': k, 'category_id': k % 2 + 1, 'segmentation': [outline]})
    categories = [{'id': k, 'name': name} for k, name in enumerate(names, 1)]
    for split, where in (('train', slice(0, 12)), ('val', slice(12, 16))):
        part = {'images': images[where], 'annotations': annotations[where], 'categories': categories}
        (tmp_path / f'src/{split}.json').write_text(json.dumps(part, ensure_ascii=False), encoding='utf-8')
    new = ('--base', CONFIGS / 'mask_rcnn_demo.py', '--epochs', '10')
    for args in (
        ('prepare_data.py', tmp_path / 'src', tmp_path / 'out'),
        ('check_dataset.py', tmp_path / 'out'),
        ('new_config.py', '--data-root', tmp_path / 'out', '--name', 'x', '--out', tmp_path / 'x.py', *new),
        ('train_pretrained.py', tmp_path / 'x.py', '--work-dir', tmp_path / 'run'),
        ('predict.py', '--run', tmp_path / 'run', tmp_path / 'src/images', '--out', tmp_path / 'pred'),
    ):
        outcome = spawn(TOOLS / args[0], *args[1:], timeout=600)
        assert outcome.code == 0, outcome.err[-3000:]
    metrics = read_results(tmp_path / 'run')['metrics']
    assert {name: metrics[f'coco/segm_AP/{name}'] > 0.3 for name in names} == dict.fromkeys(names, True), metrics
    assert all(path.read_bytes().isascii() for path in (tmp_path / 'pred').glob('*.json'))
