from __future__ import annotations

import copy
import json
import time

import numpy as np
import pytest

from mmfinetune.evaluation import coco_eval
from mmfinetune.evaluation.coco_eval import ENGINES, TIDE_ERRORS
from mmfinetune.evaluation.detections import read_truth
from mmfinetune.evaluation.stats import KINDS, STATS
from tests.builders.results import CAT, CATEGORIES, COW, DOG, data_set, draw, rows_of, write
from tests.builders.runs import spawn

A, B, C = (5, 5, 25, 25), (40, 10, 70, 50), (10, 40, 30, 55)
THINGS = [(1, CAT, A), (1, DOG, B), (2, CAT, B), (2, COW, C)]
PERFECT = [(image, category, box, 0.9) for image, category, box in THINGS]
RUN_ENGINE = """
import json, resource, sys, time
from pathlib import Path
from mmfinetune.evaluation import coco_eval
truth, segm, bbox, engine = sys.argv[1:]
data = json.loads(Path(truth).read_text())
rows = {'segm': json.loads(Path(segm).read_text()), 'bbox': json.loads(Path(bbox).read_text())}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {}
for kind, some in rows.items():
    start, cpu = time.perf_counter(), time.process_time()
    stats = coco_eval.evaluate(data, some, kind, engine).stats.tolist()
    found[kind] = {'stats': stats, 'seconds': time.perf_counter() - start,
                   'cpu': time.process_time() - cpu}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({**found, 'before': before / 1024, 'peak': peak / 1024}))
"""


@pytest.fixture(scope='module')
def drawn() -> tuple[dict, dict[str, list[dict]]]:
    return draw(60, 100)


def test_drawn_data_is_as_wide_as_real_data(drawn):
    data, rows = drawn
    assert len(rows['segm']) == len(rows['bbox']) == 6000
    assert {a['iscrowd'] for a in data['annotations']} == {0, 1}
    assert 2 < len(data['annotations']) / 60 < 3
    stats = coco_eval.evaluate(data, rows['segm'], 'segm').stats
    assert ((stats > 0.02) & (stats < 0.9)).all()  # sizes of all kinds


@pytest.mark.parametrize('kind', KINDS)
def test_both_engines_give_the_same(drawn, kind):
    data, rows = drawn
    first, second = (coco_eval.evaluate(data, rows[kind], kind, e) for e in ENGINES)
    assert first.stats == pytest.approx(second.stats, rel=0, abs=1e-12)
    assert first.names == second.names
    np.testing.assert_allclose(first.precision, second.precision, rtol=0, atol=1e-12)
    np.testing.assert_allclose(first.iou_thrs, second.iou_thrs)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('kind', KINDS)
def test_nothing_given_is_changed(drawn, engine, kind):
    data, rows = drawn
    before = copy.deepcopy((data, rows))
    coco_eval.evaluate(data, rows[kind], kind, engine)
    coco_eval.tide(data, rows[kind], kind)
    assert (data, rows) == before


@pytest.mark.parametrize('engine', ENGINES)
def test_ground_truth_as_it_is_read_gives_the_same(drawn, tmp_path, engine):
    """The reader keeps polygons as arrays."""
    data, rows = drawn
    truth = read_truth(write(tmp_path / 'a.json', data))
    assert not isinstance(truth.data['annotations'][0]['segmentation'][0], list)
    expected = coco_eval.evaluate(data, rows['segm'], 'segm', engine)
    assert (coco_eval.evaluate(truth.data, rows['segm'], 'segm', engine).stats == expected.stats).all()
    assert coco_eval.tide(truth.data, rows['segm'], 'segm') == coco_eval.tide(data, rows['segm'], 'segm')


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('kind', KINDS)
def test_perfect_detections(engine, kind):
    found = coco_eval.evaluate(data_set(THINGS), rows_of(PERFECT, kind), kind, engine)
    there = found.stats > -1
    assert there.tolist() == [n not in ('mAP_l', 'AR_l@100') for n in STATS]
    assert found.stats[there] == pytest.approx(1)
    for name in found.names:
        for iou in (None, 0.5, 0.7, 0.95):
            assert found.ap(name, iou) == pytest.approx(1)
    assert found.ap() == pytest.approx(1)
    assert found.metrics()[f'{kind}_mAP_50'] == pytest.approx(1)
    assert list(found.metrics()) == [f'{kind}_{name}' for name in STATS]


