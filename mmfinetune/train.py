"""The main job: prepare data and weights, train, test. Each tool of it is one call here."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune import checkpoint, coco, config, demo, devkit, lr, voc
from mmfinetune.errors import UserError
from mmfinetune.files import atomic_write_json

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

EARLIER = 'earlier_runs'
LOG_DIR = 'tensorboard_logs'


@dataclass
class Options:
    """What the command line says; see ``tools/train_pretrained.py --help``."""

    config: str
    check_weights: bool = False
    train: bool = False
    test: bool = False
    dry_run: bool = False
    weights: str | None = None
    data_root: str | None = None
    work_dir: str | None = None
    resume: str | bool = False
    amp: bool = False
    lr: float | None = None
    scale_lr: bool = True
    cfg_options: Sequence[str] = field(default_factory=list)


def run(options: Options) -> int:
    """Do what the options ask for; training and testing if they name no part.

    Returns:
        Exit code.

    Raises:
        UserError: Anything the user can mend, found before training where possible.
    """
    if options.weights:
        # Before the imports, which take seconds.
        checkpoint.verify_file(Path(options.weights))
    if options.resume and options.resume is not True and not Path(options.resume).is_file():
        raise UserError(f'There is no checkpoint {options.resume} to resume from',
                        cure='pass --resume alone to take the last one of the work dir')
    cfg = config.load(options.config, options.cfg_options)
    whole = not (options.check_weights or options.train or options.test or options.dry_run)
    world = _join_group(cfg)
    _apply(cfg, options)
    redirect_annotations(cfg)
    check_heads(cfg)
    if options.check_weights:
        check_weights(cfg)
        if not (options.train or options.test):
            return 0
    do_train, do_test = whole or options.train, whole or options.test
    if do_train or do_test:
        _check_writable(Path(cfg.work_dir))
    # Only rank 0 writes; the others wait until data and weights are there.
    splits = _rank0_first(lambda: prepare_data(cfg, train=do_train or options.dry_run))
    plan = lr.plan_lr(cfg, world, options.lr, options.scale_lr)
    _say(summary(cfg, splits, plan, world))
    if options.dry_run:
        _say('Dry run: nothing was trained.')
        return 0
    cfg.optim_wrapper.optimizer.lr = plan.lr
    # Done here, since Runner.scale_lr leaves out the accumulation.
    cfg.auto_scale_lr = dict(cfg.get('auto_scale_lr') or {}, enable=False)
    if do_train:
        runner = _train(cfg, options)
        if do_test:
            best = checkpoint.best_checkpoint(Path(cfg.work_dir))
            _say(f'Testing {best}')
            runner.load_checkpoint(str(best), map_location='cpu')
            _test(runner, best)
    else:
        file = Path(options.weights) if options.weights else \
            checkpoint.best_checkpoint(Path(cfg.work_dir))
        _test(_test_runner(cfg, file), file)
    work_dir = cfg.work_dir
    _say(f'Results: {work_dir}' + (' (pictures in figures/)' if do_test else '') +
         f'\nCurves:  tensorboard --logdir {work_dir}/{LOG_DIR}')
    return 0


def _say(text: str) -> None:
    from mmengine.dist import is_main_process
    if is_main_process():
        print(text, flush=True)


def _join_group(cfg: Config) -> int:
    """Join torchrun's processes, if it started this one; the number of processes.

    The group is made here and not by the Runner, which calls CUDA even for gloo.
    """
    world = int(os.environ.get('WORLD_SIZE', 1))
    if 'LOCAL_RANK' not in os.environ or world == 1:
        return 1
    import torch
    from mmengine.dist import init_dist, is_distributed
    cfg.launcher = 'pytorch'
    if torch.cuda.is_available():
        if not is_distributed():
            init_dist('pytorch', backend='nccl')
    else:
        cfg.env_cfg.dist_cfg = dict(backend='gloo')
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None,
                                     broadcast_buffers=False)
        if not is_distributed():
            torch.distributed.init_process_group('gloo')
    return world


def _rank0_first(work: Callable[[], Any]) -> Any:
    """Run on rank 0, then on the others; an error of rank 0 stops all of them."""
    from mmengine.dist import broadcast_object_list, get_rank, get_world_size
    if get_world_size() == 1:
        return work()
    outcome: list = [None]
    if get_rank() == 0:
        try:
            outcome = [work()]
        except UserError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def _apply(cfg: Config, options: Options) -> None:
    """Put command-line settings into the config; they win over it."""
    import torch
    if options.work_dir:
        cfg.work_dir = options.work_dir
    for backend in cfg.get('visualizer', {}).get('vis_backends', []):
        if backend['type'] == 'TensorboardVisBackend':
            backend['save_dir'] = str(Path(cfg.work_dir) / LOG_DIR)
    if options.data_root:
        set_data_root(cfg, Path(options.data_root))
    if options.weights and (options.train or not options.test):
        if not cfg.get('weights'):
            raise UserError(f'{options.config} starts from random weights: it has no `weights`, so '
                            'it cannot take --weights',
                            cure='use a config with `weights`, e.g. '
                            'configs/mask_rcnn_voc_pretrained.py')
        cfg.weights.checkpoint = options.weights
        cfg.weights.url = None
    if options.amp:
        if not torch.cuda.is_available():
            raise UserError('--amp needs a CUDA GPU, and PyTorch sees none here',
                            cure='drop --amp')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if options.resume:
        cfg.resume = True
        last = Path(options.resume) if options.resume is not True else _last(Path(cfg.work_dir))
        # MMEngine would unpickle anything if the safe way fails; this makes sure it does not.
        checkpoint.read_checkpoint(last)
        cfg.load_from = str(last)


def _last(work_dir: Path) -> Path:
    pointer = work_dir / 'last_checkpoint'
    file = work_dir / Path(pointer.read_text().strip()).name if pointer.is_file() else None
    if file is None or not file.is_file():
        raise UserError(f'There is nothing to resume in {work_dir}',
                        cure='drop --resume, or pass the checkpoint: --resume PATH')
    return file


def _datasets(cfg: Config) -> dict[str, Any]:
    """The dataset configs by split, wrappers taken off."""
    found = {}
    for split in ('train', 'val', 'test'):
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
        while dataset is not None and 'dataset' in dataset:
            dataset = dataset['dataset']
        if dataset is not None and 'ann_file' in dataset:
            found[split] = dataset
    return found


def _ann_file(dataset: Any) -> Path:
    return Path(dataset.get('data_root') or '') / dataset['ann_file']


def set_data_root(cfg: Config, root: Path) -> None:
    """Point all data sets and evaluators of a config at another folder.

    Args:
        cfg: Changed in place.
        root: A folder with ``VOCdevkit/VOC2012`` in it, that folder itself, or any folder with
            the annotation files that the config names.

    Raises:
        UserError: The folder has neither.
    """
    if not root.is_dir():
        raise UserError(f'There is no data folder {root}', cure='correct --data-root')
    datasets = _datasets(cfg)
    if not all((root / d['ann_file']).is_file() for d in datasets.values()):
        try:
            root = devkit.find_devkit(root)
        except UserError as error:
            raise UserError(
                f'{root} holds no data for this config. Looked for:',
                [str(root / a) for a in dict.fromkeys(d['ann_file'] for d in datasets.values())]
                + [f'a VOC 2012 devkit ({error.message})'],
                'pass the folder that holds VOCdevkit/, or fetch VOC 2012 with '
                '`python tools/prepare_voc.py --download`') from None
    for split, dataset in datasets.items():
        dataset['data_root'] = str(root)
        _point_evaluators(cfg, split, root / dataset['ann_file'])
    if 'demo_data' in cfg:
        cfg.pop('demo_data')


def _point_evaluators(cfg: Config, split: str, ann_file: Path) -> None:
    evaluators = cfg.get(f'{split}_evaluator') or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if 'ann_file' in evaluator:
            evaluator['ann_file'] = str(ann_file)


def redirect_annotations(cfg: Config) -> None:
    """Let annotation files that must be made go to the work dir if the devkit is read-only."""
    for split, dataset in _datasets(cfg).items():
        path, root = _ann_file(dataset), Path(dataset.get('data_root') or '')
        if not path.is_file() and root.is_dir() and not os.access(root, os.W_OK):
            ann_file = Path(cfg.work_dir).resolve() / 'annotations' / path.name
            dataset['ann_file'] = str(ann_file)
            _point_evaluators(cfg, split, ann_file)


def prepare_data(cfg: Config, train: bool = True) -> dict[str, coco.Split]:
    """Make missing annotation files from what is there, then check all that the run reads.

    Args:
        cfg: Resolved config.
        train: Whether the training split is needed.

    Returns:
        What each split holds.

    Raises:
        UserError: No data, or data that does not fit the config.
    """
    datasets = {s: d for s, d in _datasets(cfg).items() if train or s == 'test'}
    missing = [d for d in datasets.values() if not _ann_file(d).is_file()]
    if missing:
        _make_annotations(cfg, [_ann_file(d) for d in missing], Path(missing[0]['data_root']))
    splits: dict[str, coco.Split] = {}
    done: dict[Path, coco.Split] = {}
    for name, dataset in datasets.items():
        path = _ann_file(dataset)
        if path not in done:
            root = Path(dataset.get('data_root') or '')
            prefix = (dataset.get('data_prefix') or {}).get('img', '')
            done[path] = coco.read_split(path, root / prefix, _classes(dataset))
        splits[name] = done[path]
    return splits


def _make_annotations(cfg: Config, paths: list[Path], root: Path) -> None:
    recipe = dict(cfg.get('demo_data') or {})
    if recipe:
        make = demo.MAKERS[recipe.pop('kind')]
        root = make(Path(recipe.pop('root')), **recipe)
        if all(p.is_file() for p in paths):
            return
    try:
        # The config's data_root is the VOC2012 folder; the devkit may lie two folders up.
        voc2012 = devkit.find_devkit(root)
    except UserError:
        raise UserError('There is no data yet. Looked for:',
                        [*dict.fromkeys(map(str, paths)), f'{root} (a VOC 2012 devkit)'],
                        'fetch and convert VOC 2012 with `python tools/prepare_voc.py --download`, '
                        'or pass its folder with --data-root') from None
    voc.convert(voc2012, paths[0].parent)


def _classes(dataset: Any) -> Sequence[str] | None:
    own = (dataset.get('metainfo') or {}).get('classes')
    if own:
        return own
    from mmdet.registry import DATASETS
    return (getattr(DATASETS.get(dataset['type']), 'METAINFO', None) or {}).get('classes')


def check_heads(cfg: Config) -> None:
    """Compare ``num_classes`` of all heads with the class list of the data.

    Raises:
        UserError: They differ.
    """
    dataset = next(iter(_datasets(cfg).values()), None)
    classes = _classes(dataset) if dataset else None
    if classes is None:
        return
    problems = []

    def visit(node: Any, place: str) -> None:
        if isinstance(node, dict):
            count = node.get('num_classes')
            # An RPN tells objects from background only.
            if count is not None and 'rpn' not in place and count != len(classes):
                problems.append(f'{place}.num_classes = {count}')
            for key, value in node.items():
                visit(value, f'{place}.{key}')
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                visit(value, f'{place}.{i}')

    visit(cfg.model, 'model')
    if problems:
        raise UserError(f'The data has {len(classes)} classes, but the model has other numbers:',
                        problems, f'set these to {len(classes)}, or metainfo.classes to the '
                        "model's classes")


def check_weights(cfg: Config) -> checkpoint.TransferReport:
    """Find, verify and compare the weights with the model, and print where each part comes from.

    Raises:
        UserError: The weights should not be trained on.
    """
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope
    if not cfg.get('weights'):
        raise UserError('This config starts from random weights: there is nothing to check',
                        cure='use a config with `weights`')
    weights = dict(cfg.weights)
    path = _rank0_first(lambda: checkpoint.find_weights(cfg.weights.checkpoint,
                                                        cfg.weights.get('url')))
    verdict = checkpoint.verify_file(path)
    source = checkpoint.state_dict_of(checkpoint.read_checkpoint(path), path)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    target = MODELS.build(cfg.model).state_dict()
    report = checkpoint.plan_transfer(target, source, list(weights.get('reinit') or {}),
                                      weights.get('into', ''), weights.get('ignore', ()))
    lines = [f'{path}: {path.stat().st_size / 1e6:.1f} MB, {len(source)} tensors, {verdict}',
             f'{"module":32}{"tensors":>9}{"parameters":>13}{"loaded":>8}{"re-init":>9}{"kept":>6}']
    rows = report.rows({k: v.numel() for k, v in target.items()})
    lines += [f'{r[0]:32}{r[1]:>9}{r[2]:>13,}{r[3]:>8}{r[4]:>9}{r[5]:>6}' for r in rows]
    lines += [f'drawn anew from N(0, {v["std"]:g}), biases 0: {k}'
              for k, v in (weights.get('reinit') or {}).items()]
    left = report.dropped + report.ignored
    if left:
        lines.append(f'left over in the file: {", ".join(left)}')
    _say('\n'.join(lines))
    checkpoint.check_transfer(report, path)
    _say('Verdict: good to train on.')
    return report


def summary(cfg: Config, splits: dict[str, coco.Split], plan: lr.LrPlan, world: int) -> str:
    """Data sizes, steps and learning rates of a run, as text."""
    lines = [f'Data:  {name:5} {s.images:,} images, {s.annotations:,} objects, '
             f'{len(s.classes)} classes ({s.path})' for name, s in splits.items()]
    if 'train' in splits:
        batch = cfg.train_dataloader.batch_size
        usable, epochs = splits['train'].usable, cfg.train_cfg.get('max_epochs')
        if epochs:
            # Each process gets the same number of images, rounded up, as its sampler does it.
            steps = math.ceil(math.ceil(usable / world) / batch)
            lines.append(f'Steps: {usable:,} images with objects / ({world} GPU x {batch}) = '
                         f'{steps:,} an epoch x {epochs} epochs = {steps * epochs:,}')
        lines.append(f'lr:    {plan.lr:g} = {plan.source}')
        lines += [f'         lr/{name:10} {value:g}' for name, value in plan.groups.items()]
    return '\n'.join(lines)


def _check_writable(work_dir: Path) -> None:
    probe = work_dir / f'.write_test_{os.getpid()}'
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f'Cannot write to the work dir {work_dir}: {error.strerror}',
                        cure='pass a folder that you may write to with --work-dir') from None


def _move_earlier_run(work_dir: Path) -> None:
    """Set an earlier run aside, or its curves and best checkpoint would mix with the new ones."""
    old = [p for p in work_dir.iterdir() if p.name != EARLIER]
    if any(p.suffix == '.pth' for p in old) or (work_dir / LOG_DIR).exists():
        target = work_dir / EARLIER / time.strftime('%Y%m%d_%H%M%S')
        target.mkdir(parents=True)
        for path in old:
            shutil.move(path, target / path.name)
        _say(f'{work_dir} held an earlier run: it is now in {target}. To go on with a run '
             'instead, pass --resume.')


def _train(cfg: Config, options: Options) -> Runner:
    from mmengine.dist import barrier, is_main_process
    from mmengine.runner import Runner
    if not cfg.resume:
        _rank0_first(lambda: _move_earlier_run(Path(cfg.work_dir)))
        if cfg.get('weights'):
            path = _rank0_first(lambda: checkpoint.find_weights(cfg.weights.checkpoint,
                                                                cfg.weights.get('url')))
            cfg.weights.checkpoint = str(path)
    barrier()
    runner = Runner.from_cfg(cfg)
    runner.train()
    if is_main_process():
        _say(f'Trained; checkpoints in {cfg.work_dir}')
    return runner


def _test_runner(cfg: Config, file: Path) -> Runner:
    """A runner for the test alone, the model loaded in full from a checkpoint."""
    from mmengine.model import is_model_wrapper
    from mmengine.runner import Runner
    checkpoint.verify_file(file)
    cfg.resume, cfg.load_from = False, None
    cfg.weights = None
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler',
                'val_dataloader', 'val_cfg', 'val_evaluator', 'auto_scale_lr'):
        cfg.pop(key, None)
    runner = Runner.from_cfg(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    checkpoint.transfer(model, file)
    return runner


def _test(runner: Runner, file: Path) -> dict[str, float]:
    """Test, print the headline numbers and write all of them to ``test_results.json``."""
    from mmengine.dist import is_main_process
    metrics = runner.test()
    if is_main_process():
        out = Path(runner.work_dir) / 'test_results.json'
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        atomic_write_json(out, {'checkpoint': str(file), 'metrics': finite})
        rows = [f'{name:6}' + ''.join(f'{metrics.get(f"coco/{kind}_{stat}", math.nan):9.3f}'
                                      for stat in _HEADLINE)
                for name, kind in (('boxes', 'bbox'), ('masks', 'segm'))]
        _say(f'{"test":6}' + ''.join(f'{stat:>9}' for stat in _HEADLINE))
        _say('\n'.join(rows))
        _say(f'segm AP50 = {metrics.get("coco/segm_mAP_50", math.nan):.3f}   '
             f'(all numbers: {out})')
    return metrics


_HEADLINE = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')


def read_results(work_dir: Path) -> dict:
    """What ``_test`` wrote."""
    return json.loads((Path(work_dir) / 'test_results.json').read_text())
