from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest

from mmfinetune.config import flatten, load
from mmfinetune.config import keys as config_keys
from mmfinetune.utils.text import table as text_table
from tests.builders.errors import refused

CONFIGS = Path(__file__).parents[2] / 'configs'
MAIN = CONFIGS / 'mask_rcnn_voc_pretrained.py'
FLAT = CONFIGS / 'mask_rcnn_voc_pretrained_simple.py'
# Files under _base_ are fragments: they lack what a run needs.
WHOLE = sorted(
    p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob('*.py') if '_base_' not in p.relative_to(CONFIGS).parts
)
HEADS = {
    'roi_head.bbox_head.fc_cls': {'std': 0.01},
    'roi_head.bbox_head.fc_reg': {'std': 0.001},
    'roi_head.mask_head.conv_logits': {'std': 0.001},
}


def at(cfg, dotted: str):
    """The setting at a dotted place; numbers are positions in lists."""
    for part in dotted.split('.'):
        cfg = cfg[int(part) if part.isdigit() else part]
    return cfg


def write(tmp_path: Path, text: str, base: Path | None = MAIN) -> Path:
    path = tmp_path / 'mine.py'
    path.write_text((f'_base_ = {str(base)!r}\n' if base else '') + text)
    return path


# The files of the repository


def test_there_are_configs():
    assert len(WHOLE) >= 5


@pytest.mark.parametrize('name', WHOLE)
def test_every_config_loads(loaded, name):
    cfg = loaded(name)
    assert all(key in cfg for key in load.NEEDED)
    classes = at(cfg, 'model.roi_head.bbox_head.num_classes')
    assert at(cfg, 'model.roi_head.mask_head.num_classes') == classes
    metainfo = cfg.train_dataloader.dataset.get('metainfo')
    assert metainfo is None or len(metainfo['classes']) == classes


def header(path: Path) -> dict[str, str]:
    """What the comment at a config's top says: ``what``, the first ``Run``, and ``Expect``."""
    found, part = {'what': ''}, 'what'
    for line in path.read_text().splitlines():
        if not line.startswith('#'):
            break
        label = re.match(r'# (Run|Expect): +', line)
        if label:
            part = label[1]
        if part == 'Run' and not label:
            continue
        found[part] = f'{found.get(part, "")} {line[label.end() if label else 1 :].strip()}'.strip()
    return found


@pytest.mark.parametrize('name', WHOLE)
def test_every_config_says_how_to_run_it(name):
    said = header(CONFIGS / name)
    assert said['what'] and said['Expect' if 'pretrain.py' not in name else 'Run']
    assert f'tools/train_pretrained.py configs/{name}' in said['Run'] or said['Run'].startswith('make ')


def test_readme_lists_all_configs():
    """The table follows from the headers; a difference shows the text that belongs there."""
    rows = [('config', 'what it is', 'run')]
    rows += [(f'`{name}`', header(CONFIGS / name)['what'], f'`{header(CONFIGS / name)["Run"]}`') for name in WHOLE]
    parts = sorted(CONFIGS.glob('_base_/**/*.py'), key=lambda path: (len(path.parts), str(path)))
    bases = [('part', 'what it is')]
    bases += [(f'`{path.relative_to(CONFIGS)}`', header(path)['what']) for path in parts]
    text = (CONFIGS / 'README.md').read_text()
    for table in (rows, bases):
        assert text_table(table, left=9, markdown=True) in text


def test_inherited_config_is_short():
    assert len(MAIN.read_text().splitlines()) < 30


def test_flat_config_is_flat():
    assert '_base_ =' not in FLAT.read_text()


def test_flat_and_inherited_configs_are_one_run(loaded):
    first, second = (flatten.settings(loaded(p.name)) for p in (MAIN, FLAT))
    assert flatten.differences(first, second) == []
    assert first == second


