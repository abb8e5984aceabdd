"""Configs written for your own data: their numbers, their form, and that they run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mmfinetune.config import flatten, load, new, sizing
from mmfinetune.data import statistics as data_statistics
from mmfinetune.data.layout import Prepared
from mmfinetune.data.statistics import Statistics
from tests.builders.errors import refused
from tests.builders.runs import CONFIGS, REPO, drive, files_in, inside, train_tool

VOC = CONFIGS / 'mask_rcnn_voc_pretrained.py'
DEMO = CONFIGS / 'mask_rcnn_demo.py'
SHORT = 45  # lines
# Class names that have broken one writer of Python text or another.
AWKWARD = ["it's", 'say "hi"', 'a\\nb\\', 'schwarz/weiß 黒', '{x}', 'new\nline', ' ', '# no', '🙂', "'''", '%s', 'a, b']


def rectangle(image: int, label: int, box: tuple[float, ...], number: int, **extra) -> dict:
    x, y, w, h = box
    return {
        'id': number,
        'image_id': image,
        'category_id': label,
        'iscrowd': 0,
        'bbox': list(box),
        'area': w * h,
        'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]],
        **extra,
    }


def make_data(
    root: Path,
    classes: list[str],
    splits: dict[str, int],
    size: tuple[int, int] = (96, 64),
    objects: tuple[int, int] = (20, 30),
    each: int = 1,
    empty: int = 0,
    draw: bool = True,
) -> Path:
    """A prepared folder with bright rectangles on noise.

    Args:
        root: The folder.
        classes: Category names.
        splits: Number of images with objects of each split.
        size: Of the images, px.
        objects: Width and height of objects, px.
        each: Objects in an image.
        empty: Training images without objects, beside.
        draw: Whether to make images, or the JSON only.
    """
    rng = random.Random(0)
    noise = np.random.default_rng(0)
    (root / 'annotations').mkdir(parents=True)
    for split, count in splits.items():
        images, annotations = [], []
        for i in range(1, count + (empty if split == 'train' else 0) + 1):
            name = f'{split}/{i:03d}.png'
            images.append({'id': i, 'file_name': name, 'width': size[0], 'height': size[1]})
            picture = Image.fromarray(noise.integers(0, 60, (*size[::-1], 3), np.uint8)) if draw else None
            for k in range(each if i <= count else 0):
                label = (i + k) % len(classes) + 1
                x, y = rng.randint(0, size[0] - objects[0]), rng.randint(0, size[1] - objects[1])
                annotations.append(rectangle(i, label, (x, y, *objects), len(annotations) + 1))
                if picture:
                    ImageDraw.Draw(picture).rectangle(
                        (x, y, x + objects[0] - 1, y + objects[1] - 1),
                        fill=[(255, 80, 0), (0, 200, 255), (255, 255, 255)][label % 3],
                    )
            if picture:
                (root / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
                picture.save(root / 'images' / name)
        (root / f'annotations/instances_{split}.json').write_text(
            json.dumps(
                {
                    'images': images,
                    'annotations': annotations,
                    'categories': [{'id': i + 1, 'name': c} for i, c in enumerate(classes)],
                }
            )
        )
    return root


@pytest.fixture(scope='module')
def tiles(tmp_path_factory) -> Path:
    """12 + 4 + 4 images of 2 classes. Not to be changed."""
    return make_data(tmp_path_factory.mktemp('data') / 'tiles', ['dot', 'Riß'], {'train': 12, 'val': 4, 'test': 4})


def made(root: Path, tmp_path: Path, base: Path = VOC, **options):
    """Write a config and load it."""
    out = tmp_path / 'made.py'
    _, lines = new.write(root, 'made', out, base, overwrite=True, **options)
    return load.load(out), out.read_text(encoding='utf-8'), '\n'.join(lines)


def statistics(sizes: list[tuple[int, int]], objects: list[float], **changes) -> Statistics:
    """All objects in the first image."""
    values = dict(
        classes=('a',),
        images={'train': len(sizes), 'val': 1},
        with_objects=len(sizes),
        usable=len(sizes),
        per_class=np.array([len(sizes)]),
        sizes=np.array(sizes, float),
        objects=np.array(objects, float),
        image_of=np.zeros(len(objects), int),
        most_objects=1,
        first_image='a.jpg',
    )
    return Statistics(**{**values, **changes})


def scale_of(size: tuple[int, int], objects: list[float], base=(1333, 800), anchors=(8,)):
    return sizing.plan_scale(statistics([size], objects), base, list(anchors), [4, 8, 16, 32, 64])


# ---- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('size', 'objects', 'expected'),
    [
        # 100 px objects need no enlargement; the images' own size is a multiple of 32.
        ((640, 480), [100], (640, 480)),
        # 20 px objects want 32/20 of it: 1024 x 768.
        ((640, 480), [20], (1024, 768)),
        # 8 px ones want 4 times as much, but the base's 800 px short side is the limit: 1067 -> 1056.
        ((640, 480), [8], (1056, 800)),
        # Photographs of large objects: as COCO.
        ((4000, 3000), [1000], (1056, 800)),
        # 90 px objects want 32/90 of 4000 = 1422 px.
        ((4000, 3000), [90], (1408, 1056)),
        # 40 px objects want 3200 px: twice the pixels of 1333 x 800 is the limit, 1686 px.
        ((4000, 3000), [40], (1696, 1280)),
        # Thumbnails are enlarged to 256 px, no further.
        ((64, 64), [40], (256, 256)),
        ((3000, 4000), [1000], (1056, 800)),  # the box has no orientation
        ((2000, 20), [15], (1984, 32)),
    ],
)
def test_input_size(size, objects, expected):
    assert scale_of(size, objects).size == expected


def test_input_size_follows_nine_of_ten_objects_and_their_own_image():
    # Objects of 5 % of the long side, in images of two sizes; one speck decides nothing.
    many = statistics(
        [(1000, 1000), (200, 200)], [50] * 10 + [10] * 10 + [1], image_of=np.array([0] * 10 + [1] * 10 + [1])
    )
    scale = sizing.plan_scale(many, (1333, 800), [8], [4, 8, 16, 32, 64])
    assert scale.size == (640, 640)
    assert '32 px (smallest anchor) / 0.05 = 640 px' in scale.why


def test_arithmetic_of_the_input_size_is_told():
    assert scale_of((4000, 3000), [40]).why == (
        '9 of 10 objects span 0.01 of the long side or more: 32 px (smallest anchor) / 0.01 = '
        '3,200 px, kept between 4,000 (the images) and 1,067 (the base), at most 1,686 for memory; '
        'short / long = 0.75; multiples of 32.'
    )
    assert 'but 256 at least' in scale_of((64, 64), [40]).why


@pytest.mark.parametrize(
    ('size', 'objects', 'anchors'),
    [
        ((640, 480), [100], None),
        ((4000, 3000), [40], None),
        # 12 px of 4000 are 5 px at 1696: anchors of 16 px are within a factor of 4, of 8 within 2.
        ((4000, 3000), [12], [2]),
        ((4000, 3000), [20], [4]),
        # Small and large objects: no scale suits both, COCO's stays.
        ((4000, 3000), [12] * 5 + [3000] * 5, None),
    ],
)
def test_anchors_follow_where_all_objects_are_tiny(size, objects, anchors):
    scale = scale_of(size, objects)
    assert scale.anchors == anchors
    assert ('Anchors x' in scale.why) == (anchors is not None)


def test_anchors_grow_with_huge_objects():
    scale = scale_of((224, 224), [220], base=(1333, 800), anchors=(1,))
    assert scale.anchors == [2]  # 4 to 64 px for objects of 251 px: 8 to 128 px


def plan(
    images: int, batch: int = 2, base_epochs: int = 40, epochs: int | None = None, val: int = 10
) -> sizing.Schedule:
    schedulers = [
        dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
        dict(type='MultiStepLR', by_epoch=True, begin=0, end=40, milestones=[25, 35], gamma=0.1, _scope_='mmdet'),
    ]
    return sizing.plan_schedule(images, val, batch, base_epochs, schedulers, epochs)


@pytest.mark.parametrize(
    ('images', 'epochs'),
    [
        (1464, 40),  # VOC itself: 29,280 steps
        (200, 40),  # 4,000 steps
        (56, 54),  # 28 x 54 = 1,512 steps
        (1, 1500),
        (2000, 30),  # 1000 x 30 = 30,000 steps
        (118_000, 12),
    ],
)  # COCO: the model zoo's 1x
def test_epochs(images, epochs):
    assert plan(images).epochs == epochs


def test_a_short_base_is_not_made_longer_than_it_needs():
    assert plan(1500, 4, base_epochs=3).epochs == 4  # 375 x 4 = 1,500
    assert plan(40_000, 4, base_epochs=3).epochs == 3  # 30,000 steps


def test_schedule_of_a_small_data_set():
    schedule = plan(56)
    assert schedule.steps == 28
    linear, steps = schedule.schedulers
    assert linear['end'] == 28
    assert steps == dict(type='MultiStepLR', by_epoch=True, begin=0, end=54, milestones=[34, 47], gamma=0.1)
    assert schedule.val_interval == 2  # 27 validations
    assert schedule.why == ('56 images / 2 = 28 steps an epoch; 54 epochs (base: 40, to reach 1,500) = 1,512 steps')


def test_schedule_of_a_large_data_set():
    schedule = plan(118_000)
    assert [s['end'] for s in schedule.schedulers] == [500, 12]
    assert schedule.schedulers[1]['milestones'] == [8, 10]
    assert 'no fewer than 12' in schedule.why


def test_validation_is_the_lesser_part():
    assert plan(100, val=300).val_interval == 3
    assert plan(1, val=2).val_interval == 38  # 1500 epochs of one image: 40 validations


def test_one_step_an_epoch_keeps_the_learning_rate():
    """A LinearLR of one step would leave it at a thousandth for good."""
    import torch
    from mmengine.optim import LinearLR

    linear = plan(1, epochs=1).schedulers[0]
    assert linear['end'] == 2
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = LinearLR(optimizer, **{k: v for k, v in linear.items() if k != 'type'})
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(0.5)
    assert plan(1, epochs=1).schedulers == [linear]  # no milestone fits into one epoch


def test_a_base_with_another_schedule_is_refused(tiles, tmp_path):
    with refused('sizing-schedulers') as caught:
        made(tiles, tmp_path, CONFIGS / 'mask_rcnn_demo_pretrain.py')
    assert [problem.facts for problem in caught.value.problems] == [{'type': 'OneCycleLR', 'unit': 'step'}]


# ---- The file -----------------------------------------------------------------------------------


def test_the_config_is_short_and_complete(tiles, tmp_path):
    cfg, text, notes = made(tiles, tmp_path)
    lines = text.splitlines()
    assert len(lines) < SHORT
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= new.WIDTH
    assert lines[1] == f'# Run:     python tools/train_pretrained.py {tmp_path / "made.py"}'
    assert lines[2].startswith('# Expect:')
    assert cfg.work_dir == 'work_dirs/made'
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.metainfo.classes == ('dot', 'Riß')
        assert dataset.data_root == f'{tiles}/'
        assert dataset.ann_file == f'annotations/instances_{split}.json'
        assert dataset.data_prefix.img == 'images/'
        assert [s['scale'] for s in dataset.pipeline if s['type'] == 'Resize'] == [(256, 160)]
    assert cfg.val_evaluator.ann_file == f'{tiles}/annotations/instances_val.json'
    assert cfg.test_evaluator.ann_file == f'{tiles}/annotations/instances_test.json'
    assert cfg.model.roi_head.bbox_head.num_classes == 2
    assert cfg.model.roi_head.mask_head.num_classes == 2
    # 12 images / 2 = 6 steps: 250 epochs are 1,500.
    assert cfg.train_cfg.max_epochs == 250
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 7
    assert cfg.default_hooks.logger.interval == 6
    assert cfg.param_scheduler[1].milestones == [156, 219]
    assert '250 epochs' in notes
    # All else is the base's.
    base = load.load(VOC)
    for key in ('weights', 'optim_wrapper', 'custom_hooks', 'visualizer', 'randomness'):
        assert cfg[key] == base[key]


def test_without_a_test_split_val_is_tested(tmp_path):
    root = make_data(tmp_path / 'd', ['a'], {'train': 4, 'val': 2})
    cfg, text, _ = made(root, tmp_path)
    assert len(text.splitlines()) < SHORT
    assert cfg.test_dataloader.dataset.ann_file == 'annotations/instances_val.json'
    assert cfg.test_evaluator.ann_file == cfg.val_evaluator.ann_file
    assert cfg.test_dataloader.dataset.metainfo.classes == ('a',)  # a tuple, not its letters


def test_the_demo_base_keeps_its_model_and_draws_nothing(tiles, tmp_path):
    cfg, text, _ = made(tiles, tmp_path, DEMO, batch_size=2)
    demo = load.load(DEMO)
    assert len(text.splitlines()) < SHORT
    assert not cfg.demo_data
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.model.backbone == demo.model.backbone
    assert cfg.weights == demo.weights
    assert cfg.optim_wrapper.optimizer.lr == 0.02
    # Milestone 2 of 3 epochs.
    assert cfg.train_cfg.max_epochs == 250
    assert cfg.param_scheduler[1].milestones == [167]


def test_class_names_survive(tmp_path):
    cfg, _, _ = made(make_data(tmp_path / 'd', AWKWARD, {'train': 3, 'val': 1}), tmp_path)
    assert list(cfg.train_dataloader.dataset.metainfo.classes) == AWKWARD
    cfg.dump(tmp_path / 'dumped.py')
    flat = tmp_path / 'flat.py'
    flat.write_text(flatten.flatten(tmp_path / 'made.py'), encoding='utf-8')
    for again in (tmp_path / 'dumped.py', flat):
        loaded = load.load(again)
        assert flatten.settings(loaded, True) == flatten.settings(cfg, True)
        assert list(loaded.val_dataloader.dataset.metainfo.classes) == AWKWARD


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.text(max_size=12), min_size=1, max_size=8, unique=True),
    most=st.integers(1, 300),
    empty=st.integers(0, 5),
    flip=st.lists(st.sampled_from(new.FLIPS), max_size=3, unique=True),
    batch_size=st.sampled_from([None, 1, 16]),
    test=st.booleans(),
    side=st.integers(8, 4000),
)
def test_any_config_compiles_and_loads(tmp_path_factory, voc_cfg, names, most, empty, flip, batch_size, test, side):
    found = statistics(
        [(side, side)] * 3,
        [side / 2],
        classes=tuple(names),
        per_class=np.ones(len(names)),
        images={'train': 3 + empty, 'val': 2},
        most_objects=most,
    )
    splits = ('train', 'val', 'test') if test else ('train', 'val')
    places = new.Places('x', str(VOC), 'configs/x.py', 'data/x/', 'images/', splits)
    text, lines = new.compose(voc_cfg, found, places, batch_size=batch_size, flip=flip)
    out = tmp_path_factory.mktemp('made') / 'x.py'
    out.write_text(text, encoding='utf-8')
    assert list(load.load(out).train_dataloader.dataset.metainfo.classes) == names
    assert len(text.splitlines()) < SHORT + len(names) and all(lines)


def test_1000_classes(tmp_path):
    classes = [f'class {i} of many' for i in range(1000)]
    cfg, _, _ = made(make_data(tmp_path / 'd', classes, {'train': 3, 'val': 1}), tmp_path)
    assert list(cfg.test_dataloader.dataset.metainfo.classes) == classes
    assert cfg.model.roi_head.mask_head.num_classes == 1000


def test_everything_at_once_is_still_short(tmp_path):
    root = make_data(
        tmp_path / 'd',
        [f'a class with a long name {i}' for i in range(30)],
        {'train': 40, 'val': 2, 'test': 2},
        (4000, 3000),
        (12, 12),
        each=120,
        empty=20,
        draw=False,
    )
    data = json.loads((root / 'annotations/instances_train.json').read_text())
    data['images'][0]['height'] = 20
    (root / 'annotations/instances_train.json').write_text(json.dumps(data))
    found = data_statistics.gather(Prepared(root).splits())
    places = new.Places('x', str(DEMO), 'configs/x.py', f'{root}/', 'images/', ('train', 'val', 'test'))
    text, _ = new.compose(load.load(DEMO), found, places, batch_size=8, flip=new.FLIPS)
    out = tmp_path / 'x.py'
    out.write_text(text)
    cfg = load.load(out)
    assert len(text.splitlines()) < SHORT + 25  # 30 long names of classes
    assert cfg.model.test_cfg.rcnn.max_per_img == 250
    assert cfg.model.test_cfg.rpn.max_per_img == 500
    assert cfg.model.rpn_head.anchor_generator.scales == [1]
    assert dict(cfg.train_dataloader.dataset.filter_cfg) == {'filter_empty_gt': False, 'min_size': 1}
    assert cfg.train_dataloader.batch_size == 8


@pytest.mark.parametrize(('empty', 'kept', 'steps'), [(0, False, 4), (3, True, 6), (9, False, 4)])
def test_images_without_objects(tmp_path, empty, kept, steps):
    root = make_data(tmp_path / 'd', ['a'], {'train': 8, 'val': 2}, empty=empty)
    cfg, text, _ = made(root, tmp_path)
    assert cfg.train_dataloader.dataset.filter_cfg.filter_empty_gt is not kept
    assert f'= {steps} steps an epoch' in text
    assert ('have no object' in text or 'without annotations' in text) == bool(empty)


def test_steps_are_those_of_the_real_loader(tmp_path):
    """What mmdet leaves out of the training is left out of the count too."""
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    root = make_data(tmp_path / 'd', ['a'], {'train': 9, 'val': 2}, (40, 20), (10, 10), empty=3)
    cfg, text, _ = made(root, tmp_path)
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(dataset) == 12
    assert '12 images / 2 = 6 steps' in text


@pytest.mark.parametrize(
    ('flip', 'prob'), [(['vertical'], [0.5]), (['horizontal', 'vertical', 'diagonal'], [0.25] * 3)]
)
def test_flips(tiles, tmp_path, flip, prob):
    from mmdet.datasets.transforms import RandomFlip

    cfg, text, _ = made(tiles, tmp_path, DEMO, flip=flip)
    assert len(text.splitlines()) < SHORT
    step = cfg.train_dataloader.dataset.pipeline[3]
    assert step == dict(type='RandomFlip', prob=prob, direction=flip)
    transform = RandomFlip(prob=step.prob, direction=step.direction)
    assert {transform._choose_direction() for _ in range(100)} == {None, *flip}


def test_warnings_name_classes_that_cannot_be_learnt(tmp_path):
    root = make_data(tmp_path / 'd', ['a', 'b', 'c', 'd'], {'train': 2, 'val': 1})
    notes = made(root, tmp_path)[2]
    assert 'Warning: 2 of 4 classes without an object in the training images: never found: a, d' in notes
    assert 'Warning: 2 of 4 classes in a single training image: hardly learnt: b, c' in notes


# ---- Places -------------------------------------------------------------------------------------


def test_paths_are_relative_where_they_can_be(tiles, tmp_path, monkeypatch):
    site = tmp_path / 'site'
    (site / 'configs/mine').mkdir(parents=True)
    (site / 'data').mkdir()
    (site / 'data/tiles').symlink_to(tiles)
    base = site / 'configs/base.py'
    base.write_text(f'_base_ = {str(VOC)!r}\n')
    monkeypatch.chdir(site)
    options = dict(base=Path('configs/base.py'))
    new.write(Path('data/tiles'), 'a', **options)
    new.write(Path('data/tiles'), 'b', Path('configs/mine/b.py'), **options)
    new.write(Path('data/tiles'), 'c', tmp_path / 'c.py', **options)
    text = {
        n: Path(p).read_text() for n, p in (('a', 'configs/a.py'), ('b', 'configs/mine/b.py'), ('c', tmp_path / 'c.py'))
    }
    assert "_base_ = './base.py'" in text['a']
    assert "_base_ = '../base.py'" in text['b']
    assert f'_base_ = {str(base)!r}' in text['c']
    assert "data_root = 'data/tiles/'" in text['a']
    assert 'python tools/train_pretrained.py configs/mine/b.py' in text['b']
    assert load.load('configs/mine/b.py').work_dir == 'work_dirs/b'


def test_images_beside_the_annotations_folder(tmp_path):
    root = make_data(tmp_path / 'd', ['a'], {'train': 2, 'val': 1})
    (root / 'images').rename(root / 'JPEGImages')
    assert made(root, tmp_path)[0].train_dataloader.dataset.data_prefix.img == 'JPEGImages/'
    for split in ('train', 'val'):
        (root / 'JPEGImages' / split).rename(root / split)
    assert made(root, tmp_path)[0].train_dataloader.dataset.data_prefix.img == ''


def test_an_existing_file_stays(tiles, tmp_path):
    out = tmp_path / 'x.py'
    out.write_text('mine')
    with refused('config-exists', path=str(out)):
        new.write(tiles, 'x', out, VOC)
    assert out.read_text() == 'mine'
    new.write(tiles, 'x', out, VOC, overwrite=True)
    assert '_base_' in out.read_text()
    with refused('new-config-own-base', path=str(out)):
        new.write(tiles, 'x', out, out, overwrite=True)


def spoil(root: Path, split: str, change) -> None:
    path = root / f'annotations/instances_{split}.json'
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ('split', 'change', 'code'),
    [
        ('val', lambda d: d['categories'].reverse(), 'coco-classes'),
        ('val', lambda d: d['images'][0].update(file_name='gone.png'), 'coco-images'),
        ('train', lambda d: d['annotations'].clear(), 'statistics-empty'),
        ('train', lambda d: [a.update(iscrowd=1) for a in d['annotations']], 'statistics-empty'),
        ('train', lambda d: d.update(categories=[], annotations=[]), 'coco-file'),
        ('train', lambda d: d['categories'][0].update(name='{{x}}'), 'statistics-names'),
        ('train', lambda d: d['images'][0].pop('width'), 'coco-entries'),
        ('train', lambda d: d['annotations'][0].pop('bbox'), 'coco-entries'),
        ('train', lambda d: d['annotations'][0].update(bbox=[1, 2]), 'statistics-sizes'),
        ('train', lambda d: d['images'][0].update(width=0), 'statistics-sizes'),
        ('train', lambda d: [a.update(bbox=[1, 1, 0, 0]) for a in d['annotations']], 'statistics-sizes'),
        ('test', lambda d: d.pop('images'), 'coco-file'),
    ],
)
def test_data_that_cannot_be_trained_on_leaves_no_config(tmp_path, split, change, code):
    root = make_data(tmp_path / 'd', ['a', 'b'], {'train': 4, 'val': 2, 'test': 2})
    spoil(root, split, change)
    with refused(code, path=root / f'annotations/instances_{split}.json'):
        new.write(root, 'x', tmp_path / 'out/x.py', VOC)
    assert not (tmp_path / 'out').exists()


def test_unsplit_data_names_the_tool_that_splits(tmp_path):
    root = make_data(tmp_path / 'd', ['a'], {'all': 4})
    with refused('layout-splits', root=root) as caught:
        Prepared(root).splits()
    assert f'tools/split_dataset.py {root}' in caught.value.hint
    with refused('layout-splits') as caught:
        Prepared(tmp_path / 'nowhere').splits()
    assert 'tools/prepare_data.py' in caught.value.hint


@pytest.mark.parametrize(
    ('args', 'code', 'fact'),
    [
        (['--name', '../x'], 'new-config-name', '--name x'),
        (['--name', 'my tiles.v2'], 'new-config-name', '--name my_tiles_v2'),
        (['--name', ''], 'new-config-name', '--name tiles'),
        (['--name', 'x', '--epochs', '0'], None, '--epochs'),
        (['--name', 'x', '--batch-size', '-1'], None, '--batch-size'),
        (['--name', 'x', '--images-per-gpu', '-1'], None, '--batch-size'),
        (['--name', 'x', '--out', 'x.txt'], 'new-config-suffix', '--out x.py'),
        (['--name', 'x', '--data-root', 'nowhere'], 'layout-splits', 'nowhere'),
        (['--name', 'x', '--base', 'configs/gone.py'], 'config-missing', 'configs/gone.py'),
    ],
)
def test_mistakes_on_the_command_line(tiles, tmp_path, args, code, fact):
    with inside(tmp_path):
        done = drive('new_config', '--data-root', tiles, *args)
    assert (done.code, done.error) == (2, code)
    assert fact in done.err
    assert 'Traceback' not in done.err
    assert files_in(tmp_path) == []


# ---- The real thing -----------------------------------------------------------------------------


def test_split_new_config_and_a_short_training(tmp_path):
    """The tools one after the other; with batches without any object, and a name in Chinese."""
    (tmp_path / 'pretrain').symlink_to(REPO / 'pretrain')
    make_data(tmp_path / 'data/tiles', ['dot', '裂纹'], {'all': 24})
    spoil(
        tmp_path / 'data/tiles',
        'all',
        lambda d: d.update(annotations=[a for a in d['annotations'] if a['image_id'] % 4]),
    )
    with inside(tmp_path):
        done = drive('split_dataset', 'data/tiles')
        assert done.code == 0, done.err
        done = drive(
            'new_config',
            '--data-root',
            'data/tiles',
            '--name',
            'tiles',
            '--base',
            DEMO,
            '--epochs',
            1,
            '--batch-size',
            1,
        )
        assert done.code == 0, done.err
        assert done.last_lines(1) == ['Written: configs/tiles.py']
        assert 'python tools/check_dataset.py' in done.out
        in_process = [
            f'{s}_dataloader.{k}'
            for s in ('train', 'val', 'test')
            for k in ('num_workers=0', 'persistent_workers=False')
        ]
        done = train_tool('configs/tiles.py', '--cfg-options', *in_process)
        assert done.code == 0, done.err
        results = json.loads((tmp_path / 'work_dirs/tiles/test_results.json').read_text())
    assert 'coco/segm_mAP' in results['metrics']
    assert list((tmp_path / 'work_dirs/tiles').glob('best_coco_segm_mAP_epoch_*.pth'))


@pytest.mark.parametrize(
    'base', ['mask_rcnn_voc_pretrained_simple.py', 'mask_rcnn_voc_scratch.py', 'mask_rcnn_demo_remap.py']
)
def test_other_shipped_configs_serve_as_bases(tiles, tmp_path, base):
    cfg, text, _ = made(tiles, tmp_path, CONFIGS / base)
    assert len(text.splitlines()) < SHORT
    assert cfg.test_dataloader.dataset.ann_file == 'annotations/instances_test.json'
