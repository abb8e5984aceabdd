"""Runs side by side: what is read of a work dir, the table, the files and the messages."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfinetune.evaluation import compare, plots
from tests.builders.errors import refused
from tests.builders.runs import TOOLS, drive, spawn

NAN = math.nan
TRAIN = {'base_lr': 0.002, 'lr': 0.002, 'loss': 4.4, 'time': 0.9, 'epoch': 1, 'iter': 1, 'step': 1}


def validation(epoch: int, value: float) -> dict:
    """A record as MMEngine's LocalVisBackend writes it after a validation."""
    return {
        'coco/bbox_mAP': value + 0.05,
        'coco/segm_mAP': value,
        'coco/segm_mAP_50': value + 0.2,
        'coco/segm_mAP_s': NAN,
        'data_time': 0.03,
        'time': 3.3,
        'step': epoch,
    }


def write_log(work_dir: Path, values: dict[int, float], stamp: str = '20260101_000000', end: str = '') -> Path:
    """A log with training steps, and a validation for each epoch given."""
    path = work_dir / stamp / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    records = [
        record
        for epoch, value in values.items()
        for record in ({**TRAIN, 'epoch': epoch, 'step': 10 * epoch, 'coco/segm_mAP': 9.0}, validation(epoch, value))
    ]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records or [TRAIN]) + end)
    return work_dir


