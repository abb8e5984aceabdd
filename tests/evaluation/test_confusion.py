from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mmfinetune.evaluation import coco_eval, confusion, error_plots
from mmfinetune.evaluation.coco_eval import TIDE_ERRORS, Tide
from mmfinetune.evaluation.confusion import match
from mmfinetune.evaluation.detections import Truth, read_truth
from mmfinetune.evaluation.stats import KINDS
from tests.builders.results import CAT, COW, DOG, data_set, draw, rows_of, truth_of

A, B, C = (5, 5, 25, 25), (40, 10, 70, 50), (10, 40, 30, 55)
EMPTY = (0, 57, 3, 60)
THINGS = [(1, CAT, A), (1, DOG, B), (2, CAT, B), (2, COW, C)]
PERFECT = [(image, category, box, 0.9) for image, category, box in THINGS]
NEXT = {CAT: DOG, DOG: COW, COW: CAT}


def matrix_of(things, found, score_thr: float = 0.3, kind: str = 'segm') -> list[list[int]]:
    """Rows and columns: cat, dog, cow, background."""
    return match(truth_of(things), rows_of(found, kind), kind).confusion(score_thr).tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_perfect_detections_lie_on_the_diagonal(kind):
    assert matrix_of(THINGS, PERFECT, kind=kind) == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize('kind', KINDS)
