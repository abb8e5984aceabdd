from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image

from mmfinetune.data import drawing
from mmfinetune.engine import board
from mmfinetune.engine.hooks import pictures
from mmfinetune.engine.vis_backends import BoardBackend

NAMES = ('cat', 'dog')
HEIGHT, WIDTH = 40, 60
BOX = (10, 6, 30, 26)
GREY, RED = (90, 90, 90), (200, 20, 20)


def box_mask(box=BOX, shape=(HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros((1, *shape), np.uint8)
    mask[0, box[1] : box[3], box[0] : box[2]] = 1
    return mask


def sample(path: Path, truth: bool = True, found: bool = True, scale: float = 1.0, img_id: int = 1) -> DetDataSample:
    """A predicted image with one cat; its ground truth in the coordinates of a scaled one."""
    if not path.exists():
        Image.new('RGB', (WIDTH, HEIGHT), GREY).save(path)
    shape = round(HEIGHT * scale), round(WIDTH * scale)
    result = DetDataSample(
        metainfo={
            'img_path': str(path),
            'img_id': img_id,
            'ori_shape': (HEIGHT, WIDTH),
            'img_shape': shape,
            'scale_factor': (scale, scale),
        }
    )
    count = int(found)
    result.pred_instances = InstanceData(
        bboxes=torch.tensor([BOX], dtype=torch.float)[:count],
        labels=torch.tensor([0])[:count],
        scores=torch.tensor([0.9])[:count],
        masks=torch.from_numpy(box_mask().astype(bool))[:count],
    )
    result.gt_instances = InstanceData()
    if truth:
        scaled = [round(v * scale) for v in BOX]
        result.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([scaled], dtype=torch.float)),
            labels=torch.tensor([0]),
            masks=BitmapMasks(box_mask(scaled, shape), *shape),
        )
    return result


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


def batch(count: int, masks: str = 'bitmap') -> tuple[list[torch.Tensor], list[DetDataSample]]:
    """Images as a training pipeline gives them, BGR, each red with an object, of several sizes."""
    inputs, samples = [], []
    for i in range(count):
        shape = HEIGHT, WIDTH - 10 * (i % 2)
        inputs.append(torch.tensor(RED[::-1], dtype=torch.uint8)[:, None, None].expand(3, *shape).clone())
        made = DetDataSample(metainfo={'img_shape': shape})
        objects = BitmapMasks(box_mask(shape=shape), *shape)
        if masks == 'polygon':
            x0, y0, x1, y1 = BOX
            objects = PolygonMasks([[np.array([x0, y0, x1, y0, x1, y1, x0, y1], float)]], *shape)
        made.gt_instances = InstanceData(
            bboxes=HorizontalBoxes(torch.tensor([BOX], dtype=torch.float)), labels=torch.tensor([1]), masks=objects
        )
        samples.append(made)
    return inputs, samples


