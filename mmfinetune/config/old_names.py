"""Names that configs of earlier releases hold, and of MMDetection 2.x: these tables alone know what they are now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mmfinetune.utils.errors import Message

if TYPE_CHECKING:
    from mmengine.config import Config

TYPES = {'BadNumbersHook': 'NonFiniteHook', 'BoardBackend': 'TensorBoardBackend'}
# The longest that fits counts.
KEYS = {
    'default_hooks.bad_numbers': 'default_hooks.nonfinite',
    'default_hooks.bad_numbers.factor': 'default_hooks.divergence.factor',
    'default_hooks.bad_numbers.window': 'default_hooks.divergence.window',
}
# Entries of `custom_hooks` that are entries of `default_hooks` now: its name, and the settings they stand for.
# None: their work is done without a hook.
HOOKS: dict[str, tuple[str, dict[str, Any]] | None] = {
    'WeightTransferHook': None,
    'GroupLrHook': ('tensorboard', {'lr': True}),
    'GradNormHook': ('tensorboard', {'grad_norm': True}),
    'BoardHook': ('tensorboard', {}),
    'BoardPicturesHook': ('tensorboard', {'pictures': 4}),
    'ResultsHook': ('results', {}),
    'SaveValidatedHook': None,
    'StopHook': None,
}
# What they are without any of these.
_PLAIN: dict[str, dict[str, Any]] = {
    'tensorboard': {'type': 'TensorBoardHook', 'lr': False, 'grad_norm': False, 'pictures': 0},
    'results': {'type': 'ResultsHook'},
}
# MMEngine adds these by itself unless they are None, and refuses None for others.
_MMENGINE = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
# What MMDetection 2.x read at the top of a config, and where that is now.
_TOP_2X = {
    'data': 'train_dataloader, val_dataloader and test_dataloader, each with batch_size, num_workers and dataset',
    'optimizer': "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(...))",
    'optimizer_config': 'optim_wrapper = dict(clip_grad=dict(...))',
    'fp16': "optim_wrapper = dict(type='AmpOptimWrapper'), or --amp fp16",
    'lr_config': "param_scheduler = [dict(type='LinearLR', ...), dict(type='MultiStepLR', ...)]",
    'momentum_config': 'param_scheduler',
    'runner': 'train_cfg = dict(max_epochs=...)',
    'total_epochs': 'train_cfg = dict(max_epochs=...)',
    'workflow': 'val_cfg',
    'evaluation': 'val_evaluator = dict(metric=...), train_cfg = dict(val_interval=...), '
    'default_hooks = dict(checkpoint=dict(save_best=...))',
    'checkpoint_config': 'default_hooks = dict(checkpoint=dict(interval=...))',
    'log_config': 'default_hooks = dict(logger=dict(interval=...)), visualizer = dict(vis_backends=[...])',
    'dist_params': 'env_cfg = dict(dist_cfg=dict(backend=...))',
    'cudnn_benchmark': 'env_cfg = dict(cudnn_benchmark=...)',
    'mp_start_method': 'env_cfg = dict(mp_cfg=dict(mp_start_method=...))',
    'opencv_num_threads': 'env_cfg = dict(mp_cfg=dict(opencv_num_threads=...))',
    'seed': 'randomness = dict(seed=...)',
    'deterministic': 'randomness = dict(deterministic=...)',
    'resume_from': '--resume CHECKPOINT',
    'auto_resume': '--resume',
    'gpu_ids': '--gpus N',
    'find_unused_parameters': "model_wrapper_cfg = dict(type='MMDistributedDataParallel', find_unused_parameters=True)",
}
# Its names of arguments, some with what holds them.
_ARGUMENTS_2X = {
    'samples_per_gpu': 'batch_size',
    'workers_per_gpu': 'num_workers',
    'img_prefix': 'data_prefix=dict(img=...)',
    'seg_prefix': 'data_prefix=dict(seg=...)',
    'proposal_file': 'proposal_file of a ProposalBroadcaster step',
    'classes': 'metainfo=dict(classes=...)',
    'CLASSES': 'classes',
    'PALETTE': 'palette',
    'filter_empty_gt': 'filter_cfg=dict(filter_empty_gt=...)',
    'img_scale': 'scale',
    'multiscale_mode': "type='RandomChoiceResize', scales=[...], or type='RandomResize'",
    'ratio_range': "type='RandomResize', scale=..., ratio_range=...",
    'flip_ratio': 'prob',
    'file_client_args': 'backend_args',
    'grad_clip': 'optim_wrapper.clip_grad',
    'paramwise_cfg': 'optim_wrapper.paramwise_cfg',
    'pretrained': "the top-level setting weights, or init_cfg=dict(type='Pretrained', checkpoint=...) of the backbone",
    'policy': "type, e.g. 'MultiStepLR'",
    'warmup_iters': "a scheduler dict(type='LinearLR', by_epoch=False, end=...)",
    'val_evaluator.save_best': 'default_hooks.checkpoint.save_best',
    'val_evaluator.interval': 'train_cfg.val_interval',
    'anchor_scales': 'anchor_generator=dict(scales=...)',
    'anchor_ratios': 'anchor_generator=dict(ratios=...)',
    'anchor_strides': 'anchor_generator=dict(strides=...)',
    'target_means': 'bbox_coder=dict(target_means=...)',
    'target_stds': 'bbox_coder=dict(target_stds=...)',
    'out_size': 'output_size',
    'sample_num': 'sampling_ratio',
    'model.bbox_roi_extractor': 'roi_head=dict(bbox_roi_extractor=...)',
    'model.mask_roi_extractor': 'roi_head=dict(mask_roi_extractor=...)',
    'model.bbox_head': 'roi_head=dict(bbox_head=...)',
    'model.mask_head': 'roi_head=dict(mask_head=...)',
    'train_cfg.rpn': 'model.train_cfg.rpn',
    'train_cfg.rcnn': 'model.train_cfg.rcnn',
    'test_cfg.rpn': 'model.test_cfg.rpn',
    'test_cfg.rcnn': 'model.test_cfg.rcnn',
}
_TYPES_2X = {
    'DefaultFormatBundle': 'PackDetInputs',
    'Collect': 'PackDetInputs',
    'ImageToTensor': 'PackDetInputs',
    'MultiScaleFlipAug': 'the steps in it, without it',
    'EpochBasedRunner': 'ExactTrainLoop',
    'IterBasedRunner': 'IterBasedTrainLoop',
    'TextLoggerHook': 'LoggerHook',
    'TensorboardLoggerHook': 'TensorBoardBackend in visualizer.vis_backends',
    'WandbLoggerHook': 'WandbVisBackend in visualizer.vis_backends',
    'MMDetWandbHook': 'WandbVisBackend in visualizer.vis_backends',
    'Fp16OptimizerHook': 'AmpOptimWrapper of optim_wrapper',
    'OptimizerHook': 'OptimWrapper of optim_wrapper',
    'ExpMomentumEMAHook': 'EMAHook',
    'LinearMomentumEMAHook': 'EMAHook',
    'SharedFCBBoxHead': 'Shared2FCBBoxHead',
}


def of_2x(key: str) -> str | None:
    """What MMDetection 3.x has in place of a dotted key of 2.x; None for a key that 2.x did not have."""
    *parents, name = key.split('.')
    if not parents:
        return _TOP_2X.get(name)
    return _ARGUMENTS_2X.get(f'{parents[-1]}.{name}') or _ARGUMENTS_2X.get(name)


def find_2x(cfg: Config, settings: Collection[str], unread: Collection[str]) -> list[Message]:
    """The spellings of MMDetection 2.x that no class of 3.x would refuse: they would reach nothing.

    Args:
        settings: Names at the top of a config that a run reads.
        unread: Names at the top of the config that the file itself does not use: any other may be a helper.
    """
    problems = [Message('config-2x', key=key, way=_TOP_2X[key]) for key in cfg if key in _TOP_2X and key in unread]
    if problems:
        return problems
    model = cfg.get('model')
    preprocessor = model.get('data_preprocessor') if isinstance(model, Mapping) else None
    normalizes = isinstance(preprocessor, Mapping) and bool(preprocessor.get('mean'))

    def look(node: Any, place: str) -> None:
        if isinstance(node, Mapping):
            kind = node.get('type')
            if isinstance(kind, str) and (way := _TYPES_2X.get(kind.rpartition('.')[2])):
                problems.append(Message('config-2x', key=f"{place}.type = '{kind}'", way=way))
            if kind == 'Normalize' and normalizes and 'pipeline' in place:
                problems.append(Message('config-normalized-twice', key=place))
            if place.endswith('metainfo'):
                found = [name for name in ('CLASSES', 'PALETTE') if name in node]
                problems.extend(Message('config-2x', key=f'{place}.{n}', way=_ARGUMENTS_2X[n]) for n in found)
            for key, value in node.items():
                look(value, f'{place}.{key}')
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                look(value, f'{place}.{i}')

    for key in cfg:
        if key in settings:
            look(cfg[key], key)
    return problems


def rename_keys(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted overrides by their present names."""
    renamed = {}
    for key, value in pairs.items():
        old = max((o for o in KEYS if key == o or key.startswith(f'{o}.')), key=len, default='')
        renamed[KEYS.get(old, '') + key[len(old) :]] = TYPES.get(value, value) if isinstance(value, str) else value
    return renamed


