"""The training path, driven through the tool as a user does, on a few small images."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmfinetune.apis import run_data, train
from mmfinetune.data import demo
from mmfinetune.engine import launch
from mmfinetune.evaluation import run_results
from mmfinetune.utils import extras
from mmfinetune.utils.errors import UserError
from tests.builders.curves import curves
from tests.builders.errors import refused
from tests.builders.runs import (
    CONFIGS,
    DEVKIT,
    EPOCH_STEPS,
    REPO,
    TOOLS,
    TRAIN_IMAGES,
    VAL_IMAGES,
    Outcome,
    drive,
    drive_next,
    files_in,
    make_site,
    random_state_dict,
    read_results,
    save_hashed,
    spawn,
    train_tool,
    write_tiny_config,
)
from tests.builders.weights import Evil

# MMEngine's visualizer, of boxes that end at the image's edge.
pytestmark = pytest.mark.filterwarnings('ignore:.*out of bounds')

GROUPS = {'backbone': 0.1, 'neck': 0.5, 'rpn_head': 1.0, 'roi_head': 1.0}
TERMS = ('loss_cls', 'loss_bbox', 'loss_mask', 'loss_rpn_cls', 'loss_rpn_bbox')
TAGS = {
    *(f'{run}/1_loss/{term}' for run in ('train', 'val') for term in ('loss', *TERMS)),
    'train/4_other/grad_norm',
    'train/7_time/iter',
    'train/7_time/data',
    'train/7_time/eta_hours',
    'val/2_mAP/segm',
    'val/2_mAP/segm_50',
    'val/2_mAP/bbox',
    'val/2_mAP/bbox_50',
    *(f'train/3_lr/{group}' for group in GROUPS),
}
HEADS = ('roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg', 'roi_head.mask_head.conv_logits')
RUN_PARTS = ('meta', 'optimizer', 'message_hub')


def read(path: Path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def assert_refused(outcome: Outcome, code: str, *facts: object) -> None:
    """The tool ended with this error, which names these facts."""
    assert (outcome.code, outcome.error) == (2, code), outcome.out[-2000:] + outcome.err
    assert 'Traceback' not in outcome.err + outcome.out
    for fact in facts:
        assert str(fact) in outcome.err, outcome.err


# Told before the imports


@pytest.mark.parametrize(
    ('wrong', 'code'),
    [
        ({'batch_size': 'auto', 'resume': True}, 'resume-with-auto-batch'),
        ({'resume': 'nowhere.pth'}, 'resume-missing'),
        ({'resume': True, 'lr': 0.1}, 'resume-with-lr'),
        ({'resume': 'auto', 'lr': 0.1}, 'resume-with-lr'),
        ({'checkpoint': __file__}, 'checkpoint-without-test'),
        ({'checkpoint': __file__, 'dry_run': True}, 'checkpoint-without-test'),
    ],
)
def test_what_can_be_told_at_once(wrong, code):
    with refused(code):
        train.check_early(train.Options(config='tiny.py', **wrong))


def test_gpus_are_torchruns_business_where_it_started_the_run(monkeypatch):
    for name in ('LOCAL_RANK', launch.LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    asked = train.Options(config='tiny.py', gpus='4')
    train.check_early(asked)
    monkeypatch.setenv('LOCAL_RANK', '0')
    with refused('gpus-already-started'):
        train.check_early(asked)
    # The processes that --gpus itself started have the same command line.
    monkeypatch.setenv(launch.LAUNCHED, '1')
    train.check_early(asked)


def test_json_needs_a_report():
    outcome = train_tool('tiny.py', '--dry-run', '--json')
    assert outcome.code == 2 and '--check-weights' in outcome.err


# Train and test


def test_default_trains_then_tests(finished_run):
    assert finished_run.outcome.code == 0, finished_run.outcome.err
    files = files_in(finished_run.work_dir)
    assert {'epoch_1.pth', 'epoch_2.pth', 'last_checkpoint', 'test_results.json'} <= set(files)
    assert any(re.match(r'best_coco_segm_mAP_epoch_\d\.pth', f) for f in files)
    assert any(f.startswith('tensorboard_logs/tiny/train/events') for f in files)
    # num_images of the config, the first of the held-out ones.
    assert [f for f in files if f.startswith('figures')] == [f'figures/demo_val_{i:04d}.png' for i in range(3)]
    assert not [f for f in files if f.startswith(train.EARLIER)]


def test_data_and_annotations_are_made_on_the_way(finished_run):
    for split, count in (('train', TRAIN_IMAGES), ('val', VAL_IMAGES)):
        data = json.loads((finished_run.folder / DEVKIT / f'annotations/instances_{split}.json').read_text())
        assert len(data['images']) == count and len(data['categories']) == 20
    assert f'Data:  train {TRAIN_IMAGES} images' in finished_run.outcome.out


def test_numbers_are_printed_once_and_written(finished_run):
    out, results = finished_run.outcome.out, read_results(finished_run.kept / 'tiny')
    assert out.count('segm AP50 =') == 1
    assert f'segm AP50 = {results["metrics"]["coco/segm_mAP_50"]:.3f}' in out
    assert Path(results['checkpoint']).name.startswith('best_')
    assert {'coco/segm_mAP', 'coco/segm_mAP_50', 'coco/bbox_mAP'} <= set(results['metrics'])


def test_last_lines_say_where_the_results_are(finished_run):
    results, viewer = finished_run.outcome.last_lines()
    assert results == 'Results: work_dirs/tiny (pictures in figures/)'
    assert viewer == 'Curves:  tensorboard --logdir work_dirs/tiny/tensorboard_logs'


def test_weights_are_reported(finished_run):
    text = ' '.join(finished_run.outcome.out.split())
    kept = len(random_state_dict()) - 2 * len(HEADS)
    heads = ', '.join(HEADS)
    assert f'{finished_run.weights.name}: {kept} tensors loaded, 6 unused, 6 re-initialized ({heads})' in text


def test_curves(finished_run):
    found = curves(finished_run.kept / 'tiny/tensorboard_logs')
    assert set(found) >= TAGS
    # Four groups and no more, e.g. not the one in which the wrapper keeps the base lr.
    assert {t for t in found if '/3_lr/' in t} == {f'train/3_lr/{group}' for group in (*GROUPS, 'base')}
    assert [step for step, _ in found['train/1_loss/loss']] == [1, 2, 3, 4]
    assert [step for step, _ in found['val/2_mAP/segm']] == [2, 4]
    assert all(value == value for _, value in found['train/1_loss/loss'])


def test_each_group_has_its_share_of_the_lr_at_every_step(finished_run):
    found = curves(finished_run.kept / 'tiny/tensorboard_logs')
    # 0.02, warmed up from half of it over the first 2 steps.
    assert [v for _, v in found['train/3_lr/roi_head']] == pytest.approx([0.01, 0.02, 0.02, 0.02])
    for name, share in GROUPS.items():
        assert [v for _, v in found[f'train/3_lr/{name}']] == pytest.approx(
            [share * v for _, v in found['train/3_lr/roi_head']]
        )


def test_test_alone_gives_what_the_test_after_training_gave(in_finished_run):
    outcome = train_tool('tiny.py', '--test')
    assert outcome.code == 0, outcome.err
    assert read_results(in_finished_run.work_dir) == read_results(in_finished_run.kept / 'tiny')
    for kind in ('bbox', 'segm'):
        # The AP of a model this raw is 0; its predictions tell two models apart.
        now, then = (
            json.loads((folder / f'predictions.{kind}.json').read_text())
            for folder in (in_finished_run.folder, in_finished_run.kept)
        )
        assert now == then and len(now) > 10
    assert 'Epoch' not in outcome.out
    assert not (in_finished_run.work_dir / train.EARLIER).exists()
    assert {'epoch_1.pth', 'epoch_2.pth'} <= set(files_in(in_finished_run.work_dir))


@pytest.mark.parametrize('flag', ['--checkpoint', '--weights'])
def test_test_of_a_named_file(in_finished_run, flag):
    file = in_finished_run.kept / 'tiny/epoch_2.pth'
    # --weights is how the last release named it.
    config = Path('work_dirs/other/tiny.py')
    config.parent.mkdir(exist_ok=True)
    config.write_text('# of a run\n')
    outcome = train_tool('tiny.py', '--test', flag, file, '--work-dir', 'work_dirs/other')
    assert outcome.code == 0, outcome.err
    assert config.read_text() == '# of a run\n'  # a test has no settings of training to write there
    assert ('note: ' in outcome.err) is (flag == '--weights')
    assert read_results(Path('work_dirs/other'))['checkpoint'] == str(file)
    assert not list(Path('work_dirs/other').glob('*.pth'))


def test_test_of_a_checkpoint_with_other_classes(in_finished_run):
    assert_refused(
        train_tool('tiny.py', '--test', '--checkpoint', in_finished_run.weights),
        'weights-do-not-fit',
        'roi_head.bbox_head.fc_cls.weight: (21, 256) in the model, (81, 256) in the file',
    )


def test_training_starts_from_the_weights(in_site):
    # lr 0 leaves every parameter as the transfer put it; only BN statistics move.
    outcome = train_tool(
        'tiny.py', '--train', '--lr', '0', '--work-dir', 'work_dirs/still', '--cfg-options', 'train_cfg.max_epochs=1'
    )
    assert outcome.code == 0, outcome.err
    assert not Path('work_dirs/still/test_results.json').exists()
    trained = read(Path('work_dirs/still/epoch_1.pth'))['state_dict']
    source = random_state_dict()
    compared = 0
    for key, value in trained.items():
        if key.startswith(HEADS) or 'running_' in key or key.endswith('num_batches_tracked'):
            continue
        assert torch.equal(value, source[key]), key
        compared += 1
    assert compared > 80
    for head, std in zip(HEADS, (0.01, 0.001, 0.001), strict=True):
        assert trained[f'{head}.weight'].std().item() == pytest.approx(std, rel=0.1)
        assert not trained[f'{head}.bias'].any()


# Resume


def test_resume_goes_on(in_site):
    work_dir = Path('work_dirs/resumed')
    args = ('tiny.py', '--train', '--work-dir', work_dir, '--cfg-options')
    outcome = train_tool(*args, 'train_cfg.max_epochs=1')
    assert outcome.code == 0, outcome.err
    before = read(work_dir / 'epoch_1.pth')
    outcome = train_tool(*args, 'train_cfg.max_epochs=2', '--resume')
    assert outcome.code == 0, outcome.err
    assert re.findall(r'^Epoch (\d)/2 ', outcome.out, re.M) == ['2'] and '\nStep 3: ' in outcome.out
    # A second transfer would throw away what the heads have learnt.
    assert 'tensors loaded' not in outcome.out
    assert not (work_dir / train.EARLIER).exists()
    after = read(work_dir / 'epoch_2.pth')
    assert (before['meta']['iter'], after['meta']['iter']) == (EPOCH_STEPS, 2 * EPOCH_STEPS)
    found = curves(work_dir / train.LOG_DIR)
    assert [step for step, _ in found['train/1_loss/loss']] == [1, 2, 3, 4]
    # The warm-up is over and does not start again.
    assert [v for _, v in found['train/3_lr/roi_head']] == pytest.approx([0.01, 0.02, 0.02, 0.02])


def test_resume_starts_from_the_weights_of_the_checkpoint(in_finished_run):
    file = in_finished_run.kept / 'tiny/epoch_1.pth'
    seen = {}

    def before_train(hook, runner):
        seen.update({k: v.clone() for k, v in runner.model.state_dict().items()})
        raise UserError('test-seen', 'enough')

    with pytest.MonkeyPatch.context() as patch:
        from mmfinetune.engine.hooks.tensorboard import TensorBoardHook

        patch.setattr(TensorBoardHook, 'before_train', before_train)
        assert_refused(
            train_tool('tiny.py', '--train', '--resume', file, '--work-dir', 'work_dirs/from_path'), 'test-seen'
        )
    saved = read(file)['state_dict']
    assert set(seen) == set(saved)
    assert all(torch.equal(value.cpu(), saved[key]) for key, value in seen.items())


@pytest.mark.parametrize('by_path', [True, False], ids=['path', 'last of the work dir'])
@pytest.mark.parametrize('kind', ['truncated', 'malicious', 'config in it', 'weights only', 'other classes'])
def test_resume_from_a_bad_file(in_finished_run, tmp_path, kind, by_path):
    file, marker = tmp_path / 'epoch_1.pth', tmp_path / 'marker'
    whole = in_finished_run.kept / 'tiny/epoch_1.pth'
    if kind == 'truncated':
        file.write_bytes(whole.read_bytes()[:100_000])
        parts = ('weights-unreadable', file)
    elif kind == 'malicious':
        torch.save({**read(whole), 'evil': Evil(os.mkdir, str(marker))}, file)
        parts = ('weights-code', file, 'mkdir')
    elif kind == 'config in it':
        # Runner.resume runs the text, so that data alone can carry code.
        whole = read(whole)
        whole['meta']['config'] = f'import os\nos.mkdir({str(marker)!r})\n'
        torch.save(whole, file)
        parts = ('resume-holds-code', file)
    elif kind == 'weights only':
        torch.save({'state_dict': read(whole)['state_dict']}, file)
        parts = ('resume-no-run', file, *RUN_PARTS)
    else:
        torch.save({**read(whole), 'state_dict': random_state_dict()}, file)
        parts = ('weights-do-not-fit', file, 'fc_cls.weight: (21, 256) in the model, (81, 256) in the file')
    (tmp_path / 'last_checkpoint').write_text(str(file))
    before = files_in(tmp_path)
    resume = ['--resume', file] if by_path else ['--resume']
    work_dir = tmp_path / 'work' if by_path else tmp_path
    assert_refused(train_tool('tiny.py', *resume, '--work-dir', work_dir), *parts)
    assert not marker.exists()
    assert files_in(tmp_path) == before


def test_resume_without_a_checkpoint(in_site, tmp_path):
    assert_refused(train_tool('tiny.py', '--resume', '--work-dir', tmp_path), 'resume-nothing', tmp_path)
    assert_refused(train_tool('tiny.py', '--resume', 'nowhere.pth'), 'resume-missing', 'nowhere.pth')
    assert not files_in(tmp_path)


def test_resume_keeps_its_lr_and_says_so(in_site):
    assert_refused(train_tool('tiny.py', '--resume', '--lr', '0.1'), 'resume-with-lr')


# A second run in the same folder


def test_a_second_run_sets_the_first_aside(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(finished_run.folder)
    work_dir = tmp_path / 'run'
    shutil.copytree(finished_run.kept / 'tiny', work_dir)
    before = {f: (work_dir / f).read_bytes() for f in files_in(work_dir)}
    args = ('tiny.py', '--train', '--work-dir', work_dir, '--cfg-options', 'train_cfg.max_epochs=1')
    outcome = train_tool(*args)
    assert outcome.code == 0, outcome.err
    [stamp] = [p.name for p in (work_dir / train.EARLIER).iterdir()]
    assert re.fullmatch(r'\d{8}_\d{6}', stamp)
    assert f'{work_dir / train.EARLIER / stamp}' in outcome.out and '--resume' in outcome.out
    aside = work_dir / train.EARLIER / stamp
    assert {f: (aside / f).read_bytes() for f in files_in(aside)} == before
    # Nothing of the first is left to be taken for the second's.
    assert not (work_dir / 'epoch_2.pth').exists()
    assert not (work_dir / 'test_results.json').exists()
    assert [s for s, _ in curves(work_dir / train.LOG_DIR)['train/1_loss/loss']] == [1, 2]


@pytest.mark.parametrize('options', [['--train'], ['--train', '--resume'], ['--resume', 'auto'], ['--test'], []])
def test_a_folder_in_which_a_run_is_going_on(in_finished_run, tmp_path, options):
    work_dir = tmp_path / 'run'
    shutil.copytree(in_finished_run.kept / 'tiny', work_dir)
    hold = 'from mmfinetune.utils.run_lock import RunLock\nfrom pathlib import Path\nimport sys\n'
    hold += 'with RunLock() as lock:\n    lock.take(Path(sys.argv[1]))\n    print("taken", flush=True)\n    sys.stdin.read()'
    command = [sys.executable, '-c', hold, work_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == 'taken\n'
        before = files_in(work_dir)
        assert_refused(
            train_tool('tiny.py', *options, '--gpus', '1', '--work-dir', work_dir), 'run-going-on', other.pid
        )
        assert files_in(work_dir) == before
        assert train_tool('tiny.py', '--dry-run', '--gpus', '1', '--work-dir', work_dir).code == 0
        other.communicate()
    assert not (work_dir / 'run.lock').exists()


def test_earlier_runs_pile_up_even_within_a_second(tmp_path, capsys):
    for name in ('a', 'b', 'c'):
        (tmp_path / f'{name}.pth').touch()
        train._move_earlier_run(tmp_path, tmp_path / 'logs')
    assert len(list((tmp_path / train.EARLIER).iterdir())) == 3
    assert sorted(p.name for p in tmp_path.rglob('*.pth')) == ['a.pth', 'b.pth', 'c.pth']
    assert not list(tmp_path.glob('*.pth'))
    capsys.readouterr()


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    train._move_earlier_run(tmp_path, tmp_path / 'logs')
    assert files_in(tmp_path) == ['notes.txt']


# Dry run


@pytest.mark.parametrize(
    ('args', 'lr', 'source'),
    [
        ([], 0.02, '0.02 x (1 GPU x 4 images x 1 accumulation) / 4'),
        (['--cfg-options', 'train_dataloader.batch_size=2'], 0.01, '0.02 x (1 GPU x 2 images x 1 accumulation) / 4'),
        (
            ['--cfg-options', 'optim_wrapper.accumulative_counts=3'],
            0.06,
            '0.02 x (1 GPU x 4 images x 3 accumulation) / 4',
        ),
        (['--lr', '0.5', '--cfg-options', 'train_dataloader.batch_size=2'], 0.5, '--lr'),
        (['--no-scale-lr', '--cfg-options', 'train_dataloader.batch_size=8'], 0.02, '--no-scale-lr'),
    ],
)
def test_dry_run_prints_the_plan(in_site, args, lr, source):
    outcome = train_tool('tiny.py', '--dry-run', '--work-dir', 'work_dirs/dry', *args)
    assert outcome.code == 0, outcome.err
    assert re.search(rf'^lr: +{lr:g} = .*{re.escape(source)}', outcome.out, re.M), outcome.out
    for name, share in GROUPS.items():
        assert re.search(rf'lr/{name} +{lr * share:g} += {share:g} x lr$', outcome.out, re.M), outcome.out
    assert not Path('work_dirs/dry').exists()


DRY_RUNS = """
import sys
from mmfinetune.apis import train
from mmfinetune.utils.errors import UserError
for config in sys.argv[1:]:
    demo = ('demo_data.num_train=4', 'demo_data.num_val=2') if '_demo' in config else ()
    weights = {'check_weights': True, 'train': True}
    for parts in ({}, {'train': True}, weights, {**weights, 'weights': 'http://127.0.0.1:9/a.pth'}):
        try:
            train.run(train.Options(config, dry_run=True, cfg_options=demo, **parts))
            print(config, 'OK')
        except UserError as error:
            print(config, error.code)
