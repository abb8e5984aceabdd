from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmfinetune.engine.metrics import InstanceCocoMetric
from mmfinetune.evaluation.coco_eval import ENGINES, STATS
from tests.builders.errors import refused

HEIGHT, WIDTH = 240, 320
# Ids with gaps, as COCO has them; no annotation has class `none`.
CATEGORIES = [{'id': i, 'name': n} for i, n in ((1, 'cat'), (3, 'dog'), (4, 'none'), (9, 'cow'))]
NAMES = [c['name'] for c in CATEGORIES]
TYPES = ('bbox', 'segm')


def rle_of(mask: np.ndarray) -> dict:
    return mask_api.encode(np.asfortranarray(mask, np.uint8))


def blob(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """An ellipse of any size from small to large in COCO's sense."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    cx, cy = rng.uniform(0, width), rng.uniform(0, height)
    rx, ry = np.exp(rng.uniform(np.log(4), np.log(120), 2))
    mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
    mask[int(np.clip(cy, 0, height - 1)), int(np.clip(cx, 0, width - 1))] = True
    return mask


def box_of(mask: np.ndarray) -> list[float]:
    return mask_api.toBbox(rle_of(mask)).tolist()


def moved(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The mask shifted by some pixels, with noise inside."""
    far = int(0.06 * mask.sum() ** 0.5)
    shifted = np.roll(mask, rng.integers(-far, far + 1, 2), (0, 1))
    return shifted & (rng.random(mask.shape) > rng.uniform(0, 0.3))


def sample(image_id: int, shape: tuple[int, int], labels, scores, masks, boxes) -> dict:
    """What the model hands to a metric for one image."""
    return {
        'img_id': image_id,
        'ori_shape': shape,
        'pred_instances': {
            'labels': torch.tensor(labels, dtype=torch.int64),
            'scores': torch.tensor(scores, dtype=torch.float32),
            'bboxes': torch.tensor(np.array(boxes, np.float32).reshape(-1, 4)),
            'masks': torch.from_numpy(np.array(masks, bool).reshape(-1, *shape)),
        },
    }


def predict(
    rng: np.random.Generator,
    image_id: int,
    truth: list[tuple[int, np.ndarray]],
    shape: tuple[int, int],
    num_classes: int,
) -> dict:
    """Jittered truth, some of it missed, confused or found twice, and some of nothing."""
    found = []
    for label, mask in truth:
        for _ in range(rng.choice(3, p=[0.15, 0.7, 0.15])):
            guess = label if rng.random() < 0.9 else int(rng.integers(num_classes))
            found.append((guess, moved(rng, mask)))
    found += [(int(rng.integers(num_classes)), blob(rng, shape)) for _ in range(rng.integers(4))]
    found = [(label, mask) for label, mask in found if mask.any()]
    boxes = []
    for _, mask in found:
        x, y, w, h = np.array(box_of(mask)) + rng.normal(0, 1.5, 4)
        boxes.append([x, y, x + max(w, 1), y + max(h, 1)])
    # Rounded, so that ties occur.
    scores = np.round(rng.uniform(0.05, 1, len(found)), 1)
    return sample(image_id, shape, [label for label, _ in found], scores, [mask for _, mask in found], boxes)


def make_data(root: Path, seed: int) -> tuple[Path, list[dict]]:
    """Annotation file and predictions on 25 images; one has no object, one no prediction."""
    rng = np.random.default_rng(seed)
    shape, images, annotations, predictions = (HEIGHT, WIDTH), [], [], []
    known = [k for k, name in enumerate(NAMES) if name != 'none']
    for image_id in range(1, 26):
        images.append({'id': image_id, 'file_name': f'{image_id}.jpg', 'width': WIDTH, 'height': HEIGHT})
        truth = []
        for _ in range(0 if image_id == 5 else rng.integers(1, 6)):
            label, mask, crowd = int(rng.choice(known)), blob(rng, shape), rng.random() < 0.15
            if not crowd:
                truth.append((label, mask))
            rle = rle_of(mask)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'iscrowd': int(crowd),
                    'category_id': CATEGORIES[label]['id'],
                    'area': int(mask.sum()),
                    'bbox': box_of(mask),
                    'segmentation': {'size': list(shape), 'counts': rle['counts'].decode()},
                }
            )
        predictions.append(
            sample(image_id, shape, [], [], [], [])
            if image_id == 7
            else predict(rng, image_id, truth, shape, len(NAMES))
        )
    assert any(a['iscrowd'] for a in annotations)
    path = root / 'truth.json'
    path.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': CATEGORIES}))
    return path, predictions


