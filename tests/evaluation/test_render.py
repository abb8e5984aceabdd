"""A report as tables, pages and pictures."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from PIL import Image

from mmfinetune.evaluation import render
from mmfinetune.evaluation.detections import Truth
from mmfinetune.evaluation.report import analyse
from mmfinetune.evaluation.stats import stat_rows
from tests.builders.results import FOUND, THINGS, data_set, report_of, rle_of, rows_of


def table(rows) -> dict[str, list[str]]:
    return {first: rest for first, *rest in rows}


def test_classes_by_hand():
    rows = table(render.class_rows(report_of()))
    half = f'{51 / 101:.3f}'
    assert rows['class'] == ['objects', 'mask AP', 'mask AP50', 'mask AP70', 'box AP']
    assert rows['cat'] == ['2', half, half, half, half]
    assert rows['dog'] == ['1', '0.000', '0.000', '0.000', '0.000']
    assert rows['cow'] == ['0', '-', '-', '-', '-']
    mean = f'{51 / 101 / 2:.3f}'  # of the two classes that have objects
    assert rows['mean'] == ['3', mean, mean, mean, mean]


def test_numbers_without_truth_are_dashes_and_none():
    found = report_of()
    rows = table(stat_rows(found.metrics()))
    assert list(rows) == ['', 'mask', 'box']
    assert rows['mask'][rows[''].index('APl')] == '-'
    assert '-1' not in render.text(found).replace('0-1', '')
    assert found.metrics()['coco/segm_mAP_l'] == -1  # as a run logs it
    data = found.as_dict()
    assert data['metrics']['coco/segm_mAP_l'] is None
    assert data['metrics']['voc/segm_AP50'] == pytest.approx(51 / 101 / 2)
    assert data['metrics']['voc/segm_AP70'] == pytest.approx(51 / 101 / 2)
    assert data['per_class']['cow'] == {'objects': 0}


def test_boxes_alone():
    found = report_of(kinds=['bbox'])
    assert found.kind == 'bbox'
    assert table(render.class_rows(found))['class'] == ['objects', 'box AP', 'box AP50', 'box AP70']
    assert render.f1_line(found).startswith('F1 of boxes')
    assert 'VOC' not in render.voc_line(found)


def test_csv_files():
    found = report_of()
    rows = list(csv.DictReader(io.StringIO(render.class_csv(found))))
    assert [r['class'] for r in rows] == ['cat', 'dog', 'cow']
    assert float(rows[0]['segm_AP50']) == found.per_class()['cat']['segm_AP50']
    assert rows[2]['segm_AP'] == rows[2]['bbox_AP70'] == ''
    matrix = list(csv.reader(io.StringIO(render.confusion_csv(found))))
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
    page = render.markdown(found)
    assert '| a\\|b' in page
    assert '![' not in page  # no picture was made
    found.pictures = {1: 'worst/01_image 1.jpg'}
    page = render.markdown(found, ['tide.png'])
    assert '](tide.png)' in page and 'confusion.png' not in page
    assert '2. `image_1.png`: 1 error, F1 0.500. confused: dog predicted as cow' in page
    assert '![confused: dog predicted as cow](<worst/01_image 1.jpg>)' in page
    # All tables have rows of one width.
    for block in page.split('\n\n'):
        if block.startswith('|'):
            assert len({line.replace('\\|', '').count('|') for line in block.splitlines()}) == 1


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
            for row, (_, _, box, _) in zip(rows[kind], big(FOUND), strict=True):
                row['segmentation'] = rle_of(box, size)
    for image in data['images']:
        Image.fromarray(np.full((*size, 3), 128, np.uint8)).save(tmp_path / image['file_name'])
    found = analyse(Truth('made.json', data), rows, {})
    drawn = render.draw_worst(found, tmp_path)
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