@pytest.mark.parametrize('engine', ENGINES)
def test_ap_belongs_to_its_class_whatever_the_order_of_ids(engine):
    # Only the cats are found; their id is the largest, their place the first.
    rows = rows_of([r for r in PERFECT if r[1] == CAT])
    found = coco_eval.evaluate(data_set(THINGS), rows, 'segm', engine)
    assert found.names == tuple(c['name'] for c in CATEGORIES) == ('cat', 'dog', 'cow')
    assert {n: found.ap(n) for n in found.names} == pytest.approx({'cat': 1, 'dog': 0, 'cow': 0})
    assert found.ap() == pytest.approx(1 / 3)
    turned = coco_eval.evaluate(data_set(THINGS), rows, 'segm', engine, cat_ids=[COW, CAT])
    assert turned.names == ('cow', 'cat')
    assert [turned.ap(n) for n in turned.names] == pytest.approx([0, 1])


@pytest.mark.parametrize('engine', ENGINES)
def test_ap_at_a_threshold_by_hand(engine):
    # 16 of 20 columns: IoU 0.8.
    rows = rows_of([(1, CAT, (5, 5, 21, 25), 0.9)])
    found = coco_eval.evaluate(data_set([(1, CAT, A)]), rows, 'segm', engine)
    assert [found.ap('cat', t) for t in (0.5, 0.7, 0.75, 0.85)] == pytest.approx([1, 1, 1, 0])
    assert found.ap('cat') == pytest.approx(0.7)  # 0.5 to 0.8
    assert found.ap('cat', 0.42) is None
    two = coco_eval.evaluate(data_set([(1, CAT, A), (2, CAT, A)]), rows, 'segm', engine)
    # Precision 1 up to recall 0.5: at 51 of 101 points.
    assert two.ap('cat', 0.5) == pytest.approx(51 / 101)


@pytest.mark.parametrize('engine', ENGINES)
def test_class_without_objects_has_no_ap_and_is_in_no_mean(engine):
    things = [t for t in THINGS if t[1] != COW]
    found = coco_eval.evaluate(data_set(things), rows_of(PERFECT), 'segm', engine)
    assert found.ap('cow') is None
    assert found.ap('cow', 0.5) is None
    assert found.ap() == pytest.approx(1)


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('kind', KINDS)
def test_no_detections(engine, kind):
    found = coco_eval.evaluate(data_set(THINGS), [], kind, engine)
    assert found.stats.tolist() == [-1 if n in ('mAP_l', 'AR_l@100') else 0 for n in STATS]
    assert [found.ap(n) for n in found.names] == [0, 0, 0]


@pytest.mark.parametrize('engine', ENGINES)
def test_chosen_images_and_thresholds(engine):
    rows = rows_of([r for r in PERFECT if r[0] == 1])
    both = coco_eval.evaluate(data_set(THINGS), rows, 'segm', engine)
    first = coco_eval.evaluate(data_set(THINGS), rows, 'segm', engine, img_ids=[1], iou_thrs=[0.5, 0.9])
    assert both.ap() < 0.9
    assert first.ap() == pytest.approx(1)
    assert first.precision.shape[0] == 2
    assert first.ap('cat', 0.9) == pytest.approx(1)
    assert first.ap('cat', 0.7) is None
    assert set(coco_eval.evaluate(data_set(THINGS), rows, 'segm', engine, img_ids=[]).stats) == {-1}


@pytest.mark.parametrize('kind', KINDS)
def test_tide_has_nothing_to_say_of_perfect_detections(kind):
    found = coco_eval.tide(data_set(THINGS), rows_of(PERFECT, kind), kind)
    assert found.ap50 == pytest.approx(1)
    assert found.d_ap == pytest.approx(dict.fromkeys(TIDE_ERRORS, 0))
    assert found.counts == dict.fromkeys(TIDE_ERRORS, 0)


def shifted(box, share: float):
    """The box moved to the right by a share of its width."""
    step = round(share * (box[2] - box[0]))
    return box[0] + step, box[1], box[2] + step, box[3]