def make_metric(path: Path, names: list[str] = NAMES, **options) -> InstanceCocoMetric:
    options = {'metric': list(TYPES), 'classwise': True, **options}
    metric = InstanceCocoMetric(ann_file=str(path), **options)
    metric.dataset_meta = {'classes': tuple(names)}
    return metric


def evaluate(path: Path, predictions: list[dict], names: list[str] = NAMES, **options) -> dict[str, float]:
    metric = make_metric(path, names, **options)
    for prediction in predictions:
        metric.process({}, [prediction])
    return metric.evaluate(len(predictions))


def by_pycocotools(path: Path, predictions: list[dict]) -> dict[str, float]:
    """The same keys from pycocotools itself, by another way than the metric's."""
    found = {}
    truth = COCO(str(path))
    for kind in TYPES:
        rows = []
        for prediction in predictions:
            pred = prediction['pred_instances']
            for i, label in enumerate(pred['labels'].tolist()):
                row = {
                    'image_id': prediction['img_id'],
                    'score': pred['scores'][i].item(),
                    'category_id': truth.getCatIds()[label],
                }
                if kind == 'bbox':
                    x1, y1, x2, y2 = pred['bboxes'][i].tolist()
                    # In float32, in which the model computes.
                    row['bbox'] = [
                        x1,
                        y1,
                        float(np.float32(x2) - np.float32(x1)),
                        float(np.float32(y2) - np.float32(y1)),
                    ]
                else:
                    row['segmentation'] = rle_of(pred['masks'][i].numpy())
                rows.append(row)
        evaluator = COCOeval(truth, truth.loadRes(rows), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        found.update({f'coco/{kind}_{name}': value for name, value in zip(STATS, evaluator.stats, strict=True)})
        for k, category in enumerate(truth.loadCats(truth.getCatIds())):
            values = evaluator.eval['precision'][:, :, k, 0, 2]
            if (values > -1).any():
                found[f'coco/{kind}_AP/{category["name"]}'] = values[values > -1].mean()
    return found


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> tuple[Path, list[dict]]:
    return make_data(tmp_path_factory.mktemp('metric'), 0)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_both_engines_and_pycocotools_itself_agree(tmp_path, seed):
    path, predictions = make_data(tmp_path, seed)
    expected = by_pycocotools(path, predictions)
    # All sizes occur, and the numbers are not those of a perfect or a useless model.
    assert all(0.05 < expected[f'coco/{k}_{n}'] < 0.95 for k in TYPES for n in STATS)
    for engine in ENGINES:
        found = evaluate(path, predictions, engine=engine)
        assert found.keys() == expected.keys()
        assert found == pytest.approx(expected, rel=0, abs=1e-9), engine


def test_keys(data):
    found = evaluate(*data)
    assert set(found) == {
        f'coco/{kind}_{name}' for kind in TYPES for name in (*STATS, *(f'AP/{n}' for n in NAMES if n != 'none'))
    }
    assert all(type(value) is float for value in found.values())
    assert {f'coco/{k}_mAP' for k in TYPES} <= set(found)  # what save_best asks for


def test_map_is_the_mean_over_classes(data):
    found = evaluate(*data)
    for kind in TYPES:
        mean = np.mean([v for k, v in found.items() if k.startswith(f'coco/{kind}_AP/')])
        assert found[f'coco/{kind}_mAP'] == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize('engine', ENGINES)
def test_exact_predictions_score_one(data, engine):
    path = data[0]
    content = json.loads(path.read_text())
    predictions = []
    for image in content['images']:
        own = [a for a in content['annotations'] if a['image_id'] == image['id'] and not a['iscrowd']]
        x, y, w, h = np.array([a['bbox'] for a in own]).reshape(-1, 4).T
        predictions.append(
            sample(
                image['id'],
                (HEIGHT, WIDTH),
                [[c['id'] for c in CATEGORIES].index(a['category_id']) for a in own],
                [0.9] * len(own),
                [mask_api.decode(a['segmentation']) for a in own],
                np.stack([x, y, x + w, y + h], 1),
            )
        )
    found = evaluate(path, predictions, engine=engine)
    for kind in TYPES:
        assert found[f'coco/{kind}_mAP'] == pytest.approx(1.0, abs=1e-12)
        assert found[f'coco/{kind}_AR@100'] == pytest.approx(1.0, abs=1e-12)


def test_order_of_the_images_does_not_matter(data):
    path, predictions = data
    # Ties are broken by order within an image; that of the images is pycocotools' own.
    assert evaluate(path, predictions[::-1]) == pytest.approx(evaluate(path, predictions), abs=1e-12)


@pytest.mark.parametrize('engine', ENGINES)
def test_no_detections_score_zero(data, engine):
    path, predictions = data
    empty = [sample(p['img_id'], p['ori_shape'], [], [], [], []) for p in predictions]
    found = evaluate(path, empty, engine=engine)
    assert found == {
        f'coco/{kind}_{name}': 0.0 for kind in TYPES for name in (*STATS, *(f'AP/{n}' for n in NAMES if n != 'none'))
    }


@pytest.mark.parametrize('engine', ENGINES)
def test_size_without_truth_is_minus_one(tmp_path, engine):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:20, 10:20] = True
    path = tmp_path / 'truth.json'
    path.write_text(
        json.dumps(
            {
                'images': [{'id': 1, 'file_name': 'a.jpg', 'width': WIDTH, 'height': HEIGHT}],
                'annotations': [
                    {
                        'id': 1,
                        'image_id': 1,
                        'category_id': 1,
                        'iscrowd': 0,
                        'area': 100,
                        'bbox': [10, 10, 10, 10],
                        'segmentation': {**rle_of(mask), 'counts': rle_of(mask)['counts'].decode()},
                    }
                ],
                'categories': CATEGORIES,
            }
        )
    )
    found = evaluate(path, [sample(1, mask.shape, [0], [0.9], [mask], [[10, 10, 20, 20]])], engine=engine)
    for kind in TYPES:
        values = [found[f'coco/{kind}_{name}'] for name in ('mAP', 'mAP_s', 'mAP_m', 'mAP_l')]
        assert values == pytest.approx([1.0, 1.0, -1.0, -1.0])


