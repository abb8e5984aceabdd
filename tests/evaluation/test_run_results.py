"""The files a run leaves: history and its CSV, tables of other projects' form, the summary."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mmfinetune.evaluation import run_results
from mmfinetune.evaluation.history import History
from mmfinetune.evaluation.stats import STATS
from mmfinetune.utils.errors import UserError

NAMES = list(STATS)
PER_CLASS = {
    'cat': {'bbox_AP': 0.25, 'bbox_AP50': 0.5, 'segm_AP': 0.125, 'segm_AP50': 0.375},
    'no | such <b>': {},
    '\u72d7': {'bbox_AP': 1.0, 'bbox_AP50': 1.0, 'segm_AP': 0.75, 'segm_AP50': 1 / 3},
}


def coco(kind: str, start: float = 0.0) -> dict[str, float]:
    """Twelve different numbers."""
    return {f'coco/{kind}_{name}': start + i / 32 for i, name in enumerate(NAMES)}


def row(epoch: int | None, iteration: int, **more: float) -> dict[str, float]:
    steps = {'iter': iteration} if epoch is None else {'epoch': epoch, 'iter': iteration}
    return {**steps, 'train/loss': 4.0 / iteration, 'lr': 0.002, **more}


@pytest.fixture
def history() -> History:
    return History(
        [
            row(1, 10, **coco('bbox'), **coco('segm', 0.1), **{'val/loss': 1 / 3}),
            row(2, 20, **coco('bbox', 0.2), **coco('segm', 0.3), train_seconds=3725.4),
        ]
    )


def test_result_lines_are_those_of_the_reference_projects(history):
    def reference(epoch: int, info: list[float], mean_loss: float, lr: float) -> str:
        # As train.py of those projects has it.
        result_info = [f'{i:.4f}' for i in [*info, mean_loss]] + [f'{lr:.6f}']
        return 'epoch:{} {}'.format(epoch, '  '.join(result_info)) + '\n'

    for kind, starts in (('bbox', (0, 0.2)), ('segm', (0.1, 0.3))):
        assert run_results.result_lines(history, kind) == ''.join(
            reference(i, [starts[i - 1] + n / 32 for n in range(12)], 0.4 / i, 0.002) for i in (1, 2)
        )
    assert run_results.result_lines(history, 'segm').splitlines()[0] == (
        'epoch:1 0.1000  0.1313  0.1625  0.1938  0.2250  0.2562  0.2875  0.3187  0.3500  0.3812  '
        '0.4125  0.4437  0.4000  0.002000'
    )


def test_result_lines_without_the_metric_or_without_epochs():
    assert run_results.result_lines(History([row(1, 10, **coco('bbox'))]), 'segm') == ''
    line = run_results.result_lines(History([row(None, 500, **coco('bbox'))]), 'bbox')
    assert line.startswith('iter:500 0.0000  0.0312  ')


def test_record_map_has_the_lines_of_pycocotools():
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    names = ('cat', 'dog', 'cow')
    with contextlib.redirect_stdout(io.StringIO()) as out:
        truth = COCO()
        truth.dataset = {
            'images': [{'id': 1, 'width': 200, 'height': 200}],
            'categories': [{'id': i, 'name': n} for i, n in enumerate(names, 1)],
            'annotations': [
                {
                    'id': i,
                    'image_id': 1,
                    'category_id': 1 + i % 2,
                    'iscrowd': 0,
                    'bbox': [10 * i, 10 * i, 20 + i, 20],
                    'area': 20 * (20 + i),
                }
                for i in range(1, 6)
            ],
        }
        truth.createIndex()
        evaluation = COCOeval(
            truth,
            truth.loadRes(
                [
                    {
                        'image_id': 1,
                        'category_id': 1 + i % 2,
                        'score': 0.9 - i / 10,
                        'bbox': [10 * i + i % 3, 10 * i, 20, 20],
                    }
                    for i in range(1, 5)
                ]
            ),
            'bbox',
        )
        evaluation.evaluate()
        evaluation.accumulate()
        out.truncate(0)
        out.seek(0)
        evaluation.summarize()
    stats = {f'coco/bbox_{n}': float(v) for n, v in zip(NAMES, evaluation.stats, strict=True)}
    half = {n: evaluation.eval['precision'][0, :, k, 0, -1].mean() for k, n in enumerate(names)}
    per_class = {n: {'bbox_AP50': half[n]} if n != 'cow' else {} for n in names}
    assert -1 in stats.values() and 0 < stats['coco/bbox_mAP'] < 1
    text = run_results.record_map_text(stats, per_class, 'Validation after epoch 3')
    assert text == (
        f'Validation after epoch 3\n\nIoU metric: bbox\nCOCO results:\n{out.getvalue()}'
        '\nmAP(IoU=0.5) for each category:\n'
        f' cat            : {half["cat"]}\n dog            : {half["dog"]}\n'
        f' cow            : -1\n total          : {stats["coco/bbox_mAP_50"]}\n'
    )
    # What is called the total is the mean over the classes that have ground truth.
    assert stats['coco/bbox_mAP_50'] == pytest.approx((half['cat'] + half['dog']) / 2)


def test_record_map_of_boxes_and_masks():
    text = run_results.record_map_text({**coco('segm', 0.5), **coco('bbox')}, PER_CLASS)
    boxes, masks = text.split('\nIoU metric: segm\n')
    assert boxes.startswith(
        'IoU metric: bbox\nCOCO results:\n Average Precision  (AP) @[ IoU=0.50:'
        '0.95 | area=   all | maxDets=100 ] = 0.000\n'
    )
    assert ' Average Recall     (AR) @[ IoU=0.50:0.95 | area= large | maxDets=100 ] = 0.844\n' in masks
    assert masks.endswith(
        'mAP(IoU=0.5) for each category:\n cat            : 0.375\n'
        ' no | such <b>  : -1\n \u72d7              : 0.3333333333333333\n'
        ' total          : 0.53125\n'
    )


def test_record_map_says_so_where_only_ap_is_known():
    text = run_results.record_map_text(coco('segm', 0.5), {'cat': {'segm_AP': 0.5}})
    assert text.endswith('mAP(IoU=0.50:0.95) for each category:\n cat            : 0.5\n total          : 0.5\n')
    assert 'category' not in run_results.record_map_text(coco('segm'), {})
    assert run_results.record_map_text({}, PER_CLASS) == ''


def test_per_class_of_the_metric_or_of_the_numbers():
    metrics = {
        'coco/segm_mAP': 0.5,
        'coco/segm_AP/cat': 0.25,
        'coco/bbox_AP/a_AP/b': 0.75,
        'coco/segm_AP/a_AP/b': 0.125,
        'own_AP/cat': 1.0,
    }
    expected = {'cat': {'segm_AP': 0.25}, 'a_AP/b': {'bbox_AP': 0.75, 'segm_AP': 0.125}}
    plain = SimpleNamespace(metrics=[SimpleNamespace(), SimpleNamespace(per_class={})])
    assert run_results.per_class_of(plain, metrics) == expected
    assert run_results.per_class_of(None, metrics) == expected
    plain.metrics.append(SimpleNamespace(per_class=PER_CLASS))
    assert run_results.per_class_of(plain, metrics) == PER_CLASS


def test_files_set_aside_keep_each_other(tmp_path):
    for content in 'abc':
        path = tmp_path / 'results.csv'
        path.write_text(content)
        run_results.set_aside(path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        'results.csv.bak': 'a',
        'results.csv.bak2': 'b',
        'results.csv.bak3': 'c',
    }


FACTS = run_results.RunFacts(
    'a run',
    'python x.py --y',
    3,
    best={'coco/segm_mAP': False},
    setup={'weights': 'w.pth'},
    data=[['train', '8', '26', '2', 'a.json']],
)


def test_summary(history, tmp_path):
    (tmp_path / 'curves.png').touch()
    (tmp_path / 'best_coco_segm_mAP_epoch_2.pth').touch()
    text = run_results.summary_text(FACTS, history, 2, 'Unfinished', PER_CLASS, tmp_path)
    assert text.startswith('# a run\n\n**Unfinished: epoch 2 of 3** (')
    assert (
        'Best coco/segm_mAP: **0.3000** after epoch 2, '
        '[best_coco_segm_mAP_epoch_2.pth](best_coco_segm_mAP_epoch_2.pth)\n'
    ) in text
    assert '![Loss, AP and learning rates](curves.png)' in text
    assert (
        """\