@pytest.mark.parametrize(
    ('place', 'expected'),
    [
        ('model.roi_head.bbox_head.num_classes', 20),
        ('model.roi_head.mask_head.num_classes', 20),
        ('model.backbone.init_cfg', None),
        ('optim_wrapper.optimizer', {'type': 'SGD', 'lr': 0.002, 'momentum': 0.9, 'weight_decay': 1e-4}),
        ('optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult', 0.1),
        ('optim_wrapper.paramwise_cfg.custom_keys.neck.lr_mult', 0.5),
        ('optim_wrapper.paramwise_cfg.custom_keys.rpn_head.lr_mult', 1.0),
        ('optim_wrapper.paramwise_cfg.custom_keys.roi_head.lr_mult', 1.0),
        ('optim_wrapper.constructor', 'LayeredOptimWrapperConstructor'),
        ('param_scheduler.0.type', 'LinearLR'),
        ('param_scheduler.0.end', 500),
        ('param_scheduler.0.by_epoch', False),
        ('param_scheduler.1.type', 'MultiStepLR'),
        ('param_scheduler.1.milestones', [25, 35]),
        ('param_scheduler.1.gamma', 0.1),
        ('param_scheduler.1.by_epoch', True),
        ('train_cfg.max_epochs', 40),
        ('train_cfg.val_interval', 1),
        ('default_hooks.checkpoint.save_best', 'coco/segm_mAP'),
        ('default_hooks.checkpoint.rule', 'greater'),
        ('train_dataloader.batch_size', 2),
        ('auto_scale_lr', {'enable': True, 'base_batch_size': 2}),
        ('weights.checkpoint', 'pretrain/mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth'),
        ('weights.reinit', HEADS),
        ('val_evaluator.type', 'InstanceCocoMetric'),
        ('val_evaluator.metric', ['bbox', 'segm']),
        ('custom_imports.imports', ['mmfinetune.register']),
    ],
)
def test_main_config_says(voc_cfg, place, expected):
    assert at(voc_cfg, place) == expected


def test_main_config_augments_as_stated(voc_cfg):
    pipeline = {step['type']: step for step in voc_cfg.train_dataloader.dataset.pipeline}
    assert list(pipeline) == [
        'LoadImage',
        'LoadAnnotations',
        'PhotoMetricDistortion',
        'Resize',
        'RandomFlip',
        'PackDetInputs',
    ]
    assert pipeline['LoadAnnotations']['with_mask'] is True
    assert pipeline['RandomFlip']['prob'] == 0.5
    assert (pipeline['Resize']['scale'], pipeline['Resize']['keep_ratio']) == ((1333, 800), True)
    tested = [step['type'] for step in voc_cfg.val_dataloader.dataset.pipeline]
    # Annotations after Resize: the ground truth stays in the image's own coordinates.
    assert tested.index('LoadAnnotations') > tested.index('Resize')
    assert not {'PhotoMetricDistortion', 'RandomFlip'} & set(tested)


def test_scratch_config(loaded):
    cfg = loaded('mask_rcnn_voc_scratch.py')
    assert cfg.optim_wrapper.optimizer.lr == 0.02
    assert cfg.weights.into == 'backbone'
    assert 'reinit' not in cfg.weights
    assert 'resnet50' in cfg.weights.checkpoint
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert {name: mult['lr_mult'] for name, mult in keys.items()} == {
        'backbone': 1.0,
        'neck': 1.0,
        'rpn_head': 1.0,
        'roi_head': 1.0,
    }


def test_scratch_config_differs_in_start_and_lr_only(loaded):
    lines = flatten.differences(
        flatten.settings(loaded(MAIN.name)), flatten.settings(loaded('mask_rcnn_voc_scratch.py'))
    )
    places = {line.split('.')[0].split(':')[0] for line in lines}
    assert places <= {'weights', 'optim_wrapper', 'work_dir', 'visualizer'}
    assert {'weights', 'optim_wrapper', 'work_dir'} <= places


def test_demo_scratch_differs_from_demo_in_start_and_lr_only(loaded):
    lines = flatten.differences(
        flatten.settings(loaded('mask_rcnn_demo.py')), flatten.settings(loaded('mask_rcnn_demo_scratch.py'))
    )
    places = {line.split('.')[0].split(':')[0] for line in lines}
    assert places <= {'weights', 'optim_wrapper', 'work_dir', 'visualizer'}
    assert 'weights' in places


# Misspelt settings


@pytest.fixture
def fresh(voc_cfg):
    """The main config, to be changed; loading it anew takes longer than copying."""
    return copy.deepcopy(voc_cfg)


@pytest.mark.parametrize(
    ('place', 'near'),
    [
        ('optim_wraper', 'optim_wrapper'),
        ('train_dataloder', 'train_dataloader'),
        ('param_schedulers', 'param_scheduler'),
        ('weigths', 'weights'),
        ('work_dirs', 'work_dir'),
        ('model.backbone.frozen_stage', 'frozen_stages'),
        ('model.roi_head.bbox_head.num_clases', 'num_classes'),
        ('model.roi_head.mask_head.num_class', 'num_classes'),
        ('train_cfg.max_epoch', 'max_epochs'),
        ('train_cfg.quux', None),
        ('train_dataloader.batchsize', 'batch_size'),
        ('train_dataloader.dataset.anno_file', 'ann_file'),
        ('train_dataloader.dataset.pipeline.4.probs', 'prob'),
        ('optim_wrapper.optimizer.weigth_decay', 'weight_decay'),
        ('optim_wrapper.accumulative_count', 'accumulative_counts'),
        ('default_hooks.checkpoint.max_keep_ckpt', 'max_keep_ckpts'),
        ('val_evaluator.clas_wise', 'classwise'),
        # Dicts without a type, read by the Runner or the toolkit itself.
        ('weights.checkpont', 'checkpoint'),
        ('weights.re_init', 'reinit'),
        ('auto_scale_lr.base_batchsize', 'base_batch_size'),
        ('randomness.sede', 'seed'),
    ],
)
def test_misspelt_setting_in_a_config(fresh, place, near):
    fresh.merge_from_dict({place: 1})
    [problem] = config_keys.check_keys(fresh)
    assert problem.code == ('config-key-near' if near else 'config-key-unknown')
    assert (problem.facts['key'], problem.facts.get('near')) == (place, near)