@pytest.mark.parametrize('metric', [['bbox'], ['segm'], 'segm'])
def test_one_kind_alone(data, metric):
    both = evaluate(*data)
    kind = metric if isinstance(metric, str) else metric[0]
    found = evaluate(*data, metric=metric)
    assert found == {k: v for k, v in both.items() if k.startswith(f'coco/{kind}_')}


def gathered(metric: InstanceCocoMetric, predictions: list[dict]) -> dict[str, float]:
    for prediction in predictions:
        metric.process({}, [prediction])
    return metric.evaluate(len(predictions))


@pytest.mark.parametrize('classwise', [True, False])
@pytest.mark.parametrize('engine', ENGINES)
def test_numbers_of_each_class(data, engine, classwise):
    path, predictions = data
    expected = by_pycocotools(path, predictions)
    metric = make_metric(path, engine=engine, classwise=classwise)
    assert metric.per_class == {}
    found = gathered(metric, predictions)
    assert list(metric.per_class) == NAMES  # in the order of the labels
    assert metric.per_class['none'] == {}
    for name in ('cat', 'dog', 'cow'):
        numbers = metric.per_class[name]
        assert set(numbers) == {f'{kind}_{key}' for kind in TYPES for key in ('AP', 'AP50')}
        assert all(type(v) is float for v in numbers.values())
        for kind in TYPES:
            assert numbers[f'{kind}_AP'] == pytest.approx(expected[f'coco/{kind}_AP/{name}'])
    for kind in TYPES:
        mean = np.mean([metric.per_class[n][f'{kind}_AP50'] for n in ('cat', 'dog', 'cow')])
        assert mean == pytest.approx(found[f'coco/{kind}_mAP_50'])


