from __future__ import annotations

import copy
from pathlib import Path

import pytest

from mmfinetune.config import flatten, load
from mmfinetune.config import keys as config_keys
from mmfinetune.utils.errors import UserError

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


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load.load(path, overrides)
    return caught.value.problems


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


@pytest.mark.parametrize('name', WHOLE)
def test_every_config_says_how_to_run_it(name):
    run = next(line for line in (CONFIGS / name).read_text().splitlines() if '# Run:' in line)
    assert f'tools/train_pretrained.py configs/{name}' in run or '# Run:     make ' in run


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
    ('place', 'expected'),
    [
        ('optim_wraper', 'optim_wraper: did you mean optim_wrapper?'),
        ('train_dataloder', 'train_dataloder: did you mean train_dataloader?'),
        ('param_schedulers', 'param_schedulers: did you mean param_scheduler?'),
        ('weigths', 'weigths: did you mean weights?'),
        ('work_dirs', 'work_dirs: did you mean work_dir?'),
        ('model.backbone.frozen_stage', 'model.backbone.frozen_stage: did you mean frozen_stages?'),
        ('model.roi_head.bbox_head.num_clases', 'model.roi_head.bbox_head.num_clases: did you mean num_classes?'),
        ('model.roi_head.mask_head.num_class', 'model.roi_head.mask_head.num_class: did you mean num_classes?'),
        ('train_cfg.max_epoch', 'train_cfg.max_epoch: did you mean max_epochs?'),
        ('train_cfg.quux', 'train_cfg.quux: train_cfg has no quux'),
        ('train_dataloader.batchsize', 'train_dataloader.batchsize: did you mean batch_size?'),
        ('train_dataloader.dataset.anno_file', 'train_dataloader.dataset.anno_file: did you mean ann_file?'),
        ('train_dataloader.dataset.pipeline.4.probs', 'train_dataloader.dataset.pipeline.4.probs: did you mean prob?'),
        ('optim_wrapper.optimizer.weigth_decay', 'optim_wrapper.optimizer.weigth_decay: did you mean weight_decay?'),
        ('optim_wrapper.accumulative_count', 'optim_wrapper.accumulative_count: did you mean accumulative_counts?'),
        (
            'default_hooks.checkpoint.max_keep_ckpt',
            'default_hooks.checkpoint.max_keep_ckpt: did you mean max_keep_ckpts?',
        ),
        ('val_evaluator.clas_wise', 'val_evaluator.clas_wise: did you mean classwise?'),
        # Dicts without a type, read by the Runner or the toolkit itself.
        ('weights.checkpont', 'weights.checkpont: did you mean checkpoint?'),
        ('weights.re_init', 'weights.re_init: did you mean reinit?'),
        ('auto_scale_lr.base_batchsize', 'auto_scale_lr.base_batchsize: did you mean base_batch_size?'),
        ('randomness.sede', 'randomness.sede: did you mean seed?'),
    ],
)
def test_misspelt_setting_in_a_config(fresh, place, expected):
    fresh.merge_from_dict({place: 1})
    assert config_keys.check_keys(fresh) == [expected]