NORMALISED = {'mean': [123.675, 116.28, 103.53], 'std': [58.395, 57.12, 57.375]}
CAFFE = {'mean': [103.53, 116.28, 123.675], 'std': [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    'settings', [{**NORMALISED, 'bgr_to_rgb': True}, {**CAFFE, 'bgr_to_rgb': False}, {'bgr_to_rgb': True}, {}]
)
@pytest.mark.parametrize('masks', ['bitmap', 'polygon'])
def test_batch_has_the_colours_of_the_images(settings, masks):
    inputs, samples = batch(2, masks)
    preprocessor = DetDataPreprocessor(pad_size_divisor=32, pad_mask=True, **settings)
    done = preprocessor({'inputs': inputs, 'data_samples': samples}, training=True)
    picture = pictures.batch_picture(
        done['inputs'],
        done['data_samples'],
        NAMES,
        settings.get('mean'),
        settings.get('std'),
        bool(settings.get('bgr_to_rgb')),
    )
    left, right = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    for cell in (left, right):
        assert (np.abs(cell.astype(int) - RED).max(2) <= 2).mean() > 0.2
        assert (cell == drawing.palette(2)[1]).all(2).any()  # the box, and the chip with its name


def test_large_batches_are_cut():
    inputs, samples = batch(20)
    made = pictures.batch_picture(
        torch.stack([i[:, :, :50] for i in inputs]).float(), samples, NAMES, None, None, rgb=False
    )
    assert made.shape[1] > made.shape[0]  # two rows of four


@pytest.mark.parametrize(
    ('count', 'wanted', 'expected'),
    [(100, 4, [0, 33, 66, 99]), (4, 4, [0, 1, 2, 3]), (2, 4, [0, 1]), (9, 1, [0]), (9, 0, []), (0, 4, [])],
)
def test_images_are_spread_over_the_set(count, wanted, expected):
    assert pictures.spread(count, wanted) == expected


class Visualizer(SimpleNamespace):
    def __init__(self, *backends) -> None:
        super().__init__(_vis_backends=dict(enumerate(backends)), dataset_meta={'classes': NAMES})


@pytest.fixture
def runner(tmp_path: Path) -> SimpleNamespace:
    """What the hooks read of a Runner."""
    loop = SimpleNamespace()
    return SimpleNamespace(
        work_dir=str(tmp_path / 'run'),
        visualizer=Visualizer(BoardBackend(str(tmp_path / 'logs'))),
        _train_loop=loop,
        hooks=[],
        epoch=3,
        iter=12,
        cfg=Config({'model': {'data_preprocessor': {**NORMALISED, 'bgr_to_rgb': True}}}),
        val_dataloader=SimpleNamespace(sampler=range(7)),
        model=SimpleNamespace(data_preprocessor=DetDataPreprocessor(**NORMALISED, bgr_to_rgb=True, pad_mask=True)),
    )


def shown(tmp_path: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in (tmp_path / 'logs').glob('events*'):
        for event in board.read_events(path):
            for value in event.summary.value:
                if value.HasField('image'):
                    found.setdefault(value.tag, []).append(event.step)
    # Files that are made within one second have no order.
    return {tag: sorted(steps) for tag, steps in found.items()}


def run_batches(runner, samples, size, before, after) -> None:
    before(runner)
    for start in range(0, len(samples), size):
        after(runner, start // size, outputs=samples[start : start + size])
    for backend in runner.visualizer._vis_backends.values():
        backend.close()


@pytest.mark.parametrize('size', [1, 3, 7])
def test_the_same_validation_images_after_each_epoch(runner, tmp_path, size):
    samples = [sample(tmp_path / f'{i}.png') for i in range(7)]
    hook = pictures.BoardPicturesHook(num_images=3)
    for runner.epoch in (1, 2):
        run_batches(runner, samples, size, hook.before_val_epoch, hook.after_val_iter)
    assert shown(tmp_path) == {f'images/val/{i}': [1, 2] for i in (0, 3, 6)}


def test_images_of_one_name_have_a_tag_each(runner, tmp_path):
    samples = []
    for i in range(7):
        (tmp_path / str(i)).mkdir()
        samples.append(sample(tmp_path / str(i) / 'a.png', img_id=i))
    hook = pictures.BoardPicturesHook(num_images=3)
    run_batches(runner, samples, 1, hook.before_val_epoch, hook.after_val_iter)
    assert shown(tmp_path) == {f'images/val/{name}': [3] for name in ('a', 'a_3', 'a_6')}


def test_first_batch_is_shown_as_the_model_gets_it(runner, tmp_path):
    hook = pictures.BoardPicturesHook()
    preprocessor = runner.model.data_preprocessor
    hook.before_train(runner)
    for runner.iter in (12, 13):
        inputs, samples = batch(2)
        plain = DetDataPreprocessor(**NORMALISED, bgr_to_rgb=True, pad_mask=True)(
            {'inputs': [i.clone() for i in inputs], 'data_samples': batch(2)[1]}, True
        )
        hook.before_train_iter(runner, 0)
        done = preprocessor({'inputs': inputs, 'data_samples': samples}, True)
        hook.after_train_iter(runner, 0)
        assert torch.equal(done['inputs'], plain['inputs'])
        assert not preprocessor._forward_hooks
    for backend in runner.visualizer._vis_backends.values():
        backend.close()
    assert shown(tmp_path) == {'images/train_batch': [12]}


def test_without_a_board_nothing_is_drawn(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, 'truth_and_prediction', pytest.fail)
    hook = pictures.BoardPicturesHook()
    for runner.visualizer in (Visualizer(), Visualizer(SimpleNamespace(close=lambda: None))):
        hook.before_train(runner)
        hook.before_train_iter(runner, 0)
        assert not runner.model.data_preprocessor._forward_hooks
        run_batches(runner, [sample(tmp_path / 'a.png')], 1, hook.before_val_epoch, hook.after_val_iter)


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
    run_batches(runner, samples, size, hook.before_test, hook.after_test_iter)
    assert figures(runner) == expected
    assert not (tmp_path / 'logs').exists()


def test_picture_of_the_test_keeps_colours_and_size(runner, tmp_path):
    path = tmp_path / 'a.png'
    Image.new('RGB', (900, 600), (200, 100, 0)).save(path)
    one = sample(path, truth=False, found=False)
    one.pred_instances.masks = torch.zeros(0, 600, 900, dtype=torch.bool)
    hook = pictures.TestPicturesHook(num_images=1, score_thr=0.7)
    run_batches(runner, [one], 1, hook.before_test, hook.after_test_iter)
    picture = cv2.imread(str(Path(runner.work_dir) / 'figures' / 'a.png'))[..., ::-1]
    assert picture.shape[1] == 900
    assert tuple(picture[-1, -1]) == (200, 100, 0)


def test_each_test_draws_anew(runner, tmp_path):
    samples = [sample(tmp_path / f'{i}.png') for i in range(3)]
    hook = pictures.TestPicturesHook(num_images=2)
    run_batches(runner, samples, 3, hook.before_test, hook.after_test_iter)
    before = (Path(runner.work_dir) / 'figures' / '0.png').stat().st_mtime_ns
    run_batches(runner, samples, 3, hook.before_test, hook.after_test_iter)
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
    run_batches(runner, [sample(tmp_path / 'a.png')], 1, hook.before_test, hook.after_test_iter)
    assert figures(runner) == []