def test_swapped_classes(kind):
    found = [(i, NEXT[c], box, s) for i, c, box, s in PERFECT]
    assert matrix_of(THINGS, found, kind=kind) == [[0, 2, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_background():
    assert matrix_of(THINGS, []) == [[0, 0, 0, 2], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert matrix_of([], PERFECT) == [[0] * 4, [0] * 4, [0] * 4, [2, 1, 1, 0]]
    # In another image, or too far off.
    assert matrix_of([(1, CAT, A)], [(2, CAT, A, 0.9), (1, CAT, B, 0.9)]) == [
        [0, 0, 0, 1],
        [0] * 4,
        [0] * 4,
        [2, 0, 0, 0],
    ]


def test_half_is_enough():
    half, less = (5, 5, 25, 15), (5, 5, 25, 14)
    assert matrix_of([(1, CAT, A)], [(1, CAT, half, 0.9)])[0] == [1, 0, 0, 0]
    assert matrix_of([(1, CAT, A)], [(1, CAT, less, 0.9)])[0] == [0, 0, 0, 1]


def test_masks_and_boxes_are_different_things(tmp_path):
    # Two triangles that share a box.
    data = data_set([(1, CAT, (0, 0, 40, 40))])
    data['annotations'][0]['segmentation'] = [[0, 0, 40, 0, 0, 40]]
    truth = Truth(tmp_path, data)
    other = truth.rle({'image_id': 1, 'segmentation': [[40, 40, 40, 0, 0, 40]]})
    row = {'image_id': 1, 'category_id': CAT, 'score': 0.9, 'bbox': [0, 0, 40, 40], 'segmentation': other}
    assert match(truth, [row], 'bbox').confusion(0)[0].tolist() == [1, 0, 0, 0]
    assert match(truth, [row], 'segm').confusion(0)[0].tolist() == [0, 0, 0, 1]


def test_the_best_score_takes_the_object():
    found = [(1, CAT, A, 0.5), (1, DOG, A, 0.8)]
    assert matrix_of([(1, CAT, A)], found) == [[0, 1, 0, 0], [0] * 4, [0] * 4, [1, 0, 0, 0]]
    assert matrix_of([(1, CAT, A)], found, 0.6) == [[0, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert matrix_of([(1, CAT, A)], found, 0.9) == [[0, 0, 0, 1], [0] * 4, [0] * 4, [0] * 4]


def test_the_threshold_itself_counts():
    assert matrix_of([(1, CAT, A)], [(1, CAT, A, 0.3)], 0.3)[0] == [1, 0, 0, 0]


def test_crowd_regions_are_neither_found_nor_missed():
    crowd = [(1, CAT, (0, 0, 60, 60), True)]
    inside = [(1, CAT, A, 0.9), (1, CAT, B, 0.8)]
    assert matrix_of(crowd, inside) == [[0] * 4] * 4
    # As in COCO that of another class is false.
    assert matrix_of(crowd, [(1, DOG, A, 0.9)])[3] == [0, 1, 0, 0]
    # Less than half of it lies inside.
    assert matrix_of([(1, CAT, (0, 0, 14, 60), True)], [(1, CAT, A, 0.9)])[3] == [1, 0, 0, 0]
    # An object in the region goes before it.
    assert matrix_of([*crowd, (1, CAT, A)], inside) == [[1, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    assert match(truth_of(crowd), rows_of(inside), 'segm').f1(0.3) == 1


def hotcoco_eval(data: dict, rows: list[dict], kind: str = 'segm'):
    import hotcoco

    coco = hotcoco.COCO(data)
    return hotcoco.COCOeval(coco, coco.load_res(rows), kind)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('score_thr', [0.0, 0.3, 0.6])
def test_hotcoco_has_the_same_matrix_without_crowd_regions(kind, score_thr):
    data, rows = draw(30, 40, classes=6, seed=1)
    data['annotations'] = [a for a in data['annotations'] if not a['iscrowd']]
    expected = hotcoco_eval(data, rows[kind], kind).confusion_matrix(0.5, 100, score_thr)['matrix']
    found = match(Truth(None, data), rows[kind], kind).confusion(score_thr)
    assert found.tolist() == expected.tolist()
    assert found[:-1, :-1].trace() > 10
    assert found.sum() > found[:-1, :-1].trace() + 20


def test_hotcoco_counts_detections_in_crowd_regions_as_false():
    data, rows = data_set([(1, CAT, (0, 0, 60, 60), True)]), rows_of([(1, CAT, A, 0.9)])
    assert hotcoco_eval(data, rows).confusion_matrix(0.5, 100, 0.3)['matrix'].sum() == 1
    assert match(Truth(None, data), rows, 'segm').confusion(0.3).sum() == 0


def test_hotcoco_diagnostics_of_images_match_within_classes_at_every_score():
    data, rows = data_set([(1, CAT, A)]), rows_of([(1, DOG, A, 0.9), (1, CAT, B, 0.1)])
    evaluator = hotcoco_eval(data, rows)
    evaluator.evaluate()
    theirs = evaluator.image_diagnostics(0.5, 0.3)['img_summary'][1]
    assert (theirs['tp'], theirs['fp'], theirs['fn']) == (0, 2, 1)
    (ours,) = match(Truth(None, data), rows, 'segm').errors(0.3)
    assert (ours.count, len(ours.confused)) == (1, 1)


def test_hotcoco_f_score_is_a_mean_over_classes_with_thresholds_of_their_own():
    things = [(1, CAT, A), (1, CAT, B), (2, CAT, A), (2, DOG, B)]
    found = [(1, CAT, A, 0.9), (1, CAT, B, 0.9), (2, CAT, A, 0.9), (2, DOG, EMPTY, 0.8), (2, DOG, B, 0.2)]
    data, rows = data_set(things), rows_of(found)
    evaluator = hotcoco_eval(data, rows)
    evaluator.run()
    assert evaluator.f_scores()['F1_50'] == pytest.approx((1 + 2 / 3) / 2, abs=0.01)
    assert match(Truth(None, data), rows, 'segm').best_f1() == (pytest.approx(8 / 9), 0.2)


def test_at_most_a_hundred_an_image():
    found = [(1, CAT, EMPTY, 0.9)] * 100 + [(1, CAT, A, 0.8)]
    assert matrix_of([(1, CAT, A)], found) == [[0, 0, 0, 1], [0] * 4, [0] * 4, [100, 0, 0, 0]]


def test_order_of_the_rows_does_not_matter():
    data, rows = draw(20, 20, classes=3, seed=2)
    unique = [{**r, 'score': r['score'] + i * 1e-6} for i, r in enumerate(rows['segm'])]
    truth = Truth(None, data)
    first, second = (match(truth, some, 'segm').confusion(0.2) for some in (unique, unique[::-1]))
    assert first.tolist() == second.tolist()


def test_f1_by_hand():
    # Right: 0.9, 0.6, 0.5; wrong class 0.7; nothing there 0.2; one object missed for ever.
    things = [*THINGS, (2, DOG, (40, 52, 60, 58))]
    found = [(1, CAT, A, 0.9), (1, COW, B, 0.7), (2, CAT, B, 0.6), (2, COW, C, 0.5), (2, COW, EMPTY, 0.2)]
    m = match(truth_of(things), rows_of(found), 'segm')
    assert m.f1(0) == pytest.approx(2 * 3 / (5 + 5))
    assert m.f1(0.3) == pytest.approx(2 * 3 / (4 + 5))
    assert m.f1(0.8) == pytest.approx(2 * 1 / (1 + 5))
    assert m.f1(0.95) == 0
    assert m.best_f1() == pytest.approx((2 * 3 / (4 + 5), 0.5))


def test_best_f1_does_not_split_equal_scores():
    # The right one first, but with the score of two wrong ones.
    found = [(1, CAT, A, 0.5), (1, CAT, EMPTY, 0.5), (2, CAT, EMPTY, 0.5)]
    m = match(truth_of([(1, CAT, A)]), rows_of(found), 'segm')
    assert m.best_f1() == pytest.approx((2 / (3 + 1), 0.5))


def test_best_f1_is_that_at_its_threshold():
    data, rows = draw(20, 30, classes=3, seed=3)
    m = match(Truth(None, data), rows['segm'], 'segm')
    best, score = m.best_f1()
    assert best == pytest.approx(m.f1(score))
    assert best == pytest.approx(max(m.f1(s) for s in set(m.scores)))


def test_threshold_of_the_best_f1_is_short_and_exact():
    found = [(1, CAT, A, 0.7993), (1, CAT, EMPTY, 0.7962), (2, CAT, EMPTY, 0.1)]
    m = match(truth_of([(1, CAT, A)]), rows_of(found), 'segm')
    assert m.best_f1() == (1, 0.799)
    assert m.f1(0.799) == 1
    alone = match(truth_of([(1, CAT, A)]), rows_of(found[:1]), 'segm')
    assert alone.best_f1() == (1, 0.7)


def test_nothing_at_all():
    m = match(truth_of([]), [], 'segm')
    assert m.confusion(0.3).tolist() == [[0] * 4] * 4
    assert (m.f1(0.3), m.best_f1(), m.errors(0.3)) == (1, None, [])
    m = match(truth_of(THINGS), [], 'segm')
    assert (m.f1(0.3), m.best_f1()) == (0, None)


def test_worst_images_by_hand():
    # Image 1: one right. 2: one predicted as another. 3: missed and false. 4: missed. 5: nothing.
    # 6: one right, one missed.
    things = [(1, CAT, A), (2, CAT, A), (3, CAT, A), (4, DOG, A), (6, DOG, A), (6, CAT, B)]
    found = [(1, CAT, A, 0.9), (2, COW, A, 0.9), (3, CAT, EMPTY, 0.9), (6, DOG, A, 0.9), (1, DOG, EMPTY, 0.2)]
    m = match(truth_of(things, images=6), rows_of(found), 'segm')
    worst = m.errors(0.3)
    assert [(e.image_id, e.count, e.right) for e in worst] == [(3, 2, 0), (2, 1, 0), (4, 1, 0), (6, 1, 1)]
    assert [e.f1 for e in worst] == pytest.approx([0, 0, 0, 2 / 3])
    assert [m.describe(e) for e in worst] == [
        'missed: cat; false: cat',
        'confused: cat predicted as cow',
        'missed: dog',
        'missed: cat',
    ]
    assert [e.image_id for e in m.errors(0.1)][:2] == [3, 2]
    assert 1 in [e.image_id for e in m.errors(0.1)]


def test_words_for_false_detections():
    found = [(1, CAT, A, 0.9), (1, CAT, A, 0.8), (1, DOG, A, 0.7), (1, COW, EMPTY, 0.6), (1, COW, EMPTY, 0.5)]
    m = match(truth_of([(1, CAT, A)]), rows_of(found), 'segm')
    assert m.describe(m.errors(0)[0]) == 'false: second cat, dog on cat, 2 cow'


def test_errors_add_up_to_the_matrix():
    data, rows = draw(30, 30, classes=4, seed=4)
    m = match(Truth(None, data), rows['segm'], 'segm')
    matrix, worst = m.confusion(0.3), m.errors(0.3)
    assert sum(len(e.missed) for e in worst) == matrix[:-1, -1].sum()
    assert sum(len(e.false) for e in worst) == matrix[-1].sum()
    assert sum(len(e.confused) for e in worst) == matrix[:-1, :-1].sum() - matrix.trace()
    assert [e.count for e in worst] == sorted((e.count for e in worst), reverse=True)


def test_real_coco(real_data):
    truth = read_truth(real_data / 'coco2017_real/annotations/instances_val2017.json')
    rows = [
        {'image_id': a['image_id'], 'category_id': a['category_id'], 'score': 0.9, 'segmentation': truth.rle(a)}
        for a in truth.data['annotations']
        if not a['iscrowd']
    ]
    m = match(truth, rows, 'segm')
    assert m.confusion(0.5).trace() == len(m.objects) == len(rows)
    assert m.errors(0.5) == []


@pytest.mark.parametrize('count', [1, 20, 30, 80, 300])
def test_picture_of_the_matrix(count):
    rng = np.random.default_rng(count)
    matrix = rng.poisson(0.5, (count + 1, count + 1))
    names = [
        '人',
        'a $price$',
        'a very long name of a class with more than forty letters',
        *(f'class {i}' for i in range(count)),
    ][:count]
    picture = Image.open(io.BytesIO(error_plots.confusion_picture(matrix, names, 'masks')))
    assert picture.format == 'PNG'
    # Names stay legible: each has at least 13 pixels.
    assert picture.height > 13 * min(count, 100)
    assert max(picture.size) < 4000


def test_picture_of_the_matrix_has_numbers_where_there_is_room(monkeypatch):
    from matplotlib.axes import Axes

    written = []
    monkeypatch.setattr(Axes, 'text', lambda self, x, y, text, **_: written.append(text))
    error_plots.confusion_picture(np.array([[12345, 7], [0, 0]]), ['cat'], 'masks')
    assert sorted(written) == ['1e+04', '7']
    written.clear()
    error_plots.confusion_picture(np.ones((41, 41), int), [str(i) for i in range(40)], 'masks')
    assert written == []


def test_picture_of_errors():
    made = Tide(0.5, {e: 0.1 * i for i, e in enumerate(TIDE_ERRORS)}, dict.fromkeys(TIDE_ERRORS, 9))
    one = Image.open(io.BytesIO(error_plots.tide_picture({'segm': made})))
    two = Image.open(io.BytesIO(error_plots.tide_picture({'segm': made, 'bbox': made})))
    assert two.height > one.height > 300
    perfect = coco_eval.tide(data_set(THINGS), rows_of(PERFECT), 'segm')
    assert Image.open(io.BytesIO(error_plots.tide_picture({'segm': perfect}))).size == one.size


def test_background_is_called_so():
    assert confusion.NOTHING == 'background'