@pytest.mark.parametrize(
    ('override', 'expected'),
    [
        ('optim_wraper.optimizer.lr=1', 'optim_wraper: did you mean optim_wrapper?'),
        ('optim_wrapper.optimiser.lr=1', 'optim_wrapper.optimiser: did you mean optimizer?'),
        ('optim_wrapper.optimizer.momentun=0.5', 'optim_wrapper.optimizer.momentun: did you mean momentum?'),
        ('train_cfg.max_epoch=3', 'train_cfg.max_epoch: did you mean max_epochs?'),
        ('train_dataloader.batchsize=4', 'train_dataloader.batchsize: did you mean batch_size?'),
        ('model.backbone.depht=18', 'model.backbone.depht: did you mean depth?'),
        ('model.roi_head.mask_head.num_clases=3', 'model.roi_head.mask_head.num_clases: did you mean num_classes?'),
        ('param_scheduler.1.milestone=[3]', 'param_scheduler.1.milestone: did you mean milestones?'),
        ('default_hooks.chekpoint.interval=5', 'default_hooks.chekpoint: did you mean checkpoint?'),
        ('auto_scale_lr.base_batchsize=4', 'auto_scale_lr.base_batchsize: did you mean base_batch_size?'),
        ('randomness.sede=1', 'randomness.sede: did you mean seed?'),
        ('weights.checkpont=x.pth', 'weights.checkpont: did you mean checkpoint?'),
        ('param_scheduler.2.gamma=1', 'param_scheduler.2.gamma: param_scheduler is a list of 2'),
        ('param_scheduler.gamma=1', 'param_scheduler.gamma: param_scheduler is a list of 2'),
        ('work_dir.x=1', "work_dir.x: work_dir is 'work_dirs/mask_rcnn_pretrained' and has no parts"),
    ],
)
def test_misspelt_override(fresh, override, expected):
    found = load.merge(fresh, load.parse_overrides([override]))
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_all_misspelt_settings_are_told_at_once(tmp_path):
    path = write(tmp_path, 'weigths = None\ntrain_cfg = dict(max_epoch=3)')
    found = problems_of(path, 'optim_wrapper.optimiser.lr=1', 'train_dataloader.batchsize=4')
    assert len(found) == 4
    for part in ('weigths', 'max_epoch:', 'optimiser', 'batchsize'):
        assert any(part in line for line in found), part


def test_good_overrides_go_through_load():
    cfg = load.load(MAIN, ['train_cfg.max_epochs=3', 'optim_wrapper.optimizer.nesterov=True'])
    assert (cfg.train_cfg.max_epochs, cfg.optim_wrapper.optimizer.nesterov) == (3, True)


def test_message_names_file_and_cure(tmp_path):
    path = write(tmp_path, 'weigths = None')
    with pytest.raises(UserError) as caught:
        load.load(path)
    assert str(path) in str(caught.value)
    assert 'flatten_config.py' in caught.value.cure


@pytest.mark.parametrize(
    ('override', 'place', 'expected'),
    [
        ('optim_wrapper.optimizer.nesterov=True', 'optim_wrapper.optimizer.nesterov', True),
        ('optim_wrapper.optimizer.lr=0.01', 'optim_wrapper.optimizer.lr', 0.01),
        ('optim_wrapper.clip_grad.max_norm=35', 'optim_wrapper.clip_grad.max_norm', 35),
        ('optim_wrapper.accumulative_counts=4', 'optim_wrapper.accumulative_counts', 4),
        (
            'optim_wrapper.paramwise_cfg.custom_keys.mine.lr_mult=2',
            'optim_wrapper.paramwise_cfg.custom_keys.mine.lr_mult',
            2,
        ),
        ('train_cfg.val_begin=3', 'train_cfg.val_begin', 3),
        ('train_dataloader.pin_memory=True', 'train_dataloader.pin_memory', True),
        ('train_dataloader.dataset.indices=8', 'train_dataloader.dataset.indices', 8),
        ('train_dataloader.dataset.pipeline.4.prob=0.25', 'train_dataloader.dataset.pipeline.4.prob', 0.25),
        ('param_scheduler.1.milestones=[8,11]', 'param_scheduler.1.milestones', [8, 11]),
        ('model.backbone.frozen_stages=2', 'model.backbone.frozen_stages', 2),
        ('model.backbone.with_cp=True', 'model.backbone.with_cp', True),
        ('model.data_preprocessor.batch_augments=None', 'model.data_preprocessor.batch_augments', None),
        ('model.test_cfg.rcnn.max_per_img=50', 'model.test_cfg.rcnn.max_per_img', 50),
        ('default_hooks.logger.log_metric_by_epoch=False', 'default_hooks.logger.log_metric_by_epoch', False),
        (
            'default_hooks.early_stopping.type=EarlyStoppingHook',
            'default_hooks.early_stopping.type',
            'EarlyStoppingHook',
        ),
        ('randomness.deterministic=True', 'randomness.deterministic', True),
        ('randomness.diff_rank_seed=True', 'randomness.diff_rank_seed', True),
        ('env_cfg.dist_cfg.timeout=600', 'env_cfg.dist_cfg.timeout', 600),
        ('model_wrapper_cfg.find_unused_parameters=True', 'model_wrapper_cfg.find_unused_parameters', True),
        ('compile=True', 'compile', True),
        ('work_dir=elsewhere', 'work_dir', 'elsewhere'),
        ('weights.into=backbone', 'weights.into', 'backbone'),
        ('weights=None', 'weights', None),
    ],
)
def test_settings_that_are_read_are_accepted(fresh, override, place, expected):
    assert load.merge(fresh, load.parse_overrides([override])) == []
    assert at(fresh, place) == expected
    assert config_keys.check_keys(fresh) == []


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
    with pytest.raises(UserError, match='There is no config') as caught:
        load.load(CONFIGS / name)
    assert near in caught.value.cure