"""


@pytest.mark.slow
def test_dry_run_writes_nothing_anywhere(tmp_path):
    places = {name: tmp_path / name for name in ('cwd', 'home', 'tmp')}
    for place in places.values():
        place.mkdir()
    demo.make_voc(places['cwd'] / 'data', 8, 4, progress=False)
    configs = sorted(str(path) for path in CONFIGS.glob('*.py'))
    env = {**os.environ, 'HOME': str(places['home']), 'TMPDIR': str(places['tmp']), 'PYTHONDONTWRITEBYTECODE': '1'}
    for name in ('XDG_CACHE_HOME', 'TORCH_HOME', 'MPLCONFIGDIR'):
        env.pop(name, None)

    def trees() -> list[str]:
        repo = [p for p in files_in(REPO) if not p.startswith('.') and '__pycache__' not in p]
        return [*map(str, sorted(tmp_path.rglob('*'))), *repo]

    before = trees()
    done = subprocess.run(
        [sys.executable, '-c', DRY_RUNS, *configs],
        cwd=places['cwd'],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert trees() == before
    assert done.returncode == 0, done.stderr[-3000:]
    ended = [line.split() for line in done.stdout.splitlines() if line.startswith(str(CONFIGS))]
    assert {code for _, code in ended} == {
        *('OK', 'weights-nowhere', 'weights-no-source', 'download-offline'),
        *('config-without-weights', 'check-without-weights'),
    }
    assert len(ended) == 4 * len(configs)
    # What it says is where training will have it.
    assert '(instances_train.json)' in done.stdout and ' in data/demo/VOCdevkit/VOC2012/annotations\n' in done.stdout
    assert str(places['tmp']) not in done.stdout


@pytest.mark.parametrize('parts', [['--train'], ['--train', '--test'], ['--gpus', '2', '--train'], ['--check-weights']])
def test_dry_run_of_parts_is_a_dry_run(in_site, parts):
    outcome = train_tool('tiny.py', '--dry-run', '--work-dir', 'work_dirs/dry', *parts)
    assert outcome.code == 0, outcome.err
    assert 'Steps: ' in outcome.out and outcome.out.rstrip().endswith('Dry run: nothing was trained.')
    assert ('origin: ' in outcome.out) == (parts == ['--check-weights'])
    assert 'Starting 2 processes' not in outcome.out
    assert not Path('work_dirs/dry').exists()


def test_a_start_that_fails_takes_its_log_folder_away_and_nothing_else(in_site, monkeypatch):
    from mmfinetune.engine.runner import FineTuningRunner

    work_dir = Path('work_dirs/mine')
    made = []

    def build(runner):
        made.append(Path(runner.log_dir))
        (work_dir / 'notes').mkdir()
        (work_dir / 'notes/mine.txt').write_text('x')
        raise UserError('config-cannot-build')

    monkeypatch.setattr(FineTuningRunner, 'build', build)
    assert_refused(train_tool('tiny.py', '--train', '--work-dir', str(work_dir)), 'config-cannot-build')
    assert made and not made[0].exists() and (work_dir / 'notes/mine.txt').exists()


def test_dry_run_counts_images_and_steps(in_site):
    out = train_tool(
        'tiny.py', '--dry-run', '--cfg-options', 'train_dataloader.batch_size=3', 'train_cfg.max_epochs=5'
    ).out
    assert f'train {TRAIN_IMAGES} images' in out and f'val   {VAL_IMAGES} images' in out
    assert '8 images / (1 GPU x 3) = 3 an epoch x 5 epochs = 15' in out
    assert 'nothing was trained' in out.splitlines()[-1]


@pytest.mark.parametrize(
    ('changes', 'code', 'said'),
    [
        # Building each part alone shows none of these.
        (
            ['train_dataloader.dataset.pipeline.2.scale=[0,0]'],
            'config-cannot-build',
            'train_dataloader.dataset.pipeline',
        ),
        (['model.roi_head.bbox_head.loss_bbox.beta=abc'], 'config-wrong-settings', 'loss_bbox.beta'),
        (['val_evaluator.iou_thrs=[0.5,7]'], 'metric-iou-thrs', '[0.5, 7]'),
        (["param_scheduler=[dict(type='MultiStepLR', milestones=[1], gamma=-0.1)]"], 'schedule-negative', 'at step'),
        (['model.test_cfg.rcnn.nms.type=foo'], 'config-cannot-build', 'a step of val_dataloader'),
        (['weights=None', 'model.roi_head.mask_head=None'], 'metric-no-masks', "'segm'"),
    ],
)
def test_dry_run_tries_what_training_will_do(in_site, changes, code, said):
    outcome = train_tool('tiny.py', '--dry-run', '--work-dir', 'work_dirs/dry', '--cfg-options', *changes)
    assert (outcome.code, outcome.error) == (2, code), outcome.err or outcome.out
    assert said in outcome.err
    assert not Path('work_dirs/dry').exists()


# Weights


def test_check_weights_says_where_each_part_comes_from(in_site):
    before = files_in(in_site)
    outcome = train_tool('tiny.py', '--check-weights')
    assert outcome.code == 0, outcome.err
    sizes = {k: v.numel() for k, v in random_state_dict().items()}
    backbone = [k for k in sizes if k.startswith('backbone.')]
    assert re.search(
        rf'^backbone +{len(backbone)} +{sum(sizes[k] for k in backbone):,} '
        rf'+{len(backbone)} +0 ',
        outcome.out,
        re.M,
    ), outcome.out
    for head in HEADS:
        assert re.search(rf'^{head} +2 +[\d,]+ +0 +2 ', outcome.out, re.M), outcome.out
        assert f'{head}.{{weight,bias}}' in outcome.out.split('unused tensors in the file: ')[1]
    assert 'SHA-256 begins with' in outcome.out
    assert outcome.out.splitlines()[-1].startswith('OK')
    assert files_in(in_site) == before


def test_check_weights_for_machines(in_site):
    outcome = train_tool('tiny.py', '--check-weights', '--json', '--head-init', 'remap')
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report['good_to_train'] and len(report['remapped']) == 6 and not report['reinit']
    assert report['classes']['aeroplane'] == 'airplane'


def test_untrained_model_is_tested_and_stays_epoch_zero(in_site, tmp_path):
    run = tmp_path / 'run'
    outcome = train_tool('tiny.py', '--test', '--head-init', 'remap', '--work-dir', str(run))
    assert outcome.code == 0, outcome.err
    assert 'aeroplane <- airplane' in outcome.out
    zero = json.loads((run / 'zero_shot.json').read_text())
    assert zero['metrics']['coco/segm_mAP'] >= 0 and not (run / 'test_results.json').exists()
    assert train_tool('tiny.py', '--train', '--work-dir', str(run), '--cfg-options', 'train_cfg.max_epochs=1').code == 0
    assert json.loads((run / 'zero_shot.json').read_text()) == zero


def test_head_init_without_weights_is_refused(in_site):
    outcome = train_tool('tiny.py', '--head-init', 'remap', '--cfg-options', 'weights=None')
    assert_refused(outcome, 'config-without-weights')


def test_check_weights_needs_no_data(finished_run, tmp_path, monkeypatch):
    make_site(tmp_path, data=False)
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    assert train_tool('tiny.py', '--check-weights').code == 0
    assert files_in(tmp_path) == before


def test_bundled_weights_fit_the_demo(monkeypatch):
    monkeypatch.chdir(REPO)
    [file] = Path('pretrain').glob('mask_rcnn_demo_*.pth')
    assert file.stat().st_size <= 8_000_000
    outcome = train_tool('configs/mask_rcnn_demo.py', '--check-weights')
    assert outcome.code == 0, outcome.err
    assert str(file) in outcome.out and 'as its name says' in outcome.out


def _with_extra_layers(state: dict) -> dict:
    return {**state, 'backbone.layer3.2.conv1.weight': torch.zeros(64, 64, 3, 3)}


def _with_other_width(state: dict) -> dict:
    return {**state, 'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}


def _without_a_layer(state: dict) -> dict:
    return {k: v for k, v in state.items() if k != 'neck.lateral_convs.0.conv.weight'}


@pytest.mark.parametrize('parts', [['--check-weights'], ['--train'], []], ids=['check', 'train', 'default'])
@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (_with_extra_layers, 'backbone.layer3.2.conv1.weight: in the file, but the model has no'),
        (_with_other_width, 'backbone.conv1.weight: (16, 3, 7, 7)'),
        (_without_a_layer, 'neck.lateral_convs.0.conv.weight: not in the file'),
    ],
)
def test_weights_of_another_architecture(in_finished_run, tmp_path, change, problem, parts):
    file = save_hashed({'state_dict': change(random_state_dict())}, tmp_path / 'other')
    work_dir = tmp_path / 'run'
    shutil.copytree(in_finished_run.kept / 'tiny', work_dir)
    before = files_in(tmp_path)
    assert_refused(
        train_tool('tiny.py', *parts, '--weights', file, '--work-dir', work_dir),
        'weights-do-not-fit',
        file.name,
        problem,
    )
    # Neither logs of a run that never began, nor the earlier run moved out of the way for it.
    assert files_in(tmp_path) == before


def test_missing_weights_leave_the_earlier_run_alone(in_finished_run, tmp_path, tmp_path_factory, monkeypatch):
    work_dir = tmp_path / 'run'
    shutil.copytree(in_finished_run.kept / 'tiny', work_dir)
    before = files_in(tmp_path)
    write_tiny_config(tmp_path / 'gone.py', weights='pretrain/gone-0123abcd.pth')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'no'))
    # The check of the data is kept there; it is no result of the run.
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    assert_refused(
        train_tool(tmp_path / 'gone.py', '--work-dir', work_dir), 'weights-nowhere', 'pretrain/gone-0123abcd.pth'
    )
    assert files_in(tmp_path) == sorted([*before, 'gone.py'])


def test_a_run_from_random_weights(in_site, tmp_path):
    config = write_tiny_config(tmp_path / 'scratch.py', 'mask_rcnn_demo_scratch.py', epochs=1)
    outcome = train_tool(config, '--train', '--work-dir', tmp_path / 'run')
    assert outcome.code == 0, outcome.err
    assert 'tensors loaded' not in outcome.out
    assert (tmp_path / 'run/epoch_1.pth').is_file()
    [weights] = in_site.glob('pretrain/*.pth')
    assert_refused(train_tool(config, '--check-weights'), 'check-without-weights')
    assert_refused(train_tool(config, '--weights', weights), 'config-without-weights')


# Data


@pytest.mark.parametrize('below', ['', 'VOCdevkit', 'VOCdevkit/VOC2012'])
def test_data_root_may_be_any_folder_around_the_devkit(in_site, tmp_path, below):
    demo.make_voc(tmp_path, 3, 2, seed=5, progress=False)
    outcome = train_tool('tiny.py', '--dry-run', '--data-root', tmp_path / below)
    assert outcome.code == 0, outcome.err
    made = tmp_path / 'VOCdevkit/VOC2012/annotations'
    for split, count, name in (('train', 3, 'train'), ('test', 2, 'val')):
        line = next(line for line in outcome.out.splitlines() if line.startswith(f'Data:  {split} '))
        assert f' {count} images' in line and line.endswith(f'(instances_{name}.json)')
    assert f'       in {made}\n' in outcome.out


def test_metrics_are_those_of_the_data_root(in_finished_run, tmp_path):
    demo.make_voc(tmp_path, 3, 2, seed=5, progress=False)
    outcome = train_tool(
        'tiny.py',
        '--test',
        '--data-root',
        tmp_path,
        '--checkpoint',
        in_finished_run.kept / 'tiny/epoch_2.pth',
        '--work-dir',
        tmp_path / 'run',
    )
    assert outcome.code == 0, outcome.err
    metrics = read_results(tmp_path / 'run')['metrics']
    measured = {key.split('/')[-1] for key in metrics if key.startswith('coco/segm_AP/')}
    # A class without an instance has no AP, so that the keys tell one ground truth from another.
    assert measured == _classes_in(tmp_path / 'VOCdevkit/VOC2012')
    assert measured != _classes_in(in_finished_run.folder / DEVKIT)


def _classes_in(devkit: Path) -> set[str]:
    data = json.loads((devkit / 'annotations/instances_val.json').read_text())
    names = {c['id']: c['name'] for c in data['categories']}
    return {names[a['category_id']] for a in data['annotations']}


def test_a_devkit_where_nothing_may_be_written(own_site, monkeypatch):
    # chmod would not stop root.
    devkit = (own_site / DEVKIT).resolve()
    shutil.rmtree(devkit / 'annotations')
    access = os.access
    monkeypatch.setattr(
        os,
        'access',
        lambda path, mode, **kwargs: (
            access(path, mode, **kwargs) and not (mode == os.W_OK and Path(path).resolve() == devkit)
        ),
    )
    work_dir = own_site / 'work_dirs/tiny'
    for count in (0, 1):
        outcome = train_tool('tiny.py', '--train', '--cfg-options', 'train_cfg.max_epochs=1')
        assert outcome.code == 0, outcome.err
        assert not (devkit / 'annotations').exists()
        assert (work_dir / 'annotations/instances_train.json').is_file()
        # The annotations are of use to the second run too: they are not set aside.
        earlier = work_dir / train.EARLIER
        assert len(list(earlier.iterdir()) if earlier.exists() else []) == count


def test_an_image_that_breaks_while_a_worker_reads_it(own_site, monkeypatch):
    check = run_data.read_split

    def check_then_break(*args, **kwargs):
        split = check(*args, **kwargs)
        image.write_bytes(b'gone bad')
        return split

    image = own_site / DEVKIT / 'JPEGImages/demo_train_0003.jpg'
    whole = image.read_bytes()
    monkeypatch.setattr(run_data, 'read_split', check_then_break)
    args = (
        'tiny.py',
        '--train',
        '--no-check',
        '--cfg-options',
        'train_dataloader.num_workers=1',
        'train_cfg.max_epochs=1',
    )
    outcome = train_tool(*args, 'train_cfg.max_faulty_images=0')
    assert_refused(outcome, 'train-faulty-images', 'demo_train_0003.jpg')
    assert 'DataLoader' not in outcome.err
    image.write_bytes(whole)
    outcome = train_tool(*args)
    assert outcome.code == 0, outcome.err
    assert '1 training images cannot be read and are replaced by others' in outcome.out


# Several processes


def test_torchrun_of_two(in_site, tmp_path):
    outcome = spawn(
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        TOOLS / 'train_pretrained.py',
        'tiny.py',
        '--work-dir',
        tmp_path / 'run',
        '--cfg-options',
        'train_cfg.max_epochs=1',
    )
    assert outcome.code == 0, outcome.err[-3000:]
    assert 'lr:    0.04 = 0.02 x (2 GPU x 4 images x 1 accumulation) / 4' in outcome.out
    assert '8 images / (2 GPU x 4) = 1 an epoch' in outcome.out
    for once in ('segm AP50 =', 'Results: ', 'Weights: ', 'Step 1: ', 'Epoch 1/1', 'val loss'):
        assert outcome.out.count(once) == 1, once
    files = files_in(tmp_path / 'run')
    assert {'epoch_1.pth', 'test_results.json'} <= set(files)
    assert len([f for f in files if f.startswith('tensorboard_logs')]) == 2
    # MMEngine gathers results by way of files in the working folder, if it may.
    assert not (in_site / '.dist_test').exists()


def test_nothing_that_is_shown_ends_a_run(finished_run, own_site, monkeypatch):
    """Each file that comes with the results is blocked; resumed, trained, tested: exit code 0."""
    monkeypatch.delenv(extras.STRICT)
    work_dir = Path('work_dirs/tiny')
    shutil.copytree(finished_run.kept / 'tiny', work_dir)
    Path('tiny.py').write_text(
        Path('tiny.py').read_text() + f'weights = dict(checkpoint={str(finished_run.weights)!r})\n'
    )
    for name in [*run_results._FILES, run_results.CLASS_BARS]:
        path = work_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if name in ('figures', train.LOG_DIR):
            path.write_text('in the way')
        else:
            (path / 'in the way').mkdir(parents=True)
    outcome = train_tool('tiny.py', '--resume', work_dir / 'epoch_1.pth')
    assert outcome.code == 0, outcome.err
    assert 'Traceback' not in outcome.err + outcome.out
    assert (work_dir / 'epoch_2.pth').is_file() and re.search(r'boxes +0\.\d{3}', outcome.out)
    said = set(re.findall(r'^warning: Skipped\s+(\S+):', outcome.out, re.MULTILINE))
    assert said == {
        *('TensorBoardHook.before_train', 'tables', '8_images/train_batch', 'LoggerHook.after_train_iter'),
        *('TensorBoardHook.after_train_iter', 'TensorBoardHook.after_val_iter', 'LoggerHook.after_val_epoch'),
        *(
            'curves.png',
            'per_class.png',
            'summary.md',
            'TensorBoardHook.after_train',
            'TestPicturesHook.after_test_iter',
        ),
        str(work_dir.resolve() / train.TEST_RESULTS),
    }
    # What is not there is not pointed to.
    assert outcome.last_lines(1) == [f'Results: {work_dir}']
    assert 'all numbers' not in outcome.out


def test_a_training_that_cannot_have_learned_says_so(finished_run, own_site):
    """Fewer steps than the warm-up and AP 0: exit code 0, and commands that run."""
    Path('tiny.py').write_text(Path('tiny.py').read_text() + 'param_scheduler[0].update(end=500)\n')
    outcome = train_tool(
        'tiny.py', '--train', '--work-dir', 'work_dirs/short', '--cfg-options', 'train_cfg.max_epochs=1'
    )
    assert outcome.code == 0, outcome.err
    told = outcome.out[outcome.out.index('Diagnosis:') :].splitlines()
    assert [line[:4] for line in told if line.startswith('  ')] == ['  - ', '  - ', '  1.', '  2.', '  3.']
    assert 'had reached 0.01' in told[1]
    commands = re.findall(r'python tools/(.*)', '\n'.join(told))
    assert len(commands) >= 2
    for command in commands:
        tool, *args = shlex.split(command)
        done = drive(tool.removesuffix('.py'), *args)
        assert done.code in (0, 1), (command, done.err)


# Several runs in one process, as in a notebook


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def assert_whole_run(work_dir: Path, other: Path) -> None:
    """The records of a run are all in its folder, and those of no other: they are as in a process of its own."""
    found, expected = (
        {tag: points for tag, points in curves(folder / train.LOG_DIR).items() if '/7_time/' not in tag}
        for folder in (work_dir, other)
    )
    assert found == expected
    assert len(list((work_dir / train.LOG_DIR).iterdir())) == 1
    assert len((work_dir / 'results.csv').read_text().splitlines()) == 3
    rows = [json.loads(line) for line in next(work_dir.glob('2*/vis_data/scalars.json')).read_text().splitlines()]
    assert [row['step'] for row in rows if 'lr' in row] == [1, 2, 3, 4]
    [log] = work_dir.glob('2*/*.log')
    assert len(re.findall(r'Epoch\(train\)', log.read_text())) == 4 and str(work_dir) in log.read_text()
    checkpoint = read(work_dir / 'epoch_2.pth')
    assert checkpoint['meta']['iter'] == 4
    assert len(checkpoint['message_hub']['log_scalars']['train/loss'].data[0]) == 4


def test_runs_in_one_process_do_not_mix(in_finished_run, tmp_path):
    expected, first, second = in_finished_run.kept / 'tiny', tmp_path / 'first', tmp_path / 'second'
    assert drive('train_pretrained', 'tiny.py', '--train', '--work-dir', first).code == 0
    assert_whole_run(first, expected)
    before = contents(first)
    assert drive_next('train_pretrained', 'tiny.py', '--train', '--work-dir', second).code == 0
    assert_whole_run(second, expected)
    assert contents(first) == before

    # The same folder again: the earlier run is set aside as it was.
    assert drive_next('train_pretrained', 'tiny.py', '--train', '--work-dir', first).code == 0
    [aside] = (first / 'earlier_runs').iterdir()
    moved = contents(aside)
    assert moved == {name: before[name] for name in moved}
    assert_whole_run(first, expected)

    # A test and predictions afterwards add nothing to the records of the trainings.
    before_first, before_second = contents(first), contents(second)
    curves_before = curves(second / train.LOG_DIR)
    assert drive_next('train_pretrained', 'tiny.py', '--test', '--work-dir', second).code == 0
    image = next((in_finished_run.folder / DEVKIT / 'JPEGImages').glob('*'))
    done = drive_next('predict', image, '--run', second, '--out', tmp_path / 'out')
    assert done.code == 0, done.err
    assert contents(first) == before_first
    after = contents(second)
    changed = [name for name, data in before_second.items() if after.get(name) != data]
    assert not [name for name in changed if name.startswith(('2', train.LOG_DIR))]
    assert curves(second / train.LOG_DIR) == curves_before
