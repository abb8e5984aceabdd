"""What a run needs to know to continue as if it had never stopped: one record under one key.

The record is in MMEngine's message hub, which each checkpoint holds. A checkpoint also has
``checkpoint[KEY]['gradients']``: those that wait in an unfinished accumulation, by parameter.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.runner import Runner

from mmfinetune.config.resume import KEY, VERSION


@dataclass(frozen=True)
class RunState:
    """Plain numbers and strings, since checkpoints are read as data only.

    Attributes:
        version: Layout of the record.
        epoch_start: ``epoch`` and ``iter`` at which the last epoch began; empty before the first.
        validated_epoch: The last epoch that was validated.
        early_stop: ``best`` score and validations ``waited`` of `EarlyStopHook`; empty without it.
        last: File of the newest checkpoint; empty before the first.
        best: ``score`` and ``file`` of each metric of ``save_best``.
        kept: Epochs (or steps) whose checkpoints are kept, the oldest first.
        outdated: Files to remove, for a run that is killed before it comes to that.
        batch_setup: See `mmfinetune.config.resume.BatchSetup`.
        settings: See `mmfinetune.config.resume.settings_of`.
    """

    version: int = VERSION
    epoch_start: dict[str, int] = field(default_factory=dict)
    validated_epoch: int = 0
    early_stop: dict[str, float] = field(default_factory=dict)
    last: str = ''
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    batch_setup: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def run_state(runner: Runner) -> RunState:
    """The state of a run as it is now."""
    return RunState(**runner.message_hub.runtime_info.get(KEY, {}))


def update_run_state(runner: Runner, **changes: Any) -> RunState:
    """Change some of the state; the next checkpoint holds it."""
    state = dataclasses.replace(run_state(runner), **changes)
    runner.message_hub.update_info(KEY, dataclasses.asdict(state))
    return state


def begin_epoch(runner: Runner) -> dict[str, int]:
    """Note that an epoch begins, unless it continues; where it began, as ``epoch_start``."""
    # Not by the length of the data loader, which mmdet's AspectRatioBatchSampler with
    # drop_last gets wrong by one in some epochs.
    start = run_state(runner).epoch_start
    if start.get('epoch') != runner.epoch:
        start = {'epoch': runner.epoch, 'iter': runner.iter}
        update_run_state(runner, epoch_start=start)
    return start


def upgrade(checkpoint: dict[str, Any]) -> None:
    """Bring a checkpoint from before version 1, or of MMEngine's own hook, into this layout; in place."""
    hub = checkpoint['message_hub']
    info, resumed_keys = hub['runtime_info'], hub['resumed_keys']
    if KEY in info:
        return

    def take(key: str, default: Any) -> Any:
        resumed_keys.pop(key, None)
        return info.pop(key, default)

    take('results_epoch_start', None)
    best = {}
    for key in [k for k in info if k.startswith('best_score')]:
        # Of a single metric MMEngine does not note the name: '' stands for it.
        file = Path(take(key.replace('best_score', 'best_ckpt'), '')).name
        best[key.removeprefix('best_score').lstrip('_')] = {'score': take(key, None), 'file': file}
    score, waited = take('early_stop', (None, 0))
    state = RunState(
        epoch_start=take('epoch_start', {}),
        validated_epoch=take('validated_epoch', 0),
        early_stop={} if score is None else {'best': score, 'waited': waited},
        last=Path(take('last_ckpt', '')).name,
        best=best,
        kept=list(take('keep_ckpt_ids', ())),
        outdated=checkpoint.pop('outdated', []),
        batch_setup=checkpoint['meta'].pop('recipe', {}),
    )
    info[KEY], resumed_keys[KEY] = dataclasses.asdict(state), True
    if 'gradients' in checkpoint:
        checkpoint[KEY] = {'gradients': checkpoint.pop('gradients')}
