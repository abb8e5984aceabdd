"""The numbers of an evaluation."""

from __future__ import annotations

import json

import pytest

from mmfinetune.evaluation import render
from tests.builders.errors import codes
from tests.builders.results import CAT, FOUND, A, report_of


def test_ap70_is_not_ap50():
    # 16 of 20 columns: IoU 0.8; 12 of 20: 0.6.
    found = report_of([(1, CAT, (5, 5, 17, 25), 0.9)], things=[(1, CAT, A)])
    assert found.per_class()['cat'] == pytest.approx(
        {'segm_AP': 0.3, 'segm_AP50': 1, 'segm_AP70': 0, 'bbox_AP': 0.3, 'bbox_AP50': 1, 'bbox_AP70': 0}
    )
    assert render.voc_line(found) == 'mask AP at IoU 0.5: 1.000, 0.7: 0.000 (mAP^r of VOC)'


def test_notes():
    (absent,) = report_of().notes()
    assert (absent.code, absent.facts) == ('eval-absent-classes', {'count': 1, 'total': 3, 'names': 'cow'})
    assert codes(report_of(kinds=['segm']).notes()) == ['eval-absent-classes', 'eval-no-boxes']
    assert codes(report_of(kinds=['bbox']).notes()) == ['eval-absent-classes', 'eval-no-masks']
    empty = report_of(FOUND[:1], images=3).notes()[1]
    assert (empty.code, empty.facts) == ('eval-empty-images', {'empty': 2, 'images': 3})
    assert [(note.code, note.facts) for note in report_of([]).notes()[1:]] == [
        ('eval-no-detections', {'kind': 'mask'}),
        ('eval-no-detections', {'kind': 'box'}),
    ]


@pytest.mark.parametrize('engine', ['hotcoco', 'pycocotools'])
def test_nothing_found(engine):
    found = report_of([], engine=engine)
    assert set(found.metrics().values()) == {0, -1}
    assert render.class_rows(found)[-1][2:] == ['0.000'] * 4
    assert [e.count for e in found.worst] == [2, 1]
    assert found.as_dict()['f1'] == {
        'kind': 'segm',
        'score_thr': 0.3,
        'f1': 0.0,
        'best_f1': None,
        'best_score_thr': None,
    }
    assert render.text(found) and render.markdown(found) and render.charts(found)


def test_engines_give_the_same_report():
    hot, own = (report_of(engine=e).as_dict() for e in ('hotcoco', 'pycocotools'))
    assert hot.pop('engine') != own.pop('engine')
    assert hot['metrics'] == pytest.approx(own['metrics'])
    hot.pop('metrics'), own.pop('metrics')
    assert json.dumps(hot) == json.dumps(own)


def test_everything_is_json():
    data = json.loads(json.dumps(report_of().as_dict(), allow_nan=False))
    assert data['images'] == 2
    assert data['objects'] == 3
    assert data['detections'] == {'segm': 3, 'bbox': 3}
    assert data['tide']['segm']['counts'] == {'Cls': 1, 'Loc': 0, 'Both': 0, 'Dupe': 0, 'Bkg': 1, 'Miss': 1}
    assert data['confusion']['classes'] == ['cat', 'dog', 'cow', 'background']
    assert [(w['file_name'], w['errors'], w['what']) for w in data['worst']] == [
        ('image_2.png', 2, 'missed: cat; false: dog'),
        ('image_1.png', 1, 'confused: dog predicted as cow'),
    ]


def test_number_and_threshold_of_the_worst():
    assert len(report_of(worst=1).worst) == 1
    assert report_of(worst=0).worst == []
    # The false dog is gone, the missed cat stays: as many errors, but a lower F1.
    assert [(e.image_id, e.count) for e in report_of(score_thr=0.75).worst] == [(2, 1), (1, 1)]