def test_settings_of_files_and_overrides_are_told_at_once(tmp_path):
    path = write(tmp_path, 'weigths = None\ntrain_cfg = dict(max_epoch=3)')
    with refused('config-wrong-settings', path=str(path)) as caught:
        load.load(path, ['optim_wrapper.optimiser.lr=1', 'train_dataloader.batchsize=4'])
    keys = {problem.facts['key'] for problem in caught.value.problems}
    assert keys == {'weigths', 'train_cfg.max_epoch', 'optim_wrapper.optimiser', 'train_dataloader.batchsize'}


def test_good_overrides_go_through_load():
    cfg = load.load(MAIN, ['train_cfg.max_epochs=3', 'optim_wrapper.optimizer.nesterov=True'])
    assert (cfg.train_cfg.max_epochs, cfg.optim_wrapper.optimizer.nesterov) == (3, True)


@pytest.mark.parametrize(
    ('text', 'code', 'key'),
    [
        ('model = 3', 'config-not-a-dict', 'model'),
        ('train_cfg = None', 'config-not-a-dict', 'train_cfg'),
        ('visualizer = "tensorboard"', 'config-not-a-dict', 'visualizer'),
        ("optim_wrapper = dict(optimizer=dict(lr='abc'))", 'config-not-a-number', 'optim_wrapper.optimizer.lr'),
        ('train_cfg = dict(max_epochs=0)', 'config-not-whole', 'train_cfg.max_epochs'),
        ('train_dataloader = dict(batch_size=True)', 'config-not-whole', 'train_dataloader.batch_size'),
    ],
)
def test_values_that_would_crash_a_run(tmp_path, text, code, key):
    with refused('config-wrong-settings') as caught:
        load.load(write(tmp_path, text))
    [problem] = caught.value.problems
    assert (problem.code, problem.facts['key']) == (code, key)


@pytest.mark.parametrize('name', ['weights', 'visualizer'])
def test_what_may_be_none(tmp_path, name):
    assert load.load(write(tmp_path, f'{name} = None'))[name] is None


def test_helper_variables_are_free(tmp_path):
    cfg = load.load(write(tmp_path, 'my_size = 3\nimage_scale = (4, 5)\nlr = 1'))
    assert cfg.my_size == 3
    assert 'my_size' not in flatten.settings(cfg)


