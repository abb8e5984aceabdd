from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.apis.inference import Predictor, choose_device
from mmfinetune.config import load
from mmfinetune.utils.errors import Problem, UserError
from mmfinetune.weights import work_dir
from tests.builders.errors import refused
from tests.builders.runs import CONFIGS, DEVKIT, FinishedRun, drive, inside, random_state_dict

CLASSES = ('aeroplane', 'bicycle', 'bird', 'boat')


@pytest.fixture(scope='module')
def site(finished_run: FinishedRun) -> Path:
    """A folder with data, in which a run has been trained and tested."""
    return finished_run.folder


@pytest.fixture(scope='module')
def trained(finished_run: FinishedRun) -> work_dir.RunFiles:
    return work_dir.find_run(finished_run.kept / 'tiny')


@pytest.fixture(scope='module')
def cfg(site, trained):
    with inside(site):
        return load.load(trained.config)


@pytest.fixture(scope='module')
def images(site) -> dict[int, Path]:
    """The validation images by their id."""
    data = json.loads((site / DEVKIT / 'annotations/instances_val.json').read_text())
    return {i['id']: site / DEVKIT / i['file_name'] for i in data['images']}


@pytest.fixture(scope='module')
def predictor(site, cfg, trained) -> Predictor:
    with inside(site):
        return Predictor(cfg, trained.checkpoint, 'cpu', proposals=30)


@pytest.fixture(scope='module')
def found(predictor, images) -> list:
    return predictor([predictor.read(path) for path in images.values()])


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)


def test_predictions_are_those_of_the_test_of_the_run(finished_run, images, predictor, found):
    rows = {kind: defaultdict(list) for kind in ('bbox', 'segm')}
    for kind, by_image in rows.items():
        for row in json.loads((finished_run.kept / f'predictions.{kind}.json').read_text()):
            by_image[row['image_id']].append(row)
    for image_id, ours in zip(images, found, strict=True):
        boxes = sorted(rows['bbox'][image_id], key=lambda r: -r['score'])
        assert len(ours) == len(boxes) > 5
        np.testing.assert_allclose(
            ours.scores, [r['score'] for r in boxes], rtol=1e-4 if torch.cuda.is_available() else 1e-6
        )
        xywh = np.concatenate([ours.boxes[:, :2], ours.boxes[:, 2:] - ours.boxes[:, :2]], 1)
        np.testing.assert_allclose(xywh, [r['bbox'] for r in boxes], atol=1e-3)
        assert [predictor.category_ids[k] for k in ours.labels] == [r['category_id'] for r in boxes]
        masks = sorted(rows['segm'][image_id], key=lambda r: -r['score'])
        theirs = np.stack([mask_api.decode(r['segmentation']) for r in masks]).astype(bool)
        assert ours.masks.shape == theirs.shape
        assert (ours.masks == theirs).all()
        assert theirs.any()


def test_each_image_alone_gives_the_same(images, predictor, found):
    for path, together in zip(images.values(), found, strict=True):
        (alone,) = predictor([predictor.read(path)])
        np.testing.assert_allclose(alone.boxes, together.boxes, atol=1e-2)
        np.testing.assert_allclose(alone.scores, together.scores, atol=1e-4)


def test_what_comes_back(found):
    for prediction in found:
        assert prediction.boxes.dtype == prediction.scores.dtype == np.float32
        assert prediction.labels.dtype == np.int64
        assert prediction.masks.dtype == bool
        assert prediction.masks.shape == (len(prediction), 224, 224)
        assert (np.diff(prediction.scores) <= 0).all()


def test_proposals_are_the_best_of_the_rpn_in_pixels_of_the_image(cfg, predictor, found, images):
    import torch
    from mmengine.dataset import pseudo_collate

    image = predictor.read(next(iter(images.values())))
    batch = predictor.model.data_preprocessor(pseudo_collate([predictor.prepare(image)]))
    with torch.no_grad():
        features = predictor.model.extract_feat(batch['inputs'])
        (expected,) = predictor.model.rpn_head.predict(features, batch['data_samples'], rescale=True)
    (prediction,) = predictor([image])
    assert prediction.proposals.shape == (30, 4)
    np.testing.assert_allclose(prediction.objectness, expected.scores[:30], rtol=1e-6)
    np.testing.assert_allclose(prediction.proposals, expected.bboxes[:30].clamp(0, 224), atol=1e-3)
    assert (np.diff(prediction.objectness) <= 0).all()
    assert all(p.proposals.min() >= 0 and p.proposals.max() <= 224 for p in found)
    assert np.ptp(prediction.proposals) > 150  # not in the 96 pixels of the network's input