def test_numbers_of_each_class_are_those_of_the_last_evaluation(data):
    path, predictions = data
    metric = make_metric(path, metric='segm')
    gathered(metric, predictions)
    first = metric.per_class
    gathered(metric, [sample(p['img_id'], p['ori_shape'], [], [], [], []) for p in predictions])
    assert first['cat']['segm_AP'] > 0.1
    assert metric.per_class['cat'] == {'segm_AP': 0.0, 'segm_AP50': 0.0}


@pytest.mark.parametrize('engine', ENGINES)
def test_ids_of_classes_in_no_order(data, tmp_path, engine):
    path, predictions = data
    expected = evaluate(path, predictions)
    content = json.loads(path.read_text())
    new = {old['id']: 20 - old['id'] for old in content['categories']}
    for category in content['categories']:
        category['id'] = new[category['id']]
    for annotation in content['annotations']:
        annotation['category_id'] = new[annotation['category_id']]
    other = tmp_path / 'other.json'
    other.write_text(json.dumps(content))
    assert evaluate(other, predictions, engine=engine) == pytest.approx(expected, rel=0, abs=1e-9)


def test_ap50_of_a_class_needs_the_threshold(data):
    path, predictions = data
    metric = make_metric(path, metric='segm', iou_thrs=[0.6, 0.7])
    gathered(metric, predictions)
    assert set(metric.per_class['cat']) == {'segm_AP'}


def test_without_classwise(data):
    assert set(evaluate(*data, classwise=False)) == {f'coco/{kind}_{name}' for kind in TYPES for name in STATS}


def test_mask_scores_rank_masks_only(data):
    path, predictions = data
    rng = np.random.default_rng(0)
    plain = evaluate(path, predictions)
    scored = [
        {
            **p,
            'pred_instances': {
                **p['pred_instances'],
                'mask_scores': torch.tensor(rng.random(len(p['pred_instances']['scores']))),
            },
        }
        for p in predictions
    ]
    found = evaluate(path, scored)
    assert found['coco/bbox_mAP'] == plain['coco/bbox_mAP']
    assert found['coco/segm_mAP'] != plain['coco/segm_mAP']


def test_area_of_a_mask_is_its_own_not_its_boxs(tmp_path):
    # A thin diagonal: few pixels (small), a wide box (large).
    mask = np.eye(HEIGHT, dtype=bool)
    shape = mask.shape
    path = tmp_path / 'truth.json'
    rle = rle_of(mask)
    path.write_text(
        json.dumps(
            {
                'images': [{'id': 1, 'file_name': 'a.jpg', 'width': HEIGHT, 'height': HEIGHT}],
                'annotations': [
                    {
                        'id': 1,
                        'image_id': 1,
                        'category_id': 1,
                        'iscrowd': 0,
                        'area': int(mask.sum()),
                        'bbox': box_of(mask),
                        'segmentation': {'size': list(shape), 'counts': rle['counts'].decode()},
                    }
                ],
                'categories': CATEGORIES,
            }
        )
    )
    # A false one of the same form: not counted among the small ones if its box gave its area.
    wrong = np.fliplr(mask)
    found = evaluate(path, [sample(1, shape, [0, 0], [0.9, 0.95], [mask, wrong], [[0, 0, HEIGHT, HEIGHT]] * 2)])
    assert found['coco/segm_mAP_s'] == pytest.approx(0.5)


def test_engines_print_nothing(data, capfd):
    path, predictions = data
    for engine in ENGINES:
        metric = make_metric(path, engine=engine)
        truth = COCO(str(path))
        metric.cat_ids, metric.img_ids = truth.getCatIds(NAMES), truth.getImgIds()
        metric.process({}, predictions)
        preds = [pred for _, pred in metric.results]
        capfd.readouterr()
        for kind in TYPES:
            metric.evaluate_rows(metric._detections(preds, kind), kind)
        out, err = capfd.readouterr()
        assert (out, err) == ('', ''), engine