NEXT = {CAT: DOG, DOG: COW, COW: CAT}
# IoU of a shape moved by half of its width: 1/3.
MISTAKES = {
    'Cls': [(i, NEXT[c], box, s) for i, c, box, s in PERFECT],
    'Loc': [(i, c, shifted(box, 0.5), s) for i, c, box, s in PERFECT],
    'Both': [(i, NEXT[c], shifted(box, 0.5), s) for i, c, box, s in PERFECT],
    'Bkg': [
        (1, DOG, (0, 57, 3, 60), 0.9),
        (2, CAT, (0, 0, 3, 3), 0.9),
        (2, COW, (0, 0, 3, 3), 0.9),
        (1, CAT, (0, 57, 3, 60), 0.9),
    ],
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('mistake', MISTAKES)
def test_tide_names_the_mistake(mistake, kind):
    found = coco_eval.tide(data_set(THINGS), rows_of(MISTAKES[mistake], kind), kind)
    missed = mistake not in ('Cls', 'Loc')
    assert found.ap50 == 0
    assert found.counts == {e: 4 * (e == mistake or (e == 'Miss' and missed)) for e in TIDE_ERRORS}
    # Mended they are right; a detection of nothing can only be taken away.
    assert found.d_ap[mistake] == pytest.approx(0 if missed else 1)


def test_tide_duplicates():
    twice = [(i, c, box, 0.95) for i, c, box, _ in PERFECT]
    found = coco_eval.tide(data_set(THINGS), rows_of(PERFECT + twice), 'segm')
    assert found.counts == {e: 4 * (e == 'Dupe') for e in TIDE_ERRORS}
    # Of the cats two are right, then two doubles come: the second right one is never behind one.
    assert found.ap50 == pytest.approx(1)
    # A double of the first cat before the second cat: precision 1, 1/2, 2/3.
    rows = rows_of([(1, CAT, A, 0.9), (1, CAT, A, 0.8), (2, CAT, B, 0.7)])
    found = coco_eval.tide(data_set([(1, CAT, A), (2, CAT, B)]), rows, 'segm')
    assert found.ap50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found.d_ap['Dupe'] == pytest.approx(1 - found.ap50)


def test_tide_of_no_detections():
    found = coco_eval.tide(data_set(THINGS), [], 'segm')
    assert (found.ap50, found.counts['Miss']) == (0, 4)
    found = coco_eval.tide(data_set(THINGS), rows_of(PERFECT[:1]), 'segm')
    # One of two cats, no dog, no cow.
    assert found.ap50 == pytest.approx(51 / 101 / 3)
    assert found.counts == {e: 3 * (e == 'Miss') for e in TIDE_ERRORS}
    assert found.d_ap['Miss'] > 0.1


@pytest.mark.parametrize('kind', KINDS)
def test_tide_starts_from_the_ap_of_coco(drawn, kind):
    data, rows = drawn
    found = coco_eval.tide(data, rows[kind], kind)
    assert found.ap50 == pytest.approx(coco_eval.evaluate(data, rows[kind], kind).ap(None, 0.5))
    assert all(n > 0 for n in found.counts.values())


@pytest.mark.slow
def test_scale(tmp_path):
    """1,449 images with 100 detections each, each engine in a process of its own."""
    start = time.perf_counter()
    data, rows = draw(1449, 100)
    files = [
        write(tmp_path / 'truth.json', data),
        *(write(tmp_path / f'{kind}.json', rows[kind]) for kind in ('segm', 'bbox')),
    ]
    print(
        f'\n{len(data["annotations"]):,} objects, {len(rows["segm"]):,} detections, drawn in '
        f'{time.perf_counter() - start:.0f} s'
    )
    del data, rows
    found = {}
    for engine in ENGINES:
        done = spawn('-c', RUN_ENGINE, *files, engine, timeout=1800)
        assert done.code == 0, done.err
        found[engine] = json.loads(done.out)
        times = ', '.join(
            f'{KINDS[k]} {found[engine][k]["seconds"]:.2f} s (CPU {found[engine][k]["cpu"]:.2f} s)' for k in KINDS
        )
        print(
            f'{engine}: {times}, peak {found[engine]["peak"]:,.0f} MiB '
            f'({found[engine]["before"]:,.0f} MiB of it before: the files as Python objects)'
        )
    hot, own = found['hotcoco'], found['pycocotools']
    for kind in KINDS:
        worst = np.abs(np.subtract(hot[kind]['stats'], own[kind]['stats'])).max()
        print(
            f'{kind}: largest difference of the 12 numbers {worst:.1e}; '
            + ', '.join(f'{n} {v:.3f}' for n, v in zip(STATS, hot[kind]['stats'], strict=True))
        )
        assert worst < 1e-9
        assert all(0.02 < v < 0.9 for v in hot[kind]['stats'])
