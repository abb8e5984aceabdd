from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from mmfinetune.evaluation.detections import Truth
from mmfinetune.evaluation.report import Report, analyse
from tests.builders.results import CAT, COW, DOG, data_set, rows_of, truth_of

A, B, C = (5, 5, 25, 25), (40, 10, 70, 50), (10, 40, 30, 55)
THINGS = [(1, CAT, A), (1, DOG, B), (2, CAT, B)]
# A cat right, a dog taken for a cow, a cat missed and a dog of nothing; the cow has no objects.
FOUND = [(1, CAT, A, 0.9), (1, COW, B, 0.8), (2, DOG, (0, 57, 3, 60), 0.7)]


def made(found=FOUND, kinds=('segm', 'bbox'), things=THINGS, images=2, **options) -> Report:
    rows = {kind: rows_of(found, kind) for kind in kinds}
    return analyse(truth_of(things, images=images), rows, {'predictions': 'p'}, **options)


def table(rows) -> dict[str, list[str]]:
    return {first: rest for first, *rest in rows}


def test_classes_by_hand():
    rows = table(made().class_rows())
    half = f'{51 / 101:.3f}'
    assert rows['class'] == ['objects', 'mask AP', 'mask AP50', 'mask AP70', 'box AP']
    assert rows['cat'] == ['2', half, half, half, half]
    assert rows['dog'] == ['1', '0.000', '0.000', '0.000', '0.000']
    assert rows['cow'] == ['0', '-', '-', '-', '-']
    mean = f'{51 / 101 / 2:.3f}'  # of the two classes that have objects
    assert rows['mean'] == ['3', mean, mean, mean, mean]


def test_numbers_without_truth_are_dashes_and_none():
    found = made()
    rows = table(found.summary_rows())
    assert list(rows) == ['', 'mask', 'box']
    assert rows['mask'][rows[''].index('APl')] == '-'
    assert '-1' not in found.text().replace('0-1', '')
    assert found.metrics()['coco/segm_mAP_l'] == -1  # as a run logs it
    data = found.as_dict()
    assert data['metrics']['coco/segm_mAP_l'] is None
    assert data['metrics']['voc/segm_AP50'] == pytest.approx(51 / 101 / 2)
    assert data['metrics']['voc/segm_AP70'] == pytest.approx(51 / 101 / 2)
    assert data['per_class']['cow'] == {'objects': 0}


def test_ap70_is_not_ap50():
    # 16 of 20 columns: IoU 0.8; 12 of 20: 0.6.
    found = made([(1, CAT, (5, 5, 17, 25), 0.9)], things=[(1, CAT, A)])
    assert found.per_class()['cat'] == pytest.approx(
        {'segm_AP': 0.3, 'segm_AP50': 1, 'segm_AP70': 0, 'bbox_AP': 0.3, 'bbox_AP50': 1, 'bbox_AP70': 0}
    )
    assert found.voc_line() == 'mask AP at IoU 0.5: 1.000, 0.7: 0.000 (mAP^r of VOC)'


def test_notes():
    assert made().notes() == ['1 of 3 classes have no objects here and count in no mean: cow']
    assert made(kinds=['segm']).notes()[1:] == ['No boxes were given (--boxes): the numbers are those of masks.']
    assert made(kinds=['bbox']).notes()[1:] == ['No masks were given: the numbers are those of boxes.']
    assert made(FOUND[:1], kinds=['segm', 'bbox'], images=3).notes()[1:] == [
        'There is no detection in 2 of 3 images: is this the right split?'
    ]
    assert made([]).notes()[1:] == [
        'There is no mask detection at all: every AP is 0.',
        'There is no box detection at all: every AP is 0.',
    ]


@pytest.mark.parametrize('engine', ['hotcoco', 'pycocotools'])
def test_nothing_found(engine):
    found = made([], engine=engine)
    assert set(found.metrics().values()) == {0, -1}
    assert table(found.class_rows())['mean'][1:] == ['0.000'] * 4
    assert [e.count for e in found.worst] == [2, 1]
    assert found.as_dict()['f1'] == {
        'kind': 'segm',
        'score_thr': 0.3,
        'f1': 0.0,
        'best_f1': None,
        'best_score_thr': None,
    }
    assert found.text() and found.markdown() and found.charts()


def test_boxes_alone():
    found = made(kinds=['bbox'])
    assert found.kind == 'bbox'
    assert table(found.class_rows())['class'] == ['objects', 'box AP', 'box AP50', 'box AP70']
    assert found.f1_line().startswith('F1 of boxes')
    assert 'VOC' not in found.voc_line()


def test_engines_give_the_same_report():
    hot, own = (made(engine=e).as_dict() for e in ('hotcoco', 'pycocotools'))
    assert hot.pop('engine') != own.pop('engine')
    assert hot['metrics'] == pytest.approx(own['metrics'])
    hot.pop('metrics'), own.pop('metrics')
    assert json.dumps(hot) == json.dumps(own)