def test_proposals_cost_no_second_pass(predictor, monkeypatch):
    calls = []
    extract = predictor.model.extract_feat
    monkeypatch.setattr(predictor.model, 'extract_feat', lambda x: calls.append(1) or extract(x))
    predictor([noise(50, 60), noise(70, 40)])
    assert len(calls) == 1
    assert 'predict' not in vars(predictor.model.rpn_head)


def test_proposals_of_a_padded_batch_lie_in_their_images(predictor):
    wide, high = predictor([noise(40, 200), noise(200, 40)])
    assert wide.proposals[:, 3].max() <= 40
    assert high.proposals[:, 2].max() <= 40
    (alone,) = predictor([noise(200, 40)])
    assert alone.proposals[:, 3].max() > 100


def test_no_images(predictor):
    assert predictor([]) == []


def test_limits(site, cfg, trained, images):
    with inside(site):
        limited = Predictor(cfg, trained.checkpoint, 'cpu', score_thr=0.0, max_per_image=3, classes=['bird', 'boat'])
        everything = Predictor(cfg, trained.checkpoint, 'cpu', score_thr=0.0, max_per_image=50)
    image = limited.read(next(iter(images.values())))
    (ours,) = limited([image])
    (every,) = everything([image])
    # Hardly trained heads give all classes some score, so that the limits alone tell how many.
    assert len(every) == 50
    assert cfg.model.test_cfg.rcnn.max_per_img == 20
    assert len(ours) <= 3
    assert set(ours.labels.tolist()) <= {2, 3}
    with inside(site):
        thr = float(every.scores[10])
        above = Predictor(cfg, trained.checkpoint, 'cpu', score_thr=thr, max_per_image=50)
    (strict,) = above([image])
    assert len(strict) == int((every.scores >= thr).sum()) <= 12
    np.testing.assert_allclose(strict.boxes, every.boxes[: len(strict)], atol=1e-3)
    assert (strict.masks == every.masks[: len(strict)]).all()
    assert strict.proposals is None


def test_threshold_below_that_of_the_config_counts(site, cfg, trained):
    strict = copy.deepcopy(cfg)
    strict.model.test_cfg.rcnn.score_thr = 0.9
    with inside(site):
        (own,) = Predictor(strict, trained.checkpoint, 'cpu')([noise(90, 90)])
        (lower,) = Predictor(strict, trained.checkpoint, 'cpu', score_thr=0.0)([noise(90, 90)])
    assert (len(own), len(lower)) == (0, 20)
    assert own.masks.shape == (0, 90, 90)
    assert strict.model.test_cfg.rcnn.score_thr == 0.9


def test_the_config_can_be_used_again(site, cfg, trained):
    before = cfg.pretty_text
    with inside(site):
        Predictor(cfg, trained.checkpoint, 'cpu', score_thr=0.5)
    assert cfg.pretty_text == before


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    """The same red and blue picture in many forms."""
    folder = tmp_path_factory.mktemp('forms')
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, :25, 0] = pixels[:, 25:, 2] = 200
    image = Image.fromarray(pixels)
    for name, form in (
        ('rgb.png', image),
        ('rgba.png', image.convert('RGBA')),
        ('palette.png', image.convert('P')),
        ('name with 空格 é.png', image),
        ('rgb.webp', image),
        ('cmyk.jpg', image.convert('CMYK')),
        ('grey.png', image.convert('L')),
    ):
        form.save(
            folder / name,
            **({'quality': 95} if form.mode == 'CMYK' else {'lossless': True} if name.endswith('webp') else {}),
        )
    cv2.imwrite(str(folder / 'sixteen.png'), pixels[..., ::-1].astype(np.uint16) * 257)
    cv2.imwrite(str(folder / 'sixteen.tif'), pixels[..., ::-1].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    image.save(folder / 'turned.jpg', exif=exif, quality=95)
    return folder


@pytest.mark.parametrize(
    'name',
    [
        'rgb.png',
        'rgba.png',
        'palette.png',
        'name with 空格 é.png',
        'rgb.webp',
        'cmyk.jpg',
        'sixteen.png',
        'sixteen.tif',
    ],
)
def test_images_of_all_kinds_are_read_as_rgb(predictor, pictures, name):
    image = predictor.read(pictures / name)
    assert (image.shape, image.dtype) == ((30, 50, 3), np.uint8)
    assert np.abs(image[15, 10].astype(int) - (200, 0, 0)).max() <= 8
    assert np.abs(image[15, 40].astype(int) - (0, 0, 200)).max() <= 8


def test_grey_has_three_equal_channels(predictor, pictures):
    image = predictor.read(pictures / 'grey.png')
    assert image.shape == (30, 50, 3)
    assert (image[..., :1] == image).all()


def test_turned_image_is_read_upright(predictor, pictures):
    image = predictor.read(pictures / 'turned.jpg')
    assert image.shape == (50, 30, 3)
    assert image[10, 15, 0] > 150 > image[40, 15, 0]


def test_images_are_read_as_for_training(cfg, predictor, pictures):
    from mmdet.registry import TRANSFORMS

    loader = TRANSFORMS.build(cfg.train_dataloader.dataset.pipeline[0])
    for path in pictures.iterdir():
        image = loader({'img_path': str(path)})['img']
        assert (predictor.read(path) == image[..., ::-1]).all(), path.name


def test_an_unreadable_image_gives_a_short_reason(predictor, tmp_path):
    (tmp_path / 'a: b.png').write_text('hello')
    with pytest.raises(Problem) as caught:
        predictor.read(tmp_path / 'a: b.png')
    assert caught.value.message.facts == {'reason': 'failed to load image'}
    with pytest.raises(Problem, match='No such file'):
        predictor.read(tmp_path / 'none.png')


@pytest.mark.parametrize('shape', [(1, 1), (1, 2), (7, 3), (2, 150), (2500, 1800)])
def test_images_of_any_size(predictor, shape):
    (prediction,) = predictor([noise(*shape)])
    assert prediction.masks.shape[1:] == shape
    assert prediction.boxes.size == 0 or prediction.boxes.max() <= max(shape)


def test_what_the_pipeline_cannot_take_is_told(predictor):
    with pytest.raises(Problem) as caught:
        predictor.prepare(noise(1, 5000))
    problem = caught.value.message
    assert (problem.code, problem.facts['width'], problem.facts['height']) == ('predict-pipeline', 5000, 1)
    for wrong in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3)), np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(Problem) as caught:
            predictor.prepare(wrong)
        assert caught.value.message.code == 'predict-not-rgb'


