from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from PIL import Image

from mmfinetune.data import drawing
from mmfinetune.engine.hooks import pictures
from tests.builders.pictures import GREY, NAMES, NORMALISED, RED, batch, sample


def coloured(picture: np.ndarray) -> np.ndarray:
    """Where a picture is neither grey nor black nor white: what is drawn on it."""
    return (picture.max(2).astype(int) - picture.min(2)) > 30


def extent(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize('scale', [1.0, 0.5, 2.0])
def test_truth_lies_where_the_prediction_does(tmp_path, scale):
    # A test pipeline may load annotations before it resizes, and then they are scaled.
    picture = pictures.truth_and_prediction(sample(tmp_path / 'a.png', scale=scale), (), 0.3)
    # The lower half, since the texts above the boxes differ.
    drawn = coloured(picture)[picture.shape[0] // 2 :]
    half = picture.shape[1] // 2
    left, right = drawn[:, :half], drawn[:, -half:]
    # By 8 the image is enlarged, so this is within a pixel of it.
    gap = picture.shape[1] - 2 * 480
    assert np.abs(np.subtract(extent(left), extent(right)) + [gap // 2, 0] * 2).max() <= 8
    assert left.sum() == pytest.approx(right.sum(), rel=0.1)


def test_colours_of_truth_and_prediction_are_those_of_the_class(tmp_path):
    picture = pictures.truth_and_prediction(sample(tmp_path / 'a.png'), NAMES, 0.3)
    (colour,) = drawing.palette(1)
    chips = (picture == colour).all(2)
    half = picture.shape[1] // 2
    assert chips[:, :half].any() and chips[:, half:].any()


def test_weak_predictions_are_left_out(tmp_path):
    a = sample(tmp_path / 'a.png')
    strong, weak, none = (
        pictures.truth_and_prediction(s, NAMES, thr)
        for s, thr in ((a, 0.3), (a, 0.95), (sample(tmp_path / 'a.png', found=False), 0.3))
    )
    assert not np.array_equal(strong, weak)
    assert np.array_equal(weak, none)


def test_unknown_truth_leaves_the_prediction_alone(tmp_path):
    both = pictures.truth_and_prediction(sample(tmp_path / 'a.png'), NAMES, 0.3)
    for known in (True, False):
        unknown = sample(tmp_path / 'a.png', truth=False)
        if not known:
            del unknown.gt_instances
        picture = pictures.truth_and_prediction(unknown, NAMES, 0.3)
        assert picture.shape[1] < both.shape[1] / 2
        assert coloured(picture).any()


def test_boxes_without_masks(tmp_path):
    boxes = sample(tmp_path / 'a.png')
    del boxes.gt_instances.masks
    del boxes.pred_instances.masks
    assert coloured(pictures.truth_and_prediction(boxes, NAMES, 0.3)).any()


@pytest.mark.parametrize('objects', [0, 1])
def test_large_images_are_made_smaller_with_what_is_on_them(tmp_path, objects):
    path = tmp_path / 'large.png'
    Image.new('RGB', (3000, 1500), GREY).save(path)
    large = DetDataSample(metainfo={'img_path': str(path), 'ori_shape': (1500, 3000)})
    mask = np.zeros((objects, 1500, 3000), bool)
    mask[:, 750:1500, 1500:3000] = True
    large.pred_instances = InstanceData(
        bboxes=torch.tensor([[1500.0, 750.0, 3000.0, 1500.0]])[:objects],
        labels=torch.tensor([1])[:objects],
        scores=torch.tensor([1.0])[:objects],
        masks=torch.from_numpy(mask),
    )
    picture = pictures.truth_and_prediction(large, (), 0.3, limit=800)
    assert picture.shape[1] == 800
    drawn = coloured(picture)[-400:]
    assert drawn.any() == bool(objects)
    if objects:
        assert drawn[220:, 420:].all() and not drawn[:150].any() and not drawn[:, :380].any()


CAFFE = {'mean': [103.53, 116.28, 123.675], 'std': [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    'settings', [{**NORMALISED, 'bgr_to_rgb': True}, {**CAFFE, 'bgr_to_rgb': False}, {'bgr_to_rgb': True}, {}]
)
@pytest.mark.parametrize('masks', ['bitmap', 'polygon'])
def test_batch_has_the_colours_of_the_images(settings, masks):
    inputs, samples = batch(2, masks)
    preprocessor = DetDataPreprocessor(pad_size_divisor=32, pad_mask=True, **settings)
    done = preprocessor({'inputs': inputs, 'data_samples': samples}, training=True)
    picture = pictures.batch_picture(done, NAMES, settings)
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    for cell in (left, right):
        assert (np.abs(cell.astype(int) - RED).max(2) <= 2).mean() > 0.2
        assert (cell == drawing.palette(2)[1]).all(2).any()  # the box, and the chip with its name


def test_large_batches_are_cut():
    inputs, samples = batch(20)
    same_size = torch.stack([i[:, :, :50] for i in inputs]).float()
    made = pictures.batch_picture({'inputs': same_size, 'data_samples': samples}, NAMES, {})
    assert made.shape[1] > made.shape[0]  # two rows of four


@pytest.mark.parametrize(
    ('count', 'wanted', 'expected'),
    [(100, 4, [0, 33, 66, 99]), (4, 4, [0, 1, 2, 3]), (2, 4, [0, 1]), (9, 1, [0]), (9, 0, []), (0, 4, [])],
)
def test_images_are_spread_over_the_set(count, wanted, expected):
    assert pictures.spread(count, wanted) == expected


@pytest.fixture
def runner(tmp_path: Path) -> SimpleNamespace:
    """What the hook reads of a Runner."""
    visualizer = SimpleNamespace(dataset_meta={'classes': NAMES})
    return SimpleNamespace(work_dir=str(tmp_path / 'run'), visualizer=visualizer)


def run_test(runner, hook: pictures.TestPicturesHook, samples, size: int = 1) -> None:
    hook.before_test(runner)
    for start in range(0, len(samples), size):
        hook.after_test_iter(runner, start // size, outputs=samples[start : start + size])


def figures(runner) -> list[str]:
    return sorted(path.name for path in Path(runner.work_dir).glob('figures/*'))


@pytest.mark.parametrize(
    ('num_images', 'expected'),
    [(0, []), (1, ['0.png']), (3, ['0.png', '1.png', '2.png']), (9, ['0.png', '1.png', '2.png', '3.png', '4.png'])],
)
@pytest.mark.parametrize('size', [1, 2, 5])
def test_first_pictures_of_the_test(runner, tmp_path, num_images, expected, size):
    samples = [sample(tmp_path / f'{i}.png') for i in range(5)]
    hook = pictures.TestPicturesHook(num_images=num_images)
    run_test(runner, hook, samples, size)
    assert figures(runner) == expected


def test_picture_of_the_test_keeps_colours_and_size(runner, tmp_path):
    path = tmp_path / 'a.png'
    Image.new('RGB', (900, 600), (200, 100, 0)).save(path)
    one = sample(path, truth=False, found=False)
    one.pred_instances.masks = torch.zeros(0, 600, 900, dtype=torch.bool)
    hook = pictures.TestPicturesHook(num_images=1, score_thr=0.7)
    run_test(runner, hook, [one], 1)
    picture = cv2.imread(str(Path(runner.work_dir) / 'figures' / 'a.png'))[..., ::-1]
    assert picture.shape[1] == 900
    assert tuple(picture[-1, -1]) == (200, 100, 0)


def test_each_test_draws_anew(runner, tmp_path):
    samples = [sample(tmp_path / f'{i}.png') for i in range(3)]
    hook = pictures.TestPicturesHook(num_images=2)
    run_test(runner, hook, samples, 3)
    before = (Path(runner.work_dir) / 'figures' / '0.png').stat().st_mtime_ns
    run_test(runner, hook, samples, 3)
    assert figures(runner) == ['0.png', '1.png']
    assert (Path(runner.work_dir) / 'figures' / '0.png').stat().st_mtime_ns > before


def test_no_outputs_no_pictures(runner):
    hook = pictures.TestPicturesHook()
    hook.before_test(runner)
    hook.after_test_iter(runner, 0, outputs=None)
    assert figures(runner) == []


def test_other_processes_draw_nothing(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'is_main_process', lambda: False)
    hook = pictures.TestPicturesHook()
    run_test(runner, hook, [sample(tmp_path / 'a.png')], 1)
    assert figures(runner) == []