def test_csv_files():
    found = made()
    rows = list(csv.DictReader(io.StringIO(found.class_csv())))
    assert [r['class'] for r in rows] == ['cat', 'dog', 'cow']
    assert float(rows[0]['segm_AP50']) == found.per_class()['cat']['segm_AP50']
    assert rows[2]['segm_AP'] == rows[2]['bbox_AP70'] == ''
    matrix = list(csv.reader(io.StringIO(found.confusion_csv())))
    assert matrix == [
        ['true \\ predicted', 'cat', 'dog', 'cow', 'background'],
        ['cat', '1', '0', '0', '1'],
        ['dog', '0', '0', '1', '0'],
        ['cow', '0', '0', '0', '0'],
        ['background', '0', '1', '0', '0'],
    ]


def test_page():
    data = data_set(THINGS)
    data['categories'][0]['name'] = 'a|b'
    found = analyse(Truth('made.json', data), {'segm': rows_of(FOUND)}, {'predictions': 'p|q'})
    page = found.markdown()
    assert '| a\\|b' in page
    assert '![' not in page  # no picture was made
    found.pictures = {1: 'worst/01_image 1.jpg'}
    page = found.markdown()
    assert '2. `image_1.png`: 1 error, F1 0.500. confused: dog taken for cow' in page
    assert '![confused: dog taken for cow](<worst/01_image 1.jpg>)' in page
    # All tables have rows of one width.
    for block in page.split('\n\n'):
        if block.startswith('|'):
            assert len({line.replace('\\|', '').count('|') for line in block.splitlines()}) == 1


def test_everything_is_json():
    data = json.loads(json.dumps(made().as_dict(), allow_nan=False))
    assert data['images'] == 2
    assert data['objects'] == 3
    assert data['detections'] == {'segm': 3, 'bbox': 3}
    assert data['tide']['segm']['counts'] == {'Cls': 1, 'Loc': 0, 'Both': 0, 'Dupe': 0, 'Bkg': 1, 'Miss': 1}
    assert data['confusion']['classes'] == ['cat', 'dog', 'cow', 'background']
    assert [(w['file_name'], w['errors'], w['what']) for w in data['worst']] == [
        ('image_2.png', 2, 'missed: cat; false: dog'),
        ('image_1.png', 1, 'confused: dog taken for cow'),
    ]


def test_number_and_threshold_of_the_worst():
    assert len(made(worst=1).worst) == 1
    assert made(worst=0).worst == []
    # The false dog is gone, the missed cat stays: as many errors, but a lower F1.
    assert [(e.image_id, e.count) for e in made(score_thr=0.75).worst] == [(2, 1), (1, 1)]


@pytest.mark.parametrize('kinds', [('segm', 'bbox'), ('bbox',)])
@pytest.mark.parametrize('factor', [1, 30])
def test_pictures(tmp_path, kinds, factor):
    """Of small and of large images; the panel of what is wrong differs from the image there."""
    size = 60 * factor, 80 * factor

    def big(things):
        return [(i, c, tuple(factor * v for v in box), *rest) for i, c, box, *rest in things]

    data = data_set(big(THINGS), size=size)
    rows = {}
    for kind in kinds:
        rows[kind] = rows_of(big(FOUND), kind)
        if kind == 'segm':
            from tests.builders.results import rle_of

            for row, (_, _, box, _) in zip(rows[kind], big(FOUND), strict=True):
                row['segmentation'] = rle_of(box, size)
    for image in data['images']:
        Image.fromarray(np.full((*size, 3), 128, np.uint8)).save(tmp_path / image['file_name'])
    found = analyse(Truth('made.json', data), rows, {})
    drawn = found.draw_worst(tmp_path)
    assert list(drawn) == ['worst/01_image_2.jpg', 'worst/02_image_1.jpg']
    assert found.pictures == {2: 'worst/01_image_2.jpg', 1: 'worst/02_image_1.jpg'}
    picture = np.array(Image.open(io.BytesIO(drawn['worst/02_image_1.jpg'])))
    assert picture.shape[1] <= 3200
    third = picture.shape[1] // 3
    # The dog, right in the truth and wrong in the last panel, and the cat, which is right.
    dog, cat = (0.6, 0.55), (0.25, 0.19)
    top = picture.shape[0] - third * 60 / 80

    def tinted(panel: int, place: tuple[float, float]) -> bool:
        y, x = int(top + place[0] * (picture.shape[0] - top)), int(panel * third + place[1] * third)
        return bool(np.ptp(picture[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))) > 25)

    if kinds[0] == 'segm':
        assert [tinted(0, dog), tinted(2, dog)] == [True, True]
        assert [tinted(0, cat), tinted(1, cat), tinted(2, cat)] == [True, True, False]