@pytest.mark.parametrize(
    'name',
    [
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        'mask_rcnn/mask-rcnn_r50-caffe_fpn_ms-poly-3x_coco.py',
        'mask_rcnn/mask-rcnn_r50_fpn_amp-1x_coco.py',
        'mask_rcnn/mask-rcnn_x101-32x8d_fpn_1x_coco.py',
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        'faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py',
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
        'cascade_rcnn/cascade-rcnn_r50_fpn_20e_coco.py',
        'ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py',
        'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py',
        'retinanet/retinanet_r50_fpn_1x_coco.py',
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        'htc/htc_r50_fpn_1x_coco.py',
        'dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
        'gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py',
        'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        'convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
        'simple_copy_paste/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_32xb2-ssj-scp-90k_coco.py',
        'pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py',
        'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    ],
)
def test_no_false_alarm_on_mmdets_own_configs(voc_cfg, name):
    import mmdet
    from mmengine.config import Config

    path = Path(mmdet.__file__).parent / '.mim' / 'configs' / name
    cfg = Config.fromfile(path, import_custom_modules=False)
    assert config_keys.check_keys(cfg) == []


# Files that cannot be read


@pytest.mark.parametrize(
    ('name', 'near'),
    [('mask_rcnn_voc_pretraind.py', 'mask_rcnn_voc_pretrained.py'), ('mask_rcnn_dem.py', 'mask_rcnn_demo.py')],
)
def test_missing_file_suggests_a_near_name(name, near):
    with refused('config-missing', path=str(CONFIGS / name)) as caught:
        load.load(CONFIGS / name)
    assert near in caught.value.facts['near']


def test_missing_file_with_no_near_name(tmp_path):
    with refused('config-missing', near=''):
        load.load(tmp_path / 'zzzzzzzz.py')


def test_folder_is_not_a_config(tmp_path):
    with refused('config-missing'):
        load.load(tmp_path)


def test_other_suffix(tmp_path):
    path = tmp_path / 'a.yaml'
    path.write_text('x: 1')
    with refused('config-not-python'):
        load.load(path)


@pytest.mark.parametrize(
    ('text', 'line'),
    [('model = dict(\nbackbone=dict(depth=50)\nneck=1)\n', 2), ('a = 1\nb = (2\n', 2), ('a = 1\n\n  b = 2\n', 3)],
)
def test_syntax_error_names_the_line(tmp_path, text, line):
    path = write(tmp_path, text, base=None)
    with refused('config-syntax', path=str(path), line=line):
        load.load(path)


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        ('x = 1 / 0', 'division'),
        ("_base_ = './not_there.py'", 'not_there.py'),
        ('model = dict(backbone=dict(depth=undefined))', 'undefined'),
    ],
)
def test_broken_config_tells_why(tmp_path, text, why):
    path = write(tmp_path, text, base=None)
    with refused('config-unreadable', path=str(path)) as caught:
        load.load(path)
    assert why in caught.value.facts['why']


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / 'a.py'
    path.write_bytes(b'x = "\xff\xfe"\n')
    with refused('config-syntax', path=str(path)):
        load.load(path)


def test_config_without_what_a_run_needs(tmp_path):
    path = write(tmp_path, 'work_dir = "x"', base=None)
    with refused('config-incomplete') as caught:
        load.load(path)
    assert caught.value.problems == ['model', 'train_dataloader', 'optim_wrapper', 'train_cfg']


def test_config_that_does_not_import_the_toolkit(tmp_path, monkeypatch):
    path = write(tmp_path, 'custom_imports = None')
    monkeypatch.delitem(sys.modules, load.REGISTER, raising=False)
    with refused('config-no-register', module=load.REGISTER):
        load.load(path)


# Comparing and flattening


def test_plain_drops_what_does_not_change_the_run():
    value = {'a': (1, [2, (3,)]), '_scope_': 'mmdet', 'b': {'_delete_': True, 'c': None}}
    assert flatten.plain(value) == {'a': [1, [2, [3]]], 'b': {'c': None}}


@pytest.mark.parametrize(
    ('ours', 'theirs', 'expected'),
    [
        ({'a': 1}, {'a': 1}, []),
        ({'a': 1}, {'a': 2}, ['a: 1 against 2']),
        ({'a': {'b': [1, {'c': 2}]}}, {'a': {'b': [1, {'c': 3}]}}, ['a.b.1.c: 2 against 3']),
        ({'a': [1]}, {'a': [1, 2]}, ['a: [1] against [1, 2]']),
        ({'a': 1}, {}, ['a: 1 only in the first']),
        ({}, {'a': None}, ['a: None only in the second']),
    ],
)
def test_differences(ours, theirs, expected):
    assert flatten.differences(ours, theirs) == expected


def test_compare_finds_one_changed_number(tmp_path):
    changed = write(tmp_path, 'train_cfg = dict(max_epochs=41)')
    assert flatten.compare(MAIN, changed) == ['train_cfg.max_epochs: 40 against 41']


@pytest.mark.parametrize('name', WHOLE)
def test_flattened_text_is_the_same_run(tmp_path, loaded, name):
    text = flatten.flatten(CONFIGS / name)
    assert '_base_ =' not in text
    path = tmp_path / 'flat.py'
    flatten.write(path, text)
    flat = load.load(path)
    assert flatten.differences(flatten.settings(loaded(name)), flatten.settings(flat)) == []


def test_flattened_text_keeps_tuples(tmp_path):
    path = tmp_path / 'flat.py'
    path.write_text(flatten.flatten(MAIN))
    pipeline = load.load(path).train_dataloader.dataset.pipeline
    # mmcv's Resize refuses a list.
    assert next(s for s in pipeline if s['type'] == 'Resize')['scale'] == (1333, 800)


def test_an_existing_config_is_not_overwritten(tmp_path):
    path = tmp_path / 'flat.py'
    path.write_text('mine = 1')
    with refused('config-exists', path=str(path)):
        flatten.write(path, 'x = 1')
    assert path.read_text() == 'mine = 1'
    flatten.write(path, 'x = 1', overwrite=True)
    assert path.read_text() == 'x = 1'