def translate(cfg: Config) -> Message | None:
    """Rewrite the old names of a config in place; a note on them, if there are any."""
    found = _rename_types(cfg) + _move_settings(cfg) + _move_hooks(cfg)
    return Message('config-old-names', names=', '.join(dict.fromkeys(found))) if found else None


def drop_removed(cfg: Config) -> None:
    """Take out the entries of `default_hooks` that were set to None, in place."""
    hooks = cfg.get('default_hooks') or {}
    for name in [n for n, hook in hooks.items() if hook is None and n not in _MMENGINE]:
        del hooks[name]


def _rename_types(cfg: Config) -> list[str]:
    backends = (cfg.get('visualizer') or {}).get('vis_backends') or []
    nodes = [*(cfg.get('default_hooks') or {}).values(), *backends, *(cfg.get('vis_backends') or [])]
    found = []
    for node in nodes:
        if isinstance(node, dict) and str(node.get('type')) in TYPES:
            found.append(node['type'])
            node['type'] = TYPES[node['type']]
    return found


def _move_settings(cfg: Config) -> list[str]:
    hooks = cfg.get('default_hooks') or {}
    if 'bad_numbers' not in hooks:
        return []
    old = hooks.pop('bad_numbers')
    watch = {key: old.pop(key) for key in ('factor', 'window') if old and key in old}
    for name, kind, given in (('nonfinite', 'NonFiniteHook', old), ('divergence', 'DivergenceHook', watch)):
        hooks[name] = None if old is None else {'type': kind, **(hooks.get(name) or {}), **given}
    return ['default_hooks.bad_numbers']


def _move_hooks(cfg: Config) -> list[str]:
    old = [hook for hook in cfg.get('custom_hooks') or [] if isinstance(hook, dict) and str(hook.get('type')) in HOOKS]
    if not {hook['type'] for hook in old} - {'ResultsHook'}:
        return []
    # A list of an earlier release: what it does not name was left out on purpose.
    moved: dict[str, Any] = dict.fromkeys(_PLAIN)
    for hook in old:
        target = HOOKS[hook['type']]
        if target is not None:
            name, settings = target
            given = {'pictures' if key == 'num_images' else key: hook[key] for key in hook if key != 'type'}
            moved[name] = {**(moved[name] or _PLAIN[name]), **settings, **given}
    cfg.setdefault('default_hooks', {}).update(moved)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook not in old]
    return [hook['type'] for hook in old]
