"""The last lines of a training that cannot have learned: what shows it, and where to look."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfinetune.apis.run_data import splits_of_config
from mmfinetune.config.resolve import LOG_DIR, Options
from mmfinetune.evaluation import diagnosis
from mmfinetune.evaluation.tensorboard import TRAIN_BATCH
from mmfinetune.utils.dist import say
from mmfinetune.utils.extras import extra

if TYPE_CHECKING:
    from mmengine.runner import Runner


def diagnose(runner: Runner, options: Options) -> None:
    """Say why a finished training has not learned, if it has not."""
    with extra('the diagnosis'):
        facts = facts_of(runner)
        if found := diagnosis.signs(facts):
            lines = ['Diagnosis: this training has hardly learned anything.', *(f'  - {sign}' for sign in found)]
            causes = diagnosis.causes(_with_data(facts, runner), _commands(runner, options))
            lines += ['The likeliest causes, and the command to look at each:']
            lines += [f'  {place}. {cause}' for place, cause in enumerate(causes, 1)]
            say('\n'.join(lines))


def facts_of(runner: Runner) -> diagnosis.Facts:
    """What a runner that has trained knows of its training."""
    from mmfinetune.engine.runner import INITIAL_WEIGHTS

    hub = runner.message_hub
    scalars = {name: buffer.data for name, buffer in hub.log_scalars.items()}
    nothing = np.zeros(0), np.zeros(0)
    values, counts = scalars.get('train/loss', nothing)
    rates, _ = scalars.get('train/base_lr', scalars.get('train/lr', nothing))
    ap = {kind: scalars[key][0][-1] for kind in ('bbox', 'segm') if (key := f'val/coco/{kind}_mAP') in scalars}
    start = hub.runtime_info.get(INITIAL_WEIGHTS)
    return diagnosis.Facts(
        losses=np.where(counts > 0, values, np.nan).tolist(),
        rates=rates.tolist(),
        lr=runner.cfg.optim_wrapper.optimizer.lr,
        ap=ap,
        reinit=start['reinit'] if start else None,
    )


def _with_data(facts: diagnosis.Facts, runner: Runner) -> diagnosis.Facts:
    """The facts with those of the training images, which take seconds to count."""
    dataset: Any = runner.train_dataloader.dataset
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    try:
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    except (AttributeError, KeyError, TypeError, NotImplementedError):
        return facts  # a data set of another kind than MMEngine's
    instances = [instance for info in infos for instance in info.get('instances', ())]
    objects = Counter(instance['bbox_label'] for instance in instances if not instance.get('ignore_flag'))
    absent = [name for label, name in enumerate(classes) if not objects[label]]
    return dataclasses.replace(facts, absent=absent, classes=len(classes), objects=objects.total())


def _commands(runner: Runner, options: Options) -> dict[str, str]:
    """How to look at each cause."""
    splits, _ = splits_of_config(runner.cfg)
    file, images = splits.get('train') or next(iter(splits.values()))
    folder = Path(runner.work_dir)
    train = ['train_pretrained.py', options.config]
    more = ['--data-root', str(options.data_root)] if options.data_root else []
    more += ['--cfg-options', *options.cfg_options] if options.cfg_options else []
    lr = runner.cfg.optim_wrapper.optimizer.lr
    commands: dict[str, list[Any]] = {
        'check': ['check_dataset.py', file, '--image-root', images, '--html', folder / 'check.html'],
        'plan': [*train, '--dry-run', *more],
        'weights': [*train, '--check-weights', *more],
        'slower': [*train, '--lr', f'{lr / 10:g}', *more],
        'errors': ['evaluate.py', folder],
    }
    shown = {name: 'python tools/' + shlex.join(map(str, parts)) for name, parts in commands.items()}
    return {**shown, 'pictures': f'tensorboard --logdir {shlex.quote(str(folder / LOG_DIR))} ({TRAIN_BATCH})'}