def write_zero_shot(folder: Path, value: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {k: v for k, v in validation(0, value).items() if k.startswith('coco')}
    (folder / 'zero_shot.json').write_text(json.dumps({'checkpoint': 'x.pth', 'metrics': metrics}))
    return folder


def read(folder: Path) -> dict[int, float]:
    return compare.read_run(folder, 'x').curve('coco/segm_mAP')


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Every epoch and zero shot; every second epoch and NaN; nothing validated yet."""
    tuned = write_zero_shot(write_log(tmp_path / 'tuned', {1: 0.5, 2: 0.61239, 3: 0.6}), 0.41)
    (tuned / 'results.csv').write_text('epoch,iter,train_seconds\n1,5,3600.4\n2,10,\n3,15,64.3\n')
    write_log(tmp_path / 'scratch', {2: 0.1, 4: NAN})
    (tmp_path / 'scratch/results.csv').write_text('damaged')
    return [tuned, tmp_path / 'scratch', write_log(tmp_path / 'new', {})]


TABLE = """\
| coco/segm_mAP after epoch |     0 |     1 |     2 |     3 |   4 | best (epoch) |
| ------------------------- | ----: | ----: | ----: | ----: | --: | -----------: |
| tuned                     | 0.410 | 0.500 | 0.612 | 0.600 |   - |    0.612 (2) |
| scratch                   |     - |     - | 0.100 |     - | nan |    0.100 (2) |
| new                       |     - |     - |     - |     - |   - |            - |
"""
OVERVIEW = """\
| run     | best mask AP (epoch) | best box AP (epoch) | epochs | training time |
| ------- | -------------------: | ------------------: | -----: | ------------: |
| tuned   |            0.612 (2) |           0.662 (2) |      3 |       1:01:05 |
| scratch |            0.100 (2) |           0.150 (2) |      4 |             - |
| new     |                    - |                   - |      0 |             - |
"""
CSV = """\
run,metric,epoch_0,epoch_1,epoch_2,epoch_3,epoch_4,best,best_epoch
tuned,coco/segm_mAP,0.41,0.5,0.61239,0.6,,0.61239,2
scratch,coco/segm_mAP,,,0.1,,nan,0.1,2
new,coco/segm_mAP,,,,,,,
"""


def test_table_and_csv_exactly(three):
    runs = compare.read_runs(three)
    assert compare.metric_table(runs, 'coco/segm_mAP') == TABLE
    assert compare.metric_csv(runs, ['coco/segm_mAP']) == CSV
    assert compare.overview(runs) == OVERVIEW


def test_table_of_a_single_run(tmp_path):
    runs = compare.read_runs([write_log(tmp_path / 'a', {1: 0.5})], ['one | run'])
    assert compare.metric_table(runs, 'coco/bbox_mAP').splitlines() == [
        '| coco/bbox_mAP after epoch |   0 |     1 | best (epoch) |',
        '| ------------------------- | --: | ----: | -----------: |',
        '| one \\| run                |   - | 0.550 |    0.550 (1) |',
    ]
    assert next(csv.DictReader(io.StringIO(compare.metric_csv(runs, ['coco/bbox_mAP']))))['run'] == 'one | run'


def test_resumed_parts_are_one_curve_and_later_results_win(tmp_path):
    write_log(tmp_path, {4: 0.4, 5: 0.55}, '20260103_000000')
    write_log(tmp_path, {1: 0.1, 2: 0.2}, '20260101_235959')
    write_log(tmp_path, {2: 0.25, 3: 0.3, 4: 0.35}, '20260102_000000')
    (tmp_path / '20260104_000000/vis_data').mkdir(parents=True)  # of --test alone: no scalars
    write_log(tmp_path / 'earlier_runs/20260105_000000', {6: 0.99}, '20251231_000000')
    assert read(tmp_path) == {1: 0.1, 2: 0.25, 3: 0.3, 4: 0.4, 5: 0.55}


def test_epochs_of_an_abandoned_branch_vanish(tmp_path):
    write_log(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}, '20260101_000000')
    # Resumed from epoch 2; validated every second epoch from then on.
    write_log(tmp_path, {4: 0.44}, '20260102_000000')
    log = tmp_path / '20260102_000000/vis_data/scalars.json'
    log.write_text(json.dumps({**TRAIN, 'epoch': 3, 'step': 25}) + '\n' + log.read_text())
    assert read(tmp_path) == {1: 0.1, 2: 0.2, 4: 0.44}
    # Resumed from epoch 1 and killed before its first validation.
    third = tmp_path / '20260103_000000/vis_data/scalars.json'
    third.parent.mkdir(parents=True)
    third.write_text(json.dumps({**TRAIN, 'epoch': 2, 'step': 12}))
    assert read(tmp_path) == {1: 0.1}
    # A part that was killed before it logged anything says nothing of where it began.
    third.write_text('')
    assert read(tmp_path) == {1: 0.1, 2: 0.2, 4: 0.44}


def test_resumed_epoch_validated_before_training_goes_on(tmp_path):
    write_log(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}, '20260101_000000')
    log = tmp_path / '20260102_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    records = [validation(2, 0.25), {**TRAIN, 'epoch': 3}, validation(3, 0.35)]
    log.write_text(''.join(json.dumps(record) + '\n' for record in records))
    assert read(tmp_path) == {1: 0.1, 2: 0.25, 3: 0.35}


def test_epoch_0_is_zero_shot_only(tmp_path):
    # A validation outside of training is logged as step 0, whatever weights it was of.
    assert read(write_log(tmp_path / 'a', {0: 0.9, 1: 0.5})) == {1: 0.5}
    assert read(write_zero_shot(tmp_path / 'a', 0.3)) == {0: 0.3, 1: 0.5}
    assert read(write_zero_shot(tmp_path / 'not_trained', 0.2)) == {0: 0.2}


def test_best_is_the_first_of_equals_and_never_nan(tmp_path):
    run = compare.read_run(write_log(tmp_path, {1: NAN, 2: 0.5, 3: 0.5}), 'x')
    assert run.best('coco/segm_mAP') == (2, 0.5)
    assert run.best('coco/segm_mAP_s') is None


def test_less_loss_is_better_and_no_ground_truth_is_no_number(tmp_path):
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text(
        ''.join(
            json.dumps({'val/loss': loss, 'coco/segm_mAP_l': -1.0, 'step': epoch}) + '\n'
            for epoch, loss in enumerate((2.0, 0.5, 0.75), 1)
        )
    )
    run = compare.read_run(tmp_path, 'x')
    assert run.best('val/loss') == (2, 0.5)
    assert run.best('coco/segm_mAP_l') is None
    row = compare.metric_table([run], 'coco/segm_mAP_l').splitlines()[2]
    assert [field.strip() for field in row.split('|')[2:-1]] == ['-', 'nan', 'nan', 'nan', '-']


@pytest.mark.parametrize('end', ['{"coco/segm_mAP": 0.', '{"coco/segm_mAP": 0.7, "st\u00e4', '12', '\n', '\n  \n'])
def test_half_written_last_line_is_ignored(tmp_path, end):
    assert read(write_log(tmp_path, {1: 0.5}, end=end)) == {1: 0.5}


def test_last_line_that_only_lacks_its_end_counts(tmp_path):
    assert read(write_log(tmp_path, {1: 0.5}, end=json.dumps(validation(2, 0.6)))) == {1: 0.5, 2: 0.6}


@pytest.mark.parametrize('line', ['{"coco/segm_mAP": 0.\n', '[1]\n', 'null\n{}'])
def test_broken_line_is_named(tmp_path, line):
    write_log(tmp_path, {1: 0.5}, end=line)
    with refused('compare-broken-line', path=tmp_path / '20260101_000000/vis_data/scalars.json', line=3):
        read(tmp_path)


@pytest.mark.parametrize('text', ['{', '[]', '{}', '{"metrics": 3}', 'null'])
def test_broken_zero_shot_is_named(tmp_path, text):
    (tmp_path / 'zero_shot.json').write_text(text)
    with refused('compare-zero-shot', path=tmp_path / 'zero_shot.json'):
        read(tmp_path)


def test_folder_without_a_run(tmp_path):
    write_log(tmp_path / 'all/a', {1: 0.5})
    with refused('compare-no-folder', folder=tmp_path / 'none'):
        read(tmp_path / 'none')
    for folder in (tmp_path / 'all', tmp_path / 'all/a/20260101_000000'):
        with refused('compare-no-run', folder=folder) as caught:
            read(folder)
        assert caught.value.problems == [f'did you mean {tmp_path}/all/a?']


def test_unknown_metric_brings_similar_ones(three):
    runs = compare.read_runs(three)

    def problems(*metrics: str) -> list[tuple[str, str]]:
        with refused('compare-metrics', known='coco/bbox_mAP, coco/segm_mAP, coco/segm_mAP_50, coco/segm_mAP_s') as e:
            compare.check_metrics(runs, metrics)
        return [(p.facts['metric'], p.facts['suggestion']) for p in e.value.problems]

    assert problems('segm_mAP') == [('segm_mAP', '; did you mean coco/segm_mAP?')]
    # What training logs is not a metric either.
    assert problems('coco/segm_mAP', 'bbox_mAP', 'xyz') == [('bbox_mAP', '; did you mean coco/bbox_mAP?'), ('xyz', '')]
    ((_, alike),) = problems('coco/segm_AP50')
    assert 'coco/segm_mAP_50' in alike
    with refused('compare-not-validated'):
        compare.check_metrics(runs[2:], ['coco/segm_mAP'])


@pytest.mark.parametrize('names', [['a'], ['a', 'b', 'c', 'd']])
def test_names_must_be_as_many_as_folders(three, names):
    with refused('compare-name-count', folders=3, names=len(names)):
        compare.read_runs(three, names)


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [write_log(tmp_path / parent / 'run', {1: 0.5}) for parent in 'ab']
    assert [run.name for run in compare.read_runs(folders)] == [str(f) for f in folders]
    assert [run.name for run in compare.read_runs(folders[:1])] == ['run']


def test_validation_loss_is_that_of_the_table_not_the_smoothed_one(tmp_path):
    log = tmp_path / '20260101_000000/vis_data/scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"val/loss": 2.0, "step": 1}\n{"val/loss": 1.5, "step": 2}\n')
    assert compare.read_run(tmp_path, 'x').curve('val/loss') == {1: 2.0, 2: 1.5}
    (tmp_path / 'results.csv').write_text('epoch,iter,val/loss\n1,5,2.0\n2,10,1.0\n3,15,0.5\n')
    assert compare.read_run(tmp_path, 'x').curve('val/loss') == {1: 2.0, 2: 1.0}
    # Of an iteration-based run.
    (tmp_path / 'results.csv').write_text('epoch,iter,val/loss\n,1,3.0\n')
    assert compare.read_run(tmp_path, 'x').curve('val/loss') == {1: 2.0, 2: 1.5}


def test_picture_has_two_panels_and_all_colours(tmp_path):
    names = ['_hidden', 'cost $5 or $6', 'a rather long name ' * 5, *'defghijk', '\u5b9e\u9a8c 1']
    runs = [
        compare.Run(name, tmp_path, {epoch: validation(epoch, 0.1 * i + 0.02 * epoch) for epoch in range(i % 2, 6)})
        for i, name in enumerate(names)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # of a layout that does not fit, or missing letters
        image = Image.open(io.BytesIO(compare.picture(runs, ['coco/segm_mAP'])))
        alone = Image.open(io.BytesIO(compare.picture(runs[:1], ['coco/segm_mAP_s'])))
    assert (image.format, image.size, alone.size) == ('PNG', (1800, 750), (900, 750))
    pixels = np.asarray(image.convert('RGB')).reshape(-1, 3)
    for colour in plots.COLOURS:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=1).sum() > 500, colour


def test_picture_of_several_metrics_and_of_a_loss_that_all_have(tmp_path):
    def run(name: str, **more: float) -> compare.Run:
        return compare.Run(name, tmp_path, {e: {**validation(e, 0.1 * e), **more} for e in (1, 2)})

    lossy, plain = run('a', **{'val/loss': 2.0}), run('b')

    def size(runs: list[compare.Run], *metrics: str) -> tuple[int, int]:
        return Image.open(io.BytesIO(compare.picture(runs, metrics))).size

    assert size([lossy, plain], 'coco/segm_mAP') == (1800, 750)
    assert size([lossy, lossy], 'coco/segm_mAP') == (2700, 750)
    assert size([lossy], 'coco/segm_mAP', 'val/loss') == (2700, 750)
    assert size([lossy], 'coco/segm_mAP', 'coco/bbox_mAP') == (2700, 1500)


def test_command_line(three, tmp_path):
    stem = tmp_path / 'out/lr_0.02'
    done = spawn(TOOLS / 'compare_runs.py', *three, '--out', stem)
    assert (done.code, done.err) == (0, '')
    files = [Path(f'{stem}{suffix}') for suffix in ('.md', '.csv', '.png')]
    assert done.out == f'{TABLE}\n{OVERVIEW}\nResults: {" ".join(map(str, files))}\n'
    assert sorted(stem.parent.iterdir()) == sorted(files)
    assert (files[0].read_text(), files[1].read_text()) == (f'{TABLE}\n{OVERVIEW}', CSV)
    assert Image.open(files[2]).size == (1800, 750)


def test_several_metrics_on_the_command_line(three, tmp_path):
    done = drive('compare_runs', *three, '--metric', 'coco/segm_mAP', 'coco/bbox_mAP', '--out', tmp_path / 'both')
    assert done.code == 0, done.err
    text = (tmp_path / 'both.md').read_text()
    assert text.startswith(f'{TABLE}\n| coco/bbox_mAP after epoch |') and text.endswith(OVERVIEW)
    rows = list(csv.DictReader((tmp_path / 'both.csv').open()))
    assert [(row['run'], row['metric'], row['best_epoch']) for row in rows] == [
        ('tuned', 'coco/segm_mAP', '2'),
        ('scratch', 'coco/segm_mAP', '2'),
        ('new', 'coco/segm_mAP', ''),
        ('tuned', 'coco/bbox_mAP', '2'),
        ('scratch', 'coco/bbox_mAP', '2'),
        ('new', 'coco/bbox_mAP', ''),
    ]


def test_mistake_on_the_command_line_leaves_no_files(three, tmp_path):
    done = drive('compare_runs', *three, '--metric', 'coco/segm_AP50', '--out', tmp_path / 'out/x')
    assert (done.code, done.out, done.error) == (2, '', 'compare-metrics')
    assert 'coco/segm_mAP_50' in done.err
    assert not (tmp_path / 'out').exists()


def test_default_stem_and_a_folder_as_stem(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = drive('compare_runs', three[0], '--names', 'fine-tuned', '--metric', 'coco/segm_mAP_50')
    assert done.out.splitlines()[-1] == 'Results: ' + ' '.join(
        f'work_dirs/comparison{suffix}' for suffix in ('.md', '.csv', '.png')
    )
    assert '| fine-tuned ' in done.out
    assert drive('compare_runs', three[0], '--out', tmp_path).code == 0
    assert (tmp_path / 'comparison.png').stat().st_size > 10_000


def test_help_imports_no_matplotlib_nor_torch():
    done = spawn('-X', 'importtime', TOOLS / 'compare_runs.py', '--help')
    imported = {line.rpartition('|')[2].strip() for line in done.err.splitlines()}
    assert done.code == 0 and 'mmfinetune.evaluation.compare' in imported
    assert not imported & {'matplotlib', 'torch', 'mmengine', 'numpy'}