def test_table_of_classes_goes_to_the_log(data, caplog):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    try:
        found = evaluate(*data)
    finally:
        logger.removeHandler(caplog.handler)
    table = caplog.text
    for column in ('bbox AP', 'bbox AP50', 'segm AP', 'segm AP50'):
        assert column in table
    row = next(line for line in table.splitlines() if line.startswith('| dog '))
    cells = [c.strip() for c in row.strip('|').split('|')]
    assert cells[1] == f'{found["coco/bbox_AP/dog"]:.3f}'
    assert cells[3] == f'{found["coco/segm_AP/dog"]:.3f}'
    row = next(line for line in table.splitlines() if line.startswith('| none '))
    assert [c.strip() for c in row.strip('|').split('|')[1:]] == ['-'] * 4


def test_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(*data)
    assert list(tmp_path.iterdir()) == []


def test_results_are_written_on_request(data, tmp_path):
    evaluate(*data, outfile_prefix=str(tmp_path / 'out'))
    rows = json.loads((tmp_path / 'out.segm.json').read_text())
    assert len(rows) == sum(len(p['pred_instances']['labels']) for p in data[1])
    assert {r['category_id'] for r in rows} <= {c['id'] for c in CATEGORIES}


def test_unknown_engine(data):
    with refused('metric-engine', engine='rust', known=', '.join(ENGINES)):
        make_metric(data[0], engine='rust')


@pytest.mark.parametrize(('metric', 'wrong'), [('proposal', 'proposal'), (['bbox', 'proposal_fast'], 'proposal_fast')])
def test_unsupported_metric(data, metric, wrong):
    with refused('metric-kind', wrong=wrong):
        make_metric(data[0], metric=metric)


def test_annotation_file_is_needed():
    with refused('metric-without-truth', metric='InstanceCocoMetric'):
        InstanceCocoMetric(metric='segm')


def test_no_images_are_no_error(data):
    metric = make_metric(data[0], metric='bbox')
    assert metric.compute_metrics([])['bbox_mAP'] == -1


def test_built_from_the_config(voc_cfg, data):
    from mmdet.registry import METRICS

    metric = METRICS.build({**voc_cfg.val_evaluator, 'ann_file': str(data[0])})
    assert (type(metric), metric.engine) == (InstanceCocoMetric, 'hotcoco')


def test_real_coco(real_data):
    path = real_data / 'coco2017_real/annotations/instances_val2017.json'
    truth = COCO(str(path))
    names = [c['name'] for c in truth.loadCats(truth.getCatIds())]
    label_of = {c: k for k, c in enumerate(truth.getCatIds())}
    assert any(a['iscrowd'] for a in truth.anns.values())
    rng = np.random.default_rng(0)
    predictions = []
    for image in truth.loadImgs(truth.getImgIds()):
        own = truth.loadAnns(truth.getAnnIds(image['id'], iscrowd=False))
        predictions.append(
            predict(
                rng,
                image['id'],
                [(label_of[a['category_id']], truth.annToMask(a) > 0) for a in own],
                (image['height'], image['width']),
                len(names),
            )
        )
    expected = by_pycocotools(path, predictions)
    assert 0.2 < expected['coco/segm_mAP'] < 0.9
    for engine in ENGINES:
        assert evaluate(path, predictions, names, engine=engine) == pytest.approx(expected, rel=0, abs=1e-9), engine


def test_ground_truth_is_that_of_the_images_seen(data, tmp_path):
    """``indices`` of a data set leaves images out; a wrapper gives them several times."""
    path, predictions = data
    some = predictions[: len(predictions) // 2]
    whole = json.loads(path.read_text())
    ids = {sample['img_id'] for sample in some}
    whole['images'] = [image for image in whole['images'] if image['id'] in ids]
    whole['annotations'] = [a for a in whole['annotations'] if a['image_id'] in ids]
    (tmp_path / 'some.json').write_text(json.dumps(whole))
    expected = evaluate(tmp_path / 'some.json', some)
    assert evaluate(path, some) == expected
    assert evaluate(path, [*some, *some]) == expected
    assert expected != evaluate(*data)
