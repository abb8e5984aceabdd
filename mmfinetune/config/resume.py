"""Which checkpoint a run is resumed from, and whether it can be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.config.lr import recipe
from mmfinetune.utils.dist import rank0_first, say
from mmfinetune.utils.errors import UserError
from mmfinetune.weights import read
from mmfinetune.weights import work_dir as weights_work_dir

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmfinetune.config.options import Options
AUTO = 'auto'


def set_resume(cfg: Config, options: Options, world: int) -> None:
    if options.resume not in (True, AUTO):
        path = Path(options.resume)
        meta = _meta_of_run(path)
    else:
        # One choice for all, made before any process writes there again.
        path, meta = rank0_first(lambda: _last_whole(Path(cfg.work_dir), options.resume == AUTO))
    if path is None:
        say(f'There is nothing to resume in {cfg.work_dir}: the run begins')
        return
    cfg.resume = True
    cfg.load_from = str(path)
    _check_recipe(path, meta.get('recipe'), recipe(cfg, world))
    if meta.get('seed') is not None:
        # What is drawn in each step follows from it.
        cfg.randomness = dict(cfg.get('randomness') or {}, seed=meta['seed'])


def _last_whole(work_dir: Path, may_lack: bool = False) -> tuple[Path | None, dict]:
    """The newest checkpoint that can be resumed, and its ``meta``; tells of damaged newer ones.

    None where there is no checkpoint and ``may_lack``.
    """
    damaged = []
    for path in weights_work_dir.candidates(work_dir):
        try:
            meta = _meta_of_run(path)
        except UserError as error:
            damaged.append(error)
            continue
        if damaged:
            say(
                '\n'.join(['Damaged, so an older checkpoint is taken:', *(f'  - {error.message}' for error in damaged)])
            )
        say(f'Resuming {path}')
        return path, meta
    if may_lack and not damaged:
        return None, {}
    if len(damaged) == 1:
        raise damaged[0]
    raise UserError(
        f'There is nothing to resume in {work_dir}',
        [e.message for e in damaged],
        'drop --resume, or pass the checkpoint: --resume PATH',
    )


def _meta_of_run(path: Path) -> dict:
    """The ``meta`` of a checkpoint; raises a UserError unless it holds a run."""
    # The safe way; MMEngine would unpickle anything if that fails.
    loaded = read.read_checkpoint(path)
    missing = [k for k in ('state_dict', 'meta', 'optimizer', 'message_hub') if k not in loaded]
    if missing:
        raise UserError(
            f'{path} holds no run to resume; it lacks:',
            missing,
            'pass a checkpoint of a run (epoch_*.pth), or start from it: --weights',
        )
    if 'config' in loaded['meta']:
        # Runner.resume would run this text as Python; MMEngine's own files do not have it.
        raise UserError(
            f'{path} is refused: it holds a config, which is code', cure='resume from a checkpoint of your own run'
        )
    return loaded['meta']


def _check_recipe(path: Path, before: dict | None, now: dict[str, int]) -> None:
    """Refuse another batch: optimizer, schedule and the place in the epoch come from the file."""

    def key(of: dict) -> tuple:
        return of['processes'] * of['batch_size'], of['accumulation']

    if not before or key(before) == key(now):
        return

    def text(of: dict) -> str:
        return f'{of["processes"]} processes x {of["batch_size"]} images x {of["accumulation"]} accumulation'

    images = before['processes'] * before['batch_size']
    same = f'--gpus {before["processes"]} --batch-size {before["batch_size"]}'
    if images % now['processes'] == 0:
        same = f'--batch-size {images // now["processes"]}'
    raise UserError(
        f'{path} comes from a run of {text(before)}, and this one has {text(now)}: the steps of an '
        'epoch and the learning rate would not be those of the checkpoint',
        cure=f'{same} --accumulate {before["accumulation"]} has the same steps; --weights {path} '
        'without --resume starts anew from its weights',
    )