| epoch | training loss | validation loss | box AP | box AP50 | mask AP | mask AP50 |    lr | training |
| ----: | ------------: | --------------: | -----: | -------: | ------: | --------: | ----: | -------: |
|     1 |        0.4000 |          0.3333 | 0.0000 |   0.0312 |  0.1000 |    0.1313 | 0.002 |        - |
|     2 |        0.2000 |               - | 0.2000 |   0.2313 |  0.3000 |    0.3312 | 0.002 |  1:02:05 |
"""
        in text
    )
    assert 'Validation after epoch 2.\n' in text
    assert '| no \\| such \\<b> |     1 |       - |         - |      - |        - |' in text
    assert '```bash\npython x.py --y\n```' in text
    assert '| weights | w.pth |' in text
    assert '| train |      8 |      26 |       2 | a.json |' in text
    assert '- [curves.png](curves.png): curves\n' in text
    assert 'results.csv' not in text and 'per_class.png' not in text


def test_summary_before_the_first_epoch(tmp_path):
    text = run_results.summary_text(FACTS, History(), 0, 'Unfinished', {}, tmp_path)
    assert '**Unfinished: epoch 0 of 3**' in text
    assert '## Epochs' not in text and '## Classes' not in text and 'Best' not in text


def test_test_goes_into_the_summary_once(history, tmp_path):
    (tmp_path / 'summary.md').write_text(run_results.summary_text(FACTS, history, 3, 'Finished', PER_CLASS, tmp_path))
    for loss in (0.5, 0.25):
        files = run_results.report_test(
            tmp_path,
            Path('elsewhere/best.pth'),
            {**coco('bbox', 0.5), **coco('segm'), 'coco/segm_mAP_l': -1.0, 'test/loss': loss},
            PER_CLASS,
        )
    assert [f.name for f in files] == ['record_mAP.txt', 'per_class.png', 'summary.md']
    text = (tmp_path / 'summary.md').read_text(encoding='utf-8')
    assert [line for line in text.splitlines() if line.startswith('## ')] == [
        '## Test',
        '## Epochs',
        '## Classes',
        '## Run',
        '## Data',
        '## Files',
    ]
    assert '## Test\n\n`best.pth`, loss 0.2500\n\n|      |     AP |   AP50 |' in text
    assert '| mask | 0.0000 | 0.0312 | 0.0625 | 0.0938 | 0.1250 |      - | 0.1875 |' in text
    assert 'Test of best.pth.\n' in text and 'Validation after' not in text
    assert '- [record_mAP.txt](record_mAP.txt)' in text
    assert (tmp_path / 'record_mAP.txt').read_text().startswith('Test of best.pth\n\nIoU metric')
    assert Image.open(tmp_path / 'per_class.png').format == 'PNG'


def test_test_of_a_folder_without_a_run(tmp_path):
    files = run_results.report_test(tmp_path, Path('a.pth'), coco('bbox'), {})
    assert [f.name for f in files] == ['record_mAP.txt', 'summary.md']
    text = files[1].read_text()
    assert text.startswith(f'# {tmp_path.name}\n\n## Test\n\n`a.pth`\n')
    assert '| box |' in text and 'mask' not in text


def test_test_results_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / 'record_mAP.txt').mkdir()
    with pytest.raises(UserError):
        run_results.report_test(tmp_path, Path('a.pth'), coco('bbox'), {})
    assert not (tmp_path / 'summary.md').exists()