def test_missing_file_with_no_near_name(tmp_path):
    with pytest.raises(UserError) as caught:
        load.load(tmp_path / 'zzzzzzzz.py')
    assert 'configs/' in caught.value.cure


def test_folder_is_no_config(tmp_path):
    with pytest.raises(UserError, match='There is no config'):
        load.load(tmp_path)


def test_other_suffix(tmp_path):
    path = tmp_path / 'a.yaml'
    path.write_text('x: 1')
    with pytest.raises(UserError, match=r'does not end in \.py'):
        load.load(path)


@pytest.mark.parametrize(
    ('text', 'line'),
    [('model = dict(\nbackbone=dict(depth=50)\nneck=1)\n', 2), ('a = 1\nb = (2\n', 2), ('a = 1\n\n  b = 2\n', 3)],
)
def test_syntax_error_names_the_line(tmp_path, text, line):
    path = write(tmp_path, text, base=None)
    with pytest.raises(UserError) as caught:
        load.load(path)
    assert f'{path}, line {line}:' in caught.value.message


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('x = 1 / 0', 'ZeroDivisionError'),
        ("_base_ = './not_there.py'", 'not_there.py'),
        ('model = dict(backbone=dict(depth=undefined))', 'undefined'),
    ],
)
def test_broken_config_tells_why(tmp_path, text, expected):
    path = write(tmp_path, text, base=None)
    with pytest.raises(UserError) as caught:
        load.load(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / 'a.py'
    path.write_bytes(b'x = "\xff\xfe"\n')
    with pytest.raises(UserError, match=r'a\.py'):
        load.load(path)


def test_config_without_what_a_run_needs(tmp_path):
    path = write(tmp_path, 'work_dir = "x"', base=None)
    assert problems_of(path) == ['model', 'train_dataloader', 'optim_wrapper', 'train_cfg']


# Overrides


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('4', 4),
        ('-1', -1),
        ('0.5', 0.5),
        ('1e-3', 0.001),
        ('true', True),
        ('False', False),
        ('None', None),
        ('name', 'name'),
        ('[1,2]', [1, 2]),
        ('(1333,800)', (1333, 800)),
        ('[a,b]', ['a', 'b']),
        ('1,2', [1, 2]),
        ('[(1,2),[3]]', [(1, 2), [3]]),
        ('data/a=b.json', 'data/a=b.json'),
        ('', ''),
    ],
)
def test_override_values(text, expected):
    found = load.parse_overrides([f'a.b={text}'])
    assert found == {'a.b': expected}
    assert type(found['a.b']) is type(expected)


def test_several_overrides():
    assert load.parse_overrides(['a=1', 'b.c=x']) == {'a': 1, 'b.c': 'x'}


@pytest.mark.parametrize('pairs', [['a'], ['=1'], ['a=1', 'b'], ['a=[1,2'], ['a=(1,2']])
def test_malformed_overrides(pairs):
    with pytest.raises(UserError, match='--cfg-options'):
        load.parse_overrides(pairs)


def test_nothing_is_merged_when_one_key_is_unknown(fresh):
    before = flatten.settings(fresh)
    assert load.merge(fresh, {'train_cfg.max_epochs': 3, 'train_cfg.max_epoch': 3})
    assert flatten.settings(fresh) == before


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
    with pytest.raises(UserError, match='config-exists'):
        flatten.write(path, 'x = 1')
    assert path.read_text() == 'mine = 1'
