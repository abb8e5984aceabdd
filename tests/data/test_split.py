"""Stratified, grouped, seeded splits of COCO files."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from mmfinetune.data import split, stratify
from tests.builders.errors import codes, refused

ROOMY = np.array([0.7, 0.15, 0.15])


def coco(images: dict[str, list[str]], classes: list[str] | None = None, **extra) -> dict:
    """A COCO file from the classes of the objects in each image."""
    classes = classes or sorted({c for objects in images.values() for c in objects})
    annotations, listed = [], []
    for i, (name, objects) in enumerate(images.items()):
        listed.append({'id': 100 + i, 'file_name': name, 'width': 20, 'height': 10, 'camera': i})
        for c in objects:
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': 100 + i,
                    'iscrowd': 0,
                    'category_id': 7 + classes.index(c),
                    'bbox': [1, 1, 3, 3],
                    'area': 9,
                    'segmentation': [[1, 1, 4, 1, 4, 4, 1, 4]],
                }
            )
    return {
        'images': listed,
        'annotations': annotations,
        **extra,
        'categories': [{'id': 7 + i, 'name': c} for i, c in enumerate(classes)],
    }


def many(count: int = 200, seed: int = 0) -> dict[str, list[str]]:
    """Images with several classes each, from common to rare, and some without any."""
    rng = random.Random(seed)
    return {
        f'{i:04d}.jpg': [
            c
            for c, share in zip('abcdef', (0.6, 0.4, 0.2, 0.1, 0.05, 0.02), strict=True)
            for _ in range(rng.randint(1, 3))
            if rng.random() < share
        ]
        for i in range(count)
    }


def save(folder: Path, data: dict, name: str = 'instances_all.json') -> Path:
    path = folder / 'annotations' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding='utf-8')
    return path


def names_in(report: split.Report) -> dict[str, set[str]]:
    return {s: {i['file_name'] for i in json.loads(p.read_text())['images']} for s, p in report.files.items()}


def test_a_split_loses_and_changes_nothing(tmp_path):
    whole = coco(many(), info={'year': 2026, 'ü': '"\\'}, licenses=[{'id': 1}], made_by=['x', 1.5])
    path = save(tmp_path, whole)
    before = path.read_bytes()
    report = split.split_file(tmp_path)
    parts = [json.loads(p.read_text()) for p in report.files.values()]
    assert [p.name for p in report.files.values()] == [
        'instances_train.json',
        'instances_val.json',
        'instances_test.json',
    ]
    assert path.read_bytes() == before
    for key in ('images', 'annotations'):
        together = [x for part in parts for x in part[key]]
        assert sorted(together, key=lambda x: x['id']) == whole[key]
    for part in parts:
        assert {k: part[k] for k in ('info', 'licenses', 'made_by', 'categories')} == {
            k: whole[k] for k in ('info', 'licenses', 'made_by', 'categories')
        }
        ids = [i['id'] for i in part['images']]
        assert ids == sorted(ids)  # the order of the file
        assert {a['image_id'] for a in part['annotations']} <= set(ids)


def test_every_class_comes_near_its_share(tmp_path):
    save(tmp_path, coco(many(400)))
    report = split.split_file(tmp_path)
    totals = report.images.sum(0)
    wanted = np.outer(ROOMY, totals)
    # Less than an image is rounding.
    assert (np.abs(report.images - wanted) < 1).all()
    assert (np.abs(report.sizes - 400 * ROOMY) <= 4).all()
    objects = report.objects[:, totals >= 40]
    assert (np.abs(objects / np.maximum(objects.sum(0), 1) - ROOMY[:, None])[:, objects.sum(0) > 0] < 0.05).all()


def test_better_than_chance():
    rng = np.random.RandomState(3)
    labels = (rng.rand(300, 12) < np.geomspace(0.5, 0.02, 12)).astype(int)
    counts = np.column_stack([labels, np.ones(300, int)])

    def off(where):
        found = np.stack([counts[where == s].sum(0) for s in range(3)])
        return np.abs(found - np.outer(ROOMY, counts.sum(0))).max()

    drawn = [off(rng.choice(3, 300, p=ROOMY)) for _ in range(20)]
    assert off(stratify.stratify(counts, ROOMY)) < 1 < 3 < min(drawn)


def test_same_seed_same_split_whatever_the_order_in_the_file(tmp_path):
    whole = coco(many())
    save(tmp_path / 'a', whole)
    mixed = json.loads(json.dumps(whole))
    for key in ('images', 'annotations', 'categories'):
        random.Random(5).shuffle(mixed[key])
    for image in mixed['images']:
        image['id'] += 1000
    for annotation in mixed['annotations']:
        annotation['image_id'] += 1000
    save(tmp_path / 'b', mixed)
    first, second = (names_in(split.split_file(tmp_path / f, seed=3)) for f in 'ab')
    assert first == second
    other = names_in(split.split_file(tmp_path / 'a', seed=4, overwrite=True))
    assert other != first


def test_the_split_of_seed_0_is_held():
    """The same on every machine and with every release of NumPy."""
    labels = np.array([[i % 2 == 0, i % 3 == 0, i % 7 == 0, 1] for i in range(20)], int)
    assert stratify.stratify(labels, ROOMY).tolist() == HELD


HELD = [2, 0, 0, 0, 1, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0]


@pytest.mark.parametrize('seed', range(5))
def test_rare_classes_reach_every_split_where_they_can(tmp_path, seed):
    images = {f'{i:03d}.jpg': ['common'] for i in range(60)}
    for name, count in (('one', 1), ('two', 2), ('three', 3), ('four', 4)):
        images |= {f'{name}{i}.jpg': ['common', name] for i in range(count)}
    save(tmp_path, coco(images))
    report = split.split_file(tmp_path, seed=seed)
    found = {n: report.images[:, i].tolist() for i, n in enumerate(report.names)}
    assert found['one'] == [1, 0, 0]
    assert found['two'] == [1, 1, 0]
    assert found['three'] == [1, 1, 1]
    assert sorted(found['four']) == [1, 1, 2]
    text = report.text()
    assert 'one: none in val and test, since it has only 1 image' in text
    assert 'two: none in test, since it has only 2 images' in text
    assert 'three: none' not in text


def test_rare_classes_that_share_images_still_reach_every_split():
    # b is in g1, g2, g3; c in g1, g4; d in g2, g5: greedy choices can leave b in two splits only.
    groups = [[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]] + [[0, 0, 0]] * 15
    counts = np.array([[*g, 1] for g in groups])
    for seed in range(10):
        where = stratify.best_of(counts, counts * 0, ROOMY, seed)
        assert {*where[counts[:, 0] > 0]} == {0, 1, 2}, seed


def test_no_split_stays_empty_even_if_every_class_has_one_image(tmp_path):
    save(tmp_path, coco({f'{i}.jpg': [f'c{i}'] for i in range(3)}))
    assert split.split_file(tmp_path).sizes.tolist() == [1, 1, 1]


def test_images_without_objects_and_with_crowds_only_are_spread(tmp_path):
    images = {f'{i:03d}.jpg': ['a'] if i % 2 else [] for i in range(80)}
    whole = coco(images)
    crowded = [i['id'] for i in whole['images'] if i['id'] % 2 == 0][:20]
    whole['annotations'] += [
        {
            'id': 5000 + i,
            'image_id': i,
            'category_id': 7,
            'iscrowd': 1,
            'bbox': [0, 0, 5, 5],
            'area': 25,
            'segmentation': {'size': [10, 20], 'counts': [0, 200]},
        }
        for i in crowded
    ]
    save(tmp_path, whole)
    report = split.split_file(tmp_path)
    assert report.names == ['a', split.NO_OBJECTS]
    assert report.images.sum(1).tolist() == report.sizes.tolist() == [56, 12, 12]
    assert report.images[:, 1].tolist() == [28, 6, 6]
    assert report.objects.sum() == 40


@pytest.mark.parametrize(
    ('pattern', 'key'), [(r'^(.+)_\d+\.', lambda n: n.rsplit('_')[0]), (r'^[^_]+', lambda n: n.split('_')[0])]
)
def test_a_series_is_never_torn(tmp_path, pattern, key):
    rng = random.Random(1)
    images = {f'film{f}_{i:02d}.jpg': [rng.choice('abc')] for f in range(30) for i in range(rng.randint(1, 9))}
    save(tmp_path, coco(images))
    report = split.split_file(tmp_path, group_by=pattern)
    films = [{key(n) for n in names} for names in names_in(report).values()]
    assert sum(map(len, films)) == 30 == len(set.union(*films))
    assert f'30 series by {pattern!r}' in report.text()
    assert (np.abs(report.sizes / len(images) - ROOMY) < 0.08).all()


def test_images_that_match_nothing_stand_alone_and_are_counted(tmp_path):
    images = {**{f's/a_{i}.jpg': ['x'] for i in range(5)}, **{f'{i}.png': ['x'] for i in range(20)}}
    save(tmp_path, coco(images))
    report = split.split_file(tmp_path, group_by=r'(\w+)_\d')
    assert '1 series' in report.text()
    assert '20 images match nothing and stand alone' in report.text()
    assert sorted(report.sizes) == [4, 4, 17]


def test_a_group_that_matches_emptily_is_no_series():
    keys, _ = split.series_of(['num_797.jpg', 'num_1797.jpg', 'num_1798.jpg'], r'num_(\d*)\d{3}')
    assert len(set(keys)) == 2
    keys, _ = split.series_of(['ax', 'a1', 'a2'], r'a(x)?')
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ('given', 'result'),
    [
        ([70, 15, 15], [0.7, 0.15, 0.15]),
        ([7, 1.5, 1.5], [0.7, 0.15, 0.15]),
        ([80, 20], [0.8, 0.2]),
        ([3, 1, 0], [0.75, 0.25]),
        ([1, 1, 2], [0.25, 0.25, 0.5]),
    ],
)
def test_ratios_are_normalised(given, result):
    assert split.shares(given) == pytest.approx(result)


@pytest.mark.parametrize(
    'ratios', [[70], [70, 10, 10, 10], [0, 50, 50], [70, 0, 30], [70, -1, 31], [float('nan'), 1, 1], [float('inf'), 1]]
)
def test_ratios_that_make_no_split(ratios):
    with refused('split-ratios') as caught:
        split.shares(ratios)
    assert '70 15 15' in caught.value.hint


def test_two_splits_leave_no_third_file(tmp_path):
    save(tmp_path, coco(many(40)))
    assert list(split.split_file(tmp_path, [3, 1]).files) == ['train', 'val']
    assert not (tmp_path / 'annotations/instances_test.json').exists()


def test_an_earlier_split_is_replaced_only_as_a_whole(tmp_path):
    save(tmp_path, coco(many(40)))
    first = split.split_file(tmp_path)
    before = {p: p.read_bytes() for p in first.files.values()}
    with refused('split-exists') as caught:
        split.split_file(tmp_path, [80, 20])
    assert len(caught.value.problems) == 3
    assert {p: p.read_bytes() for p in before} == before
    # The old test images are in the new train or val now: the file must not stay.
    report = split.split_file(tmp_path, [80, 20], overwrite=True)
    assert not first.files['test'].exists()
    assert f'removed: {first.files["test"]}' in report.text()
    assert sum(len(n) for n in names_in(report).values()) == 40


def test_the_source_is_never_overwritten(tmp_path):
    path = save(tmp_path, coco(many(40)), 'instances_train.json')
    with refused('split-source', path=path):
        split.split_file(tmp_path, overwrite=True)
    report = split.split_file(path, out=tmp_path / 'new')
    assert report.files['val'] == tmp_path / 'new/instances_val.json'


def broken(**changes):
    def make():
        data = coco({'a.jpg': ['x'], 'b.jpg': ['x'], 'c.jpg': ['x']})
        for key, change in changes.items():
            data[key] = change(data[key])
        return json.dumps(data)

    return make


def plus(**item):
    return lambda items: [*items, {**items[0], **item}]


@pytest.mark.parametrize(
    ('text', 'code', 'problem'),
    [
        (lambda: '{"images": [', 'coco-file', 'coco-not-json'),
        (lambda: 'null', 'coco-file', 'coco-top-level'),
        (broken(images=lambda x: []), 'coco-file', 'coco-no-images'),
        (broken(images=lambda x: [{'id': 1}]), 'coco-entries', 'coco-keys-missing'),
        (broken(images=plus(id=9)), 'coco-entries', 'coco-repeated'),
        (broken(annotations=plus(image_id=55)), 'coco-entries', 'coco-link'),
        (broken(annotations=lambda x: [3]), 'coco-file', 'coco-entry-type'),
    ],
)
def test_malformed_files_give_one_message(tmp_path, text, code, problem):
    path = save(tmp_path, {})
    path.write_text(text())
    with refused(code, path=path) as caught:
        split.split_file(tmp_path)
    assert codes(caught.value.problems) == [problem]
    assert [p.name for p in path.parent.iterdir()] == ['instances_all.json']


def test_nan_in_a_file_is_named_and_nothing_is_written(tmp_path):
    whole = coco(many(20))
    whole['annotations'][0]['area'] = float('nan')
    path = save(tmp_path, whole)
    with refused('split-number', path=path):
        split.split_file(tmp_path)
    assert len(list(path.parent.iterdir())) == 1


def test_too_few_images_or_series(tmp_path):
    save(tmp_path, coco({'a_1.jpg': ['x'], 'a_2.jpg': ['x']}))
    with refused('split-few-images', images=2, splits=3):
        split.split_file(tmp_path)
    with refused('split-few-series', images=2, groups=1, splits=2):
        split.split_file(tmp_path, [80, 20], group_by='^a')
    assert split.split_file(tmp_path, [80, 20]).sizes.tolist() == [1, 1]


@pytest.mark.parametrize(('pattern', 'code'), [('(', 'split-pattern'), ('zzz', 'split-pattern-matches-nothing')])
def test_bad_patterns(tmp_path, pattern, code):
    save(tmp_path, coco(many(40)))
    with refused(code, pattern=pattern):
        split.split_file(tmp_path, group_by=pattern)


def test_a_byte_order_mark_and_other_ids_are_taken(tmp_path):
    whole = coco(many(30))
    for image in whole['images']:
        image['id'] = f'n{image["id"]}'
    for annotation in whole['annotations']:
        annotation['image_id'] = f'n{annotation["image_id"]}'
    path = save(tmp_path, whole)
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert split.split_file(tmp_path).sizes.sum() == 30


TABLE = """\
class         train objects  train images  train %  val objects  val images  val %
a                         7             4     80.0            2           1   20.0
b                         2             1    100.0            0           0    0.0
(no objects)              0             4     80.0            0           1   20.0
all                       9             9     81.8            2           2   18.2
Wanted: 80 / 20 % of the images
Largest deviation: b has 0 of 1 images in val, 0.0 % instead of 20.0 %
b: none in val, since it has only 1 image
c: no object in the whole file"""


def test_report_exactly(tmp_path):
    images = {f'{i}.jpg': ['a', 'a'] if i < 4 else ['a'] if i == 4 else [] for i in range(10)}
    images['b.jpg'] = ['b', 'b']
    save(tmp_path, coco(images, ['a', 'b', 'c']))
    assert split.split_file(tmp_path, [80, 20]).text() == TABLE


def test_a_table_of_1000_classes_shows_the_worst(tmp_path):
    classes = [f'c{i:04d}' for i in range(1000)]
    save(tmp_path, coco({f'{i}.jpg': [classes[i % 1000]] for i in range(4000)}, classes))
    lines = split.split_file(tmp_path).text().splitlines()
    assert len(lines) < 120
    assert '… and 900 classes nearer to their share' in lines


def test_coco_size_in_seconds():
    rng = np.random.RandomState(0)
    labels = rng.rand(118_000, 80) < np.geomspace(0.4, 0.002, 80)
    counts = np.column_stack([labels, np.ones(len(labels), bool)]).astype(np.int64)
    start = time.perf_counter()
    where = stratify.best_of(counts, counts, ROOMY)
    assert time.perf_counter() - start < 30
    found = np.stack([counts[where == s].sum(0) for s in range(3)])
    assert np.abs(found / found.sum(0) - ROOMY[:, None]).max() < 0.005