def test_the_array_is_rgb(predictor):
    red = np.zeros((50, 50, 3), np.uint8)
    red[..., 0] = 255
    packed = predictor.prepare(red)['inputs']
    assert packed[2].float().mean() > 250 > 5 > packed[0].float().mean()  # the network's BGR


def test_category_ids_of_the_annotation_file(site, cfg, trained, predictor, tmp_path):
    assert predictor.category_ids == list(range(1, 21))
    own = copy.deepcopy(cfg)
    path = tmp_path / 'other.json'
    path.write_text(
        json.dumps(
            {'categories': [{'id': 100 - i, 'name': name} for i, name in enumerate(predictor.classes)], 'images': []}
        )
    )
    own.test_dataloader.dataset.update(data_root='', ann_file=str(path))
    with inside(site):
        assert Predictor(own, trained.checkpoint, 'cpu').category_ids == list(range(100, 80, -1))
    path.unlink()
    with inside(site):
        unknown = Predictor(own, trained.checkpoint, 'cpu')
    assert unknown.category_ids == list(range(1, 21))
    assert unknown.image_ids == {}


def test_image_ids_of_the_annotation_file(images, predictor):
    assert predictor.image_ids == {str(path.resolve()): i for i, path in images.items()}


@pytest.mark.parametrize('more, ids', [(False, [3, 2]), (True, [1, 2, 3])])
def test_known_images_keep_their_ids_if_all_are_known(site, images, trained, tmp_path, more, ids):
    Image.new('RGB', (50, 50)).save(tmp_path / 'new.png')
    given = [images[3], images[2], *([tmp_path / 'new.png'] if more else [])]
    with inside(site):
        done = drive(
            'predict', *given, '--run', trained.work_dir, '--out', tmp_path / 'out', '--no-pictures', '--score-thr', '0'
        )
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert list(dict.fromkeys(r['image_id'] for r in rows)) == ids


def test_weights_of_another_class_count(site, cfg):
    with inside(site), pytest.raises(UserError) as caught:
        Predictor(cfg, next(Path('pretrain').glob('*.pth')), 'cpu')
    assert any('fc_cls.weight' in str(p) and '(21,' in str(p) for p in caught.value.problems)


def save(path: Path, classes: tuple[str, ...]) -> Path:
    import torch

    state = random_state_dict('mask_rcnn_demo.py')
    torch.save({'meta': {'dataset_meta': {'classes': classes}}, 'state_dict': state}, path)
    return path


def test_weights_with_classes_in_another_order(site, cfg, predictor, tmp_path):
    scrambled = (predictor.classes[1], predictor.classes[0], *predictor.classes[2:])
    with inside(site), refused('predict-other-classes', path=tmp_path / 'a.pth') as caught:
        Predictor(cfg, save(tmp_path / 'a.pth', scrambled), 'cpu')
    assert [p.facts for p in caught.value.problems] == [
        {'label': 0, 'config': 'aeroplane', 'weights': 'bicycle'},
        {'label': 1, 'config': 'bicycle', 'weights': 'aeroplane'},
    ]


