from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mmfinetune.apis import predict as apis_predict
from mmfinetune.apis import predict_files
from mmfinetune.apis.inference import Prediction
from mmfinetune.apis.media import Input, Shot
from mmfinetune.config import flatten
from tests.builders.runs import TOOLS, Outcome, drive, files_in, inside, random_state_dict, spawn, write_tiny_config

# Heads with random weights give all classes about 1/21.
LOW = ('--score-thr', '0.001', '--device', 'cpu')
PER_IMAGE = 20  # max_per_img of the demo's config


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    """The work dir of a run with random weights."""
    import torch

    folder = tmp_path_factory.mktemp('predict')
    work_dir = folder / 'run'
    work_dir.mkdir()
    text = flatten.flatten(write_tiny_config(folder / 'tiny.py'))
    (work_dir / 'tiny.py').write_text(text)
    torch.save(
        {'meta': {}, 'state_dict': random_state_dict('mask_rcnn_demo.py')}, work_dir / 'best_coco_segm_mAP_epoch_1.pth'
    )
    return work_dir


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three images, two of them with one name."""
    folder = tmp_path / 'photos'
    for i, name in enumerate(('a.jpg', 'b c.png', 'deep/a.jpg')):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (60 + 10 * i, 90, 3), np.uint8)
        cv2.imwrite(str(folder / name), pixels)
    return folder


def predict(*args: str | Path) -> Outcome:
    return drive('predict', *args)


def load(path: Path) -> object:
    return json.loads(path.read_text())


def quietly(make):
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def test_pictures_sheet_and_json_of_a_folder(run, photos, tmp_path):
    out = tmp_path / 'out'
    done = predict(photos, '--run', run, '--out', out, *LOW)
    assert done.code == 0, done.err
    assert files_in(out) == [
        'pictures/a.jpg',
        'pictures/b c.jpg',
        'pictures/deep/a.jpg',
        'predictions.json',
        'predictions_coco.json',
        'sheet.jpg',
    ]
    found, results = done.last_lines()
    assert found.startswith('Found on 3 of 3 images: ')
    assert results == f'Results: {out} (3 images, {3 * PER_IMAGE} objects)'
    assert Image.open(out / 'pictures/deep/a.jpg').size == (480, round(480 * 80 / 90))
    # Three cells of 400 px.
    assert Image.open(out / 'sheet.jpg').width == 3 * 412 + 12


def test_json_is_what_pycocotools_reads(run, photos, tmp_path):
    out = tmp_path / 'out'
    assert predict(photos, '--run', run, '--out', out, *LOW).code == 0
    whole = quietly(lambda: COCO(str(out / 'predictions_coco.json')))
    results = quietly(lambda: whole.loadRes(str(out / 'predictions.json')))
    assert len(whole.anns) == len(results.anns) == 3 * PER_IMAGE
    assert [c['id'] for c in whole.dataset['categories']] == list(range(1, 21))
    assert whole.dataset['categories'][0]['name'] == 'aeroplane'
    sizes = {}
    for info in whole.dataset['images']:
        image = cv2.imread(str(photos / info['file_name']))
        assert (info['height'], info['width']) == image.shape[:2]
        assert (out / info['picture']).is_file()
        sizes[info['id']] = image.shape[:2]
    for row, result in zip(whole.dataset['annotations'], load(out / 'predictions.json'), strict=True):
        mask = whole.annToMask(row)
        assert mask.shape == sizes[row['image_id']]
        assert row['area'] == mask.sum() == mask_api.area(row['segmentation'])
        assert row['iscrowd'] == 0
        assert {k: row[k] for k in ('image_id', 'category_id', 'bbox', 'score', 'segmentation')} == {
            k: v for k, v in result.items() if k != 'file_name'
        }
        assert whole.imgs[row['image_id']]['file_name'] == result['file_name']
        x, y, width, height = row['bbox']
        assert x >= 0
        assert y >= 0
        assert x + width <= mask.shape[1] + 1e-3
        assert y + height <= mask.shape[0] + 1e-3
    assert sorted(a['id'] for a in whole.dataset['annotations']) == list(range(1, 61))


def test_limits_reach_the_model(run, photos, tmp_path):
    assert predict(photos, '--run', run, '--out', tmp_path / 'all', *LOW).code == 0
    every = load(tmp_path / 'all/predictions.json')
    names = {c['id']: c['name'] for c in load(tmp_path / 'all/predictions_coco.json')['categories']}
    wanted = every[5]['category_id']
    done = predict(
        photos, '--run', run, '--out', tmp_path / 'out', *LOW, '--max-per-image', '2', '--classes', names[wanted]
    )
    assert done.code == 0, done.err
    expected = [[r for r in every if r['image_id'] == i and r['category_id'] == wanted][:2] for i in (1, 2, 3)]
    assert load(tmp_path / 'out/predictions.json') == [row for rows in expected for row in rows]
    assert expected[0]


def test_batches_give_the_same(run, photos, tmp_path):
    shutil.rmtree(photos / 'deep')
    pixels = cv2.imread(str(photos / 'a.jpg'))
    for name in ('b c.png', 'd.png', 'e.png'):
        # Of one size, since the network sees the padding.
        cv2.imwrite(str(photos / name), pixels[::-1] if name == 'd.png' else pixels[:, ::-1])
    for name, size in (('one', '1'), ('many', '3')):
        assert predict(photos, '--run', run, '--out', tmp_path / name, '--batch-size', size, *LOW).code == 0
    one, many = (load(tmp_path / n / 'predictions.json') for n in ('one', 'many'))
    assert [r['image_id'] for r in one] == [r['image_id'] for r in many]
    assert one[-1]['image_id'] == 4
    np.testing.assert_allclose([r['score'] for r in one], [r['score'] for r in many], atol=1e-5)


def test_proposals_are_drawn_beside(run, photos, tmp_path):
    done = predict(photos / 'a.jpg', '--run', run, '--out', tmp_path / 'out', '--proposals', '7', *LOW)
    assert done.code == 0, done.err
    picture = cv2.imread(str(tmp_path / 'out/pictures/a.jpg'))
    assert picture.shape[1] > 2 * 480
    assert files_in(tmp_path / 'out') == ['pictures/a.jpg', 'predictions.json', 'predictions_coco.json']


def test_nothing_found(run, photos, tmp_path):
    done = predict(
        photos, '--run', run, '--out', tmp_path / 'out', '--device', 'cpu', '--score-thr', '0.99', '--proposals'
    )
    assert done.code == 0, done.err
    assert done.out.startswith('Nothing found on 3 images')
    assert load(tmp_path / 'out/predictions.json') == []
    whole = quietly(lambda: COCO(str(tmp_path / 'out/predictions_coco.json')))
    assert (len(whole.imgs), len(whole.anns)) == (3, 0)
    assert (tmp_path / 'out/pictures/a.jpg').is_file()


@pytest.mark.parametrize(
    'flags, made',
    [
        (['--no-pictures'], ['predictions.json', 'predictions_coco.json']),
        (['--no-coco-json', '--no-contact-sheet'], ['pictures/a.jpg', 'pictures/b c.jpg', 'pictures/deep/a.jpg']),
        (['--no-coco-json', '--no-pictures', '--contact-sheet'], ['sheet.jpg']),
    ],
)
def test_only_what_is_wanted_is_made(run, photos, tmp_path, flags, made):
    assert predict(photos, '--run', run, '--out', tmp_path / 'out', *flags, *LOW).code == 0
    assert files_in(tmp_path / 'out') == made


def test_bad_images_are_told_at_the_end_and_the_others_done(run, photos, tmp_path):
    (photos / 'cut.jpg').write_bytes((photos / 'a.jpg').read_bytes()[:900])
    (photos / 'text.png').write_text('hello')
    cv2.imwrite(str(photos / 'line.png'), np.zeros((1, 3000, 3), np.uint8))
    (photos / 'bad.mp4').write_bytes(b'nothing' * 99)
    done = predict(photos, '--run', run, '--out', tmp_path / 'out', *LOW)
    assert done.code == 1
    lines = done.err.strip().splitlines()
    assert [line.partition(f'{photos}/')[2].partition(':')[0] for line in lines if f'- {photos}/' in line] == [
        'bad.mp4',
        'cut.jpg',
        'line.png',
        'text.png',
    ]
    assert 'truncated JPEG' in done.err
    assert 'Traceback' not in done.err
    assert done.last_lines(1)[0].endswith(f'(3 images, {3 * PER_IMAGE} objects, 4 failed)')
    assert [i['file_name'] for i in load(tmp_path / 'out/predictions_coco.json')['images']] == [
        'a.jpg',
        'b c.png',
        'deep/a.jpg',
    ]


def test_all_images_bad(run, tmp_path):
    (tmp_path / 'text.png').write_text('hello')
    done = predict(tmp_path / 'text.png', '--run', run, '--out', tmp_path / 'out', *LOW)
    assert done.code == 1
    assert done.out == f'Results: {tmp_path}/out (0 images, 0 objects, 1 failed)\n'
    assert load(tmp_path / 'out/predictions.json') == []


def make_video(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 10, (96, 64))
    for i in range(frames):
        writer.write(np.random.default_rng(i).integers(0, 255, (64, 96, 3), np.uint8))
    writer.release()
    return path


def test_video_with_images_beside_it(run, photos, tmp_path):
    make_video(photos / 'a.avi', 7)
    make_video(photos / 'z.avi', 2)
    done = predict(photos, '--run', run, '--out', tmp_path / 'out', '--every', '3', *LOW)
    assert done.code == 0, done.err
    assert done.last_lines()[0].startswith('Found on 7 of 7 images and frames: ')
    assert '(3 images and 4 frames, ' in done.out
    images = load(tmp_path / 'out/predictions_coco.json')['images']
    assert [(i['file_name'], i.get('frame')) for i in images] == [
        ('a.avi', 0),
        ('a.avi', 3),
        ('a.avi', 6),
        ('a.jpg', None),
        ('b c.png', None),
        ('deep/a.jpg', None),
        ('z.avi', 0),
    ]
    rows = load(tmp_path / 'out/predictions.json')
    assert {(r['file_name'], r.get('frame')) for r in rows} == {(i['file_name'], i.get('frame')) for i in images}
    capture = cv2.VideoCapture(str(tmp_path / 'out' / images[0]['picture']))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert abs(capture.get(cv2.CAP_PROP_FPS) - 10 / 3) < 0.01
    assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 480
    assert len(files_in(tmp_path / 'out/pictures')) == 5


def test_interrupted_video_leaves_no_half_file(run, tmp_path, monkeypatch):
    make_video(tmp_path / 'v.avi', 5)
    add, calls = predict_files.Results.add, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(*args)

    monkeypatch.setattr(predict_files.Results, 'add', interrupted)
    assert predict(tmp_path / 'v.avi', '--run', run, '--out', tmp_path / 'out', *LOW).code == 130
    assert files_in(tmp_path / 'out') == []


def test_results_of_earlier_calls_are_replaced_on_request_and_never_predicted_on(run, photos, tmp_path):
    work_dir = Path(shutil.copytree(run, photos / 'run'))
    out = work_dir / 'predictions'
    done = predict(photos, '--run', work_dir, *LOW)
    assert done.code == 0, done.err
    assert done.last_lines(1)[0].startswith(f'Results: {out} (3 images')
    before = {f: (out / f).read_bytes() for f in files_in(out)}
    for where in ((), ('--out', out)):
        done = predict(photos, '--run', work_dir, *where, *LOW)
        assert (done.code, done.error) == (2, 'predict-exists')
    assert {f: (out / f).read_bytes() for f in files_in(out)} == before
    (out / 'notes.txt').write_text('mine')
    done = predict(photos, '--run', work_dir, *LOW, '--no-pictures', '--overwrite')
    assert done.code == 0, done.err
    assert '(3 images, ' in done.last_lines(1)[0]
    assert files_in(out) == ['notes.txt', 'predictions.json', 'predictions_coco.json']


def test_config_and_checkpoint_write_into_the_current_folder(run, photos, tmp_path):
    with inside(tmp_path):
        files = ['--config', run / 'tiny.py', '--checkpoint', next(run.glob('*.pth'))]
        assert predict(photos / 'a.jpg', *files, '--classes', 'bird', *LOW).code == 0
    assert (tmp_path / 'predictions/predictions.json').is_file()


def test_json_is_all_that_is_printed(run, photos, tmp_path):
    (photos / 'text.png').write_text('hello')
    done = predict(photos, '--run', run, '--out', tmp_path / 'out', '--json', '--no-pictures', *LOW)
    assert done.code == 1
    found = json.loads(done.out)
    classes = found.pop('classes')
    (failed,) = found.pop('failed')
    assert failed.startswith(f'{photos}/text.png: ')
    assert found == {'images': 3, 'frames': 0, 'objects': 3 * PER_IMAGE, 'out': str(tmp_path / 'out')}
    assert sum(classes.values()) == 3 * PER_IMAGE


def test_old_name_of_an_option(run, photos, tmp_path):
    done = predict(photos, '--run', run, '--out', tmp_path / 'out', '--no-json', *LOW)
    assert done.code == 0
    assert '--no-coco-json' in done.err
    assert 'predictions.json' not in files_in(tmp_path / 'out')


def test_sheet_has_pages_and_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(predict_files, '_PER_PAGE', 2)
    monkeypatch.setattr(predict_files, '_PAGES', 2)
    sheet = predict_files.Sheet(tmp_path, 7)
    source = Input(Path('x.jpg'), 'x.jpg')
    nothing = Prediction(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    for _ in range(7):
        sheet.add(Shot(source, np.zeros((900, 1200, 3), np.uint8)), nothing, ['cat'])
    sheet.finish()
    assert files_in(tmp_path) == ['sheet_01.jpg', 'sheet_02.jpg']
    assert sheet.left_out == 3


def test_objects_lie_where_they_are_in_the_small_pictures(tmp_path):
    sheet = predict_files.Sheet(tmp_path, 1)
    mask = np.zeros((1, 800, 1600), bool)
    mask[:, 200:600, 400:1200] = True
    one = Prediction(np.array([[400.0, 200, 1200, 600]]), np.ones(1), np.zeros(1, int), mask)
    sheet.add(Shot(Input(Path('x'), 'x'), np.full((800, 1600, 3), 100, np.uint8)), one, ['cat'])
    (cell,) = sheet._cells
    assert cell.shape == (240, 480, 3)
    changed = (cell != 100).any(2)
    assert changed[70:170, 130:350].all()
    assert not changed[:40].any()
    assert not changed[185:].any()


@pytest.mark.parametrize(
    ('arguments', 'code', 'part'),
    [
        (['no.jpg', '--run', 'run'], 'predict-inputs', 'no.jpg'),
        (['empty', '--run', 'run'], 'predict-inputs', 'empty'),
        (['a.jpg'], 'model-not-named', ''),
        (['a.jpg', '--config', 'run/tiny.py'], 'model-not-named', ''),
        (['a.jpg', '--run', 'rum'], '', 'did you mean run?'),
        (['a.jpg', '--run', 'run', '--checkpoint', 'no.pth'], '', 'no.pth'),
        (['a.jpg', '--config', 'run/tiny.py', '--checkpoint', 'no.pth'], '', 'no.pth'),
        (['a.jpg', '--run', 'run', '--no-coco-json', '--no-pictures'], 'predict-nothing-to-write', ''),
        (['a.jpg', '--run', 'run', '--out', 'a.jpg'], 'file-not-writable', 'a.jpg'),
        (['a.jpg', '--run', 'run', '--score-thr', '1.5'], None, '1.5'),
        (['a.jpg', '--run', 'run', '--every', '0'], None, "'0'"),
        (['a.jpg', '--run', 'run', '--proposals', 'x'], None, "'x'"),
    ],
)
def test_errors_are_quick_and_leave_nothing(run, tmp_path, monkeypatch, arguments, code, part):
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'empty').mkdir()
    Image.new('RGB', (50, 50)).save(tmp_path / 'a.jpg')
    before = files_in(tmp_path)
    monkeypatch.setattr(apis_predict, 'Predictor', None)  # it takes seconds to build
    with inside(tmp_path):
        done = predict(*arguments)
    assert done.code == 2
    if code is None:
        assert 'usage: ' in done.err
    else:
        assert done.error and code in ('', done.error)
    assert part in done.err
    assert 'Traceback' not in done.err
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ('arguments', 'code'), [(['--classes', 'brid'], 'predict-classes'), (['--device', 'cuda:77'], 'device-missing')]
)
def test_errors_that_need_the_model_leave_nothing(run, photos, tmp_path, arguments, code):
    done = predict(photos, '--run', run, '--out', tmp_path / 'out', *arguments)
    assert (done.code, done.error) == (2, code)
    assert not (tmp_path / 'out').exists()


def test_without_memory_on_the_gpu_the_rest_is_done(run, photos, tmp_path, monkeypatch):
    import torch

    forward = apis_predict.Predictor.forward

    def scarce(self, prepared):
        if prepared[0]['data_samples'].ori_shape[0] == 70:
            raise torch.OutOfMemoryError
        return forward(self, prepared)

    monkeypatch.setattr(apis_predict.Predictor, 'forward', scarce)
    done = predict(photos, '--run', run, '--out', tmp_path / 'out', *LOW)
    assert done.code == 1
    assert 'b c.png: out of GPU memory' in done.err
    assert '(2 images, 40 objects, 1 failed)' in done.out


def test_argument_errors_need_no_torch():
    done = spawn('-X', 'importtime', TOOLS / 'predict.py', 'no_such.jpg')
    assert done.code == 2
    assert done.error == 'model-not-named'
    imported = {line.rpartition('|')[2].strip() for line in done.err.splitlines()}
    assert not imported & {'torch', 'mmdet', 'mmengine', 'mmcv'}
