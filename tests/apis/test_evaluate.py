from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmfinetune.apis import evaluate, run_weights
from mmfinetune.apis.evaluate import Options
from mmfinetune.config import load, paths
from mmfinetune.evaluation import error_plots
from mmfinetune.utils import extras
from mmfinetune.utils.errors import Message
from tests.builders.errors import refused
from tests.builders.results import FOUND, THINGS, data_set, rows_of, write
from tests.builders.runs import CONFIGS, REPO, FinishedRun, drive, files_in, forget_runs, train_tool

ANN = 'data/demo/VOCdevkit/VOC2012/annotations/instances_{}.json'


@pytest.fixture
def saved(tmp_path: Path) -> Options:
    """Predictions, ground truth and images by hand."""
    for i in (1, 2):
        Image.new('RGB', (80, 60), (90, 120, 90)).save(tmp_path / f'image_{i}.png')
    return Options(
        ann=write(tmp_path / 'ann.json', data_set(THINGS)),
        predictions=write(tmp_path / 'p.segm.json', rows_of(FOUND)),
        boxes=write(tmp_path / 'p.bbox.json', rows_of(FOUND, 'bbox')),
        out=tmp_path / 'out',
    )


@pytest.fixture(scope='module')
def remapped(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that finds something: the bundled weights, their heads remapped to the classes."""
    import torch
    from mmdet.registry import MODELS

    cfg = load.load(next((finished_run.kept / 'tiny').glob('*.py')))
    bundled = REPO / load.load(CONFIGS / 'mask_rcnn_demo.py').weights.checkpoint
    cfg.weights.update(checkpoint=str(bundled), head_init='remap')
    start = run_weights.start_of(cfg)
    model = MODELS.build(copy.deepcopy(cfg.model))
    start.apply(model)
    path = tmp_path_factory.mktemp('remapped') / 'remapped.pth'
    torch.save({'meta': {}, 'state_dict': model.state_dict()}, path)
    return path


@pytest.fixture
def here(finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the data and the run ``work_dirs/tiny`` of the finished run, to write into."""
    for name in ('data', 'pretrain', 'tiny.py'):
        (tmp_path / name).symlink_to(finished_run.folder / name)
    run = tmp_path / 'work_dirs/tiny'
    run.mkdir(parents=True)
    for path in (*(finished_run.kept / 'tiny').glob('*.py'), *(finished_run.kept / 'tiny').glob('best_*.pth')):
        shutil.copy(path, run)
    monkeypatch.chdir(tmp_path)
    forget_runs()
    return tmp_path


def result(out: Path) -> dict:
    return json.loads((out / 'evaluation.json').read_text())


def test_files_of_saved_predictions(saved, capsys):
    assert evaluate.run(saved) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f'Results: {saved.out / "evaluation.md"}'
    assert files_in(saved.out) == [
        'confusion.csv',
        'confusion.png',
        'evaluation.json',
        'evaluation.md',
        'per_class.csv',
        'record_mAP.txt',
        'tide.png',
        'worst/01_image_2.jpg',
        'worst/02_image_1.jpg',
    ]
    assert 'mAP(IoU=0.5) for each category' in (saved.out / 'record_mAP.txt').read_text()
    page = (saved.out / 'evaluation.md').read_text()
    for link in ('tide.png', 'confusion.png', 'worst/01_image_2.jpg'):
        assert f'({link})' in page or f'(<{link}>)' in page
    assert result(saved.out)['source'] == {
        'predictions': str(saved.predictions),
        'boxes': str(saved.boxes),
        'annotations': str(saved.ann),
    }


def test_pictures_of_an_earlier_evaluation_go(saved):
    evaluate.run(saved)
    (saved.out / 'worst/notes.txt').write_text('mine')
    saved.worst = 1
    evaluate.run(saved)
    assert files_in(saved.out / 'worst') == ['01_image_2.jpg', 'notes.txt']
    saved.pictures = False
    evaluate.run(saved)
    assert [f for f in files_in(saved.out) if f.endswith(('png', 'jpg'))] == []
    assert '![' not in (saved.out / 'evaluation.md').read_text()


def test_json_is_all_that_is_printed(saved, capsys):
    saved.json = True
    evaluate.run(saved)
    out, err = capsys.readouterr()
    assert json.loads(out) == result(saved.out)
    assert 'Results: ' in err


def test_masks_and_boxes_in_one_file(saved):
    saved.pictures = False
    evaluate.run(saved)
    expected = result(saved.out)['metrics']
    both = [
        {**m, **b}
        for m, b in zip(json.loads(saved.predictions.read_text()), json.loads(saved.boxes.read_text()), strict=True)
    ]
    write(saved.predictions, both)
    saved.boxes = None
    evaluate.run(saved)
    assert result(saved.out)['metrics'] == expected


@pytest.mark.parametrize('alone', ['predictions', 'boxes'])
def test_one_kind_alone(saved, alone):
    saved.pictures = False
    setattr(saved, {'predictions': 'boxes', 'boxes': 'predictions'}[alone], None)
    evaluate.run(saved)
    kind = {'predictions': 'segm', 'boxes': 'bbox'}[alone]
    data = result(saved.out)
    assert set(data['tide']) == set(data['detections']) == {kind}
    assert all(key.split('/')[1].startswith(kind) for key in data['metrics'])


def test_boxes_alone_need_no_masks_in_the_truth(saved):
    data = data_set(THINGS)
    for annotation in data['annotations']:
        del annotation['segmentation']
    write(saved.ann, data)
    with refused('truth-masks', path=saved.ann):
        evaluate.run(saved)
    saved.predictions = None
    assert evaluate.run(saved) == 0


def test_without_images_there_are_no_pictures_of_them(saved, tmp_path, capsys):
    (tmp_path / 'image_2.png').unlink()
    assert evaluate.run(saved) == 0
    assert '--image-root' in capsys.readouterr().out.splitlines()[-1]
    assert 'tide.png' in files_in(saved.out)
    assert not (saved.out / 'worst').exists()


@pytest.mark.parametrize(
    ('options', 'code', 'facts'),
    [
        ({'ann': None}, 'eval-no-truth', {}),
        ({'run': Path('w')}, 'eval-model-and-saved', {'options': 'WORK_DIR'}),
        ({'config': Path('c'), 'checkpoint': Path('p')}, 'eval-model-and-saved', {'options': '--config, --checkpoint'}),
        ({'predictions': None, 'boxes': None}, 'eval-truth-of-model', {}),
        ({'predictions': None, 'boxes': None, 'ann': None}, 'eval-nothing', {}),
        ({'predictions': None, 'boxes': None, 'ann': None, 'config': Path('c')}, 'eval-nothing', {}),
    ],
)
def test_wrong_options(saved, options, code, facts):
    for key, value in options.items():
        setattr(saved, key, value)
    with refused(code, **facts):
        evaluate.run(saved)
    assert not saved.out.exists()


@pytest.mark.parametrize(
    ('option', 'code', 'fact'),
    [
        ('predictions', 'rows-unreadable', 'path'),
        ('ann', 'coco-missing', 'path'),
        ('image_root', 'truth-images', 'root'),
    ],
)
def test_missing_files(saved, option, code, fact):
    setattr(saved, option, Path('nowhere'))
    with refused(code, **{fact: Path('nowhere')}):
        evaluate.run(saved)
    assert not saved.out.exists()


def test_predictions_of_another_split(saved):
    write(saved.predictions, [{**r, 'image_id': r['image_id'] + 100} for r in rows_of(FOUND)])
    with refused('rows-ids', key='image_id', unknown=2, count=2):
        evaluate.run(saved)
    assert not saved.out.exists()


def test_results_that_cannot_be_written(saved, tmp_path):
    saved.out = tmp_path / 'ann.json' / 'out'
    with refused('file-not-writable'):
        evaluate.run(saved)


def test_pictures_that_cannot_be_drawn_cost_no_number(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / 'image_2.png').write_bytes(b'no picture')
    monkeypatch.setattr(error_plots, 'tide_picture', lambda *_: next(iter(())))
    monkeypatch.delenv(extras.STRICT)
    said: list[Message] = []
    monkeypatch.setattr(extras, 'warn', said.append)
    assert evaluate.run(saved) == 0
    assert [message.facts['what'] for message in said] == ['tide.png', 'worst/01_image_2.jpg']
    assert 'StopIteration' in said[0].facts['why']
    assert json.loads((saved.out / 'evaluation.json').read_text())
    page = (saved.out / 'evaluation.md').read_text()
    linked = set(re.findall(r'\]\(<?([^>)]+)', page))
    assert linked == {'confusion.png', 'worst/02_image_1.jpg'}
    assert linked <= set(files_in(saved.out))


def test_several_processes_are_refused(saved, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with refused('eval-processes'):
        evaluate.run(saved)


def test_a_run(here, remapped):
    """The numbers of the final test, by another way; the same again from what was saved."""
    run, out = Path('work_dirs/tiny'), Path('work_dirs/tiny/evaluation')
    before = {f: (run / f).read_bytes() for f in files_in(run)}
    done = drive('evaluate', run, '--checkpoint', remapped, '--worst', '2')
    assert done.code == 0, done.err
    assert done.last_lines(1) == [f'Results: {out}/evaluation.md']
    after = [f for f in files_in(run) if not f.startswith('evaluation/')]
    assert {f: (run / f).read_bytes() for f in after} == before
    assert {'predictions.segm.json', 'predictions.bbox.json', 'tide.png'} <= set(files_in(out))
    data = result(out)
    assert (data['images'], data['source']['split']) == (4, 'test')
    assert data['detections']['segm'] == data['detections']['bbox'] > 20
    forget_runs()
    test = train_tool('tiny.py', '--test', '--weights', remapped, '--work-dir', 'work_dirs/tested')
    assert test.code == 0, test.err
    tested = json.loads(Path('work_dirs/tested/test_results.json').read_text())['metrics']
    numbers = {k: v for k, v in tested.items() if k.startswith('coco/') and '_AP/' not in k}
    assert {k: -1 if v is None else v for k, v in data['metrics'].items() if k.startswith('coco/')} == pytest.approx(
        numbers, abs=1e-9
    )
    assert 0.02 < numbers['coco/segm_mAP'] < 0.98
    for name, values in data['per_class'].items():
        assert values.get('segm_AP') == tested.get(f'coco/segm_AP/{name}')
    again = drive(
        'evaluate',
        '--predictions',
        out / 'predictions.segm.json',
        '--boxes',
        out / 'predictions.bbox.json',
        '--ann',
        ANN.format('val'),
        '--out',
        'again',
        '--worst',
        '2',
    )
    assert again.code == 0, again.err
    repeated = result(Path('again'))
    assert repeated.pop('source') != data.pop('source')
    assert repeated == data
    assert Path('again/tide.png').read_bytes() == (out / 'tide.png').read_bytes()


def test_train_split(here):
    """Every image, those without objects too, as the test sees them."""
    path = Path(ANN.format('train'))
    whole = json.loads(path.read_text())
    first = whole['images'][0]['id']
    try:
        write(path, {**whole, 'annotations': [a for a in whole['annotations'] if a['image_id'] != first]})
        done = drive('evaluate', 'work_dirs/tiny', '--split', 'train', '--no-pictures')
        assert done.code == 0, done.err
    finally:
        write(path, whole)
    out = Path('work_dirs/tiny/evaluation_train')
    assert result(out)['images'] == 8
    rows = json.loads((out / 'predictions.segm.json').read_text())
    assert first in {r['image_id'] for r in rows}


@pytest.mark.slow
def test_config_and_checkpoint_and_another_root(here, tmp_path):
    shutil.copytree('data/demo/VOCdevkit', tmp_path / 'moved/VOCdevkit')
    done = drive(
        'evaluate',
        '--config',
        'tiny.py',
        '--checkpoint',
        next(Path('work_dirs/tiny').glob('best_*.pth')),
        '--data-root',
        tmp_path / 'moved',
        '--split',
        'val',
        '--out',
        tmp_path / 'out',
        '--worst',
        '1',
        '--cfg-options',
        'val_evaluator.metric=bbox',
    )
    assert done.code == 0, done.err
    data = result(tmp_path / 'out')
    assert str(tmp_path / 'moved') in data['annotations']
    assert set(data['detections']) == {'bbox'}
    assert len(files_in(tmp_path / 'out/worst')) == 1


def test_model_that_finds_nothing(here):
    done = drive(
        'evaluate', '--run', 'work_dirs/tiny', '--out', 'out', '--cfg-options', 'model.test_cfg.rcnn.score_thr=0.999'
    )
    assert done.code == 0, done.err
    assert result(Path('out'))['detections'] == {'segm': 0, 'bbox': 0}
    assert result(Path('out'))['metrics']['coco/segm_mAP'] == 0
    assert json.loads(Path('out/predictions.segm.json').read_text()) == []


def test_predictions_of_a_split_whose_ids_occur_in_the_other(here):
    assert drive('evaluate', 'work_dirs/tiny', '--no-pictures').code == 0
    saved = Path('work_dirs/tiny/evaluation/predictions.segm.json')
    done = drive('evaluate', '--predictions', saved, '--ann', ANN.format('train'))
    assert done.code == 2
    assert 'demo_val_' in done.err
    assert 'demo_train_' in done.err


@pytest.mark.parametrize(
    ('arguments', 'parts'),
    [
        (['work_dirs/tiny', '--checkpoint', 'eighty.pth'], ('eighty.pth', '(81,', '(21,')),
        (['work_dirs/nothing'], ('work_dirs/nothing', 'work_dirs/tiny')),
        (['data'], ('data',)),
        (['work_dirs/tiny', '--checkpoint', 'no.pth'], ('no.pth',)),
        (['work_dirs/tiny', '--config', 'no.py'], ('no.py',)),
        (['work_dirs/tiny', '--data-root', 'pretrain'], ('pretrain',)),
        (['--config', 'tiny.py', '--checkpoint', 'no.pth'], ('no.pth',)),
        (['work_dirs/tiny', '--cfg-options', 'modell.x=1'], ('modell',)),
    ],
)
def test_runs_that_cannot_be_evaluated(here, finished_run, arguments, parts):
    Path('eighty.pth').symlink_to(finished_run.weights)
    before = files_in(here)
    done = drive('evaluate', *arguments)
    assert done.code == 2, done.out
    assert done.error
    assert 'Traceback' not in done.err
    for part in parts:
        assert part in done.err
    assert files_in(here) == before


def test_choice_of_a_split(loaded: Callable):
    whole = loaded('mask_rcnn_voc_pretrained.py')
    cfg = copy.deepcopy(whole)
    paths.select_split(cfg, 'train')
    dataset, train, test = (c.dataset for c in (cfg.test_dataloader, whole.train_dataloader, whole.test_dataloader))
    assert dataset.ann_file == train.ann_file != test.ann_file
    assert dataset.pipeline == test.pipeline != train.pipeline
    assert 'filter_cfg' not in dataset
    assert dataset.test_mode is True
    assert cfg.test_dataloader.sampler.shuffle is False
    assert cfg.train_dataloader == whole.train_dataloader
    cfg = copy.deepcopy(whole)
    paths.select_split(cfg, 'val')
    assert cfg.test_dataloader == whole.val_dataloader


def test_train_split_in_wrappers(loaded: Callable):
    cfg = copy.deepcopy(loaded('mask_rcnn_voc_pretrained.py'))
    ann_file = cfg.train_dataloader.dataset.ann_file
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=cfg.train_dataloader.dataset)
    paths.select_split(cfg, 'train')
    assert cfg.test_dataloader.dataset.ann_file == ann_file
    assert cfg.test_dataloader.dataset.type == 'CocoDataset'


@pytest.mark.parametrize('dataset', [None, dict(type='ConcatDataset', datasets=[])])
def test_split_that_is_not_there(loaded: Callable, dataset):
    cfg = copy.deepcopy(loaded('mask_rcnn_voc_pretrained.py'))
    cfg.val_dataloader = None if dataset is None else dict(cfg.val_dataloader, dataset=dataset)
    with refused('config-no-split', split='val', others='test, train'):
        paths.select_split(cfg, 'val')