def test_weights_whose_classes_are_spelt_otherwise_fit(site, cfg, predictor, tmp_path):
    spelt = ('airplane', 'Bicycle', *predictor.classes[2:])
    with inside(site):
        again = Predictor(cfg, save(tmp_path / 'a.pth', spelt), 'cpu')
    assert again.classes == predictor.classes


def test_unknown_classes(site, cfg, trained):
    with inside(site), refused('predict-classes') as caught:
        Predictor(cfg, trained.checkpoint, 'cpu', classes=['brid', 'cat', 'xyzzy'])
    assert [p.facts for p in caught.value.problems] == [
        {'name': 'brid', 'suggestion': ': did you mean bird?'},
        {'name': 'xyzzy', 'suggestion': ''},
    ]


def test_a_pickle_with_code_is_refused(site, cfg, tmp_path):
    import torch

    torch.save({'state_dict': random_state_dict('mask_rcnn_demo.py'), 'bad': subprocess.Popen}, tmp_path / 'bad.pth')
    with inside(site), pytest.raises(UserError, match='bad.pth'):
        Predictor(cfg, tmp_path / 'bad.pth', 'cpu')


@pytest.fixture(scope='module')
def retina(cfg, tmp_path_factory):
    """A config without RPN and without masks, and random weights for it."""
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config

    own = Config(copy.deepcopy(cfg.to_dict()))
    own.model = Config(
        dict(
            type='RetinaNet',
            data_preprocessor=own.model.data_preprocessor,
            backbone=own.model.backbone,
            neck=dict(type='FPN', in_channels=[64, 128], start_level=0, out_channels=16, num_outs=3),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=20,
                in_channels=16,
                feat_channels=16,
                stacked_convs=1,
                anchor_generator=dict(
                    type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[8, 16, 32]
                ),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            ),
            test_cfg=dict(
                nms_pre=100, min_bbox_size=0, score_thr=0.0, max_per_img=10, nms=dict(type='nms', iou_threshold=0.5)
            ),
        )
    )._cfg_dict
    own.model.backbone.update(out_indices=(2, 3), init_cfg=None)
    channels = [own.model.backbone.base_channels * 2**i for i in (2, 3)]
    own.model.neck.in_channels = channels
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(own.model))
    path = tmp_path_factory.mktemp('retina') / 'retina.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return own, path


def test_a_model_without_rpn_has_no_proposals(site, retina):
    with inside(site), refused('model-no-rpn', model='RetinaNet'):
        Predictor(*retina, 'cpu', proposals=5)


def test_a_model_without_masks(site, retina):
    with inside(site):
        (prediction,) = Predictor(*retina, 'cpu')([noise(80, 80)])
    assert prediction.masks is None
    assert len(prediction) == 10


@pytest.mark.parametrize(
    ('step', 'name'),
    [
        (dict(type='Resize', scale=(96, 96), keep_ratio=True), 'Resize'),
        (dict(type='LoadImage', color_type='grayscale'), 'LoadImage'),
    ],
)
def test_pipelines_that_cannot_be_used(site, cfg, trained, step, name):
    own = copy.deepcopy(cfg)
    own.test_dataloader.dataset.pipeline = [step]
    with inside(site), refused('predict-pipeline-start', steps=name):
        Predictor(own, trained.checkpoint, 'cpu')


def test_a_config_without_test_data(site, cfg, trained):
    own = copy.deepcopy(cfg)
    own.pop('test_dataloader')
    with inside(site):
        assert len(Predictor(own, trained.checkpoint, 'cpu').category_ids) == 20
        own.pop('val_dataloader')
        with refused('predict-no-pipeline'):
            Predictor(own, trained.checkpoint, 'cpu')


def test_devices():
    import torch

    assert choose_device('cpu') == 'cpu'
    assert choose_device('auto') == ('cuda' if torch.cuda.is_available() else 'cpu')
    for name in ('cuda:99', 'gpu', 'meta'):
        with refused('device-missing', device=name):
            choose_device(name)


def test_import_brings_nothing_heavy():
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            'import mmfinetune.apis.inference, mmfinetune.apis.predict, sys; print([m '
            'for m in ("torch", "mmdet", "mmengine", "mmcv", "matplotlib") if m in sys.modules])',
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=CONFIGS.parent,
    )
    assert done.stdout.strip() == '[]'


@pytest.mark.slow
def test_real_photographs(site, cfg, trained, real_data):
    with inside(site):
        predictor = Predictor(cfg, trained.checkpoint, 'cpu', proposals=20)
    paths = sorted((real_data / 'coco2017_real/val2017').glob('*.jpg'))[:10]
    assert len(paths) == 10
    for path in paths:
        image = predictor.read(path)
        (prediction,) = predictor([image])
        assert prediction.masks.shape[1:] == image.shape[:2]
        assert len(prediction.proposals) == 20
