"""MMEngine's Runner, started from weights that were compared with the model before it was built."""

from __future__ import annotations

import contextlib
from typing import Any

from mmdet.registry import RUNNERS
from mmengine.dist import broadcast_object_list
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmfinetune.engine.hooks import EXTRAS
from mmfinetune.engine.loader import watched
from mmfinetune.utils.dist import bare_model
from mmfinetune.utils.extras import extra
from mmfinetune.weights.check import WeightCheck

# Where the message hub, and with it each checkpoint, keeps the facts on the weights of the start.
INITIAL_WEIGHTS = 'initial_weights'


@RUNNERS.register_module()
class FineTuningRunner(Runner):
    """A Runner whose model starts from given weights where no checkpoint is resumed or loaded.

    Not by ``init_cfg``, since children's ``init_weights`` run after their parent's and would
    overwrite it, and not by ``load_from``, which only warns of tensors that do not fit.

    Attributes:
        start: The weights to start from; None once the model has them, or for none.
        weights_report: What ``--check-weights`` prints of them; empty until the model has them.
            File, SHA-256 and counts are in the message hub, under `INITIAL_WEIGHTS`.
    """

    start: WeightCheck | None = None
    weights_report = ''

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; where one of `EXTRAS` fails, warn."""
        for hook in filter(lambda hook: hasattr(hook, fn_name), self.hooks):
            names = {cls.__name__ for cls in type(hook).__mro__}
            with extra(f'{type(hook).__name__}.{fn_name}') if names & EXTRAS else contextlib.nullcontext():
                getattr(hook, fn_name)(self, **kwargs)

    def dump_config(self) -> None:
        """Write the config into the work dir. A test alone has no settings of training, and leaves the run's there."""
        if self.cfg.get('train_cfg') is not None:
            super().dump_config()

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> DataLoader:
        """As MMEngine builds it, see `mmfinetune.engine.loader`."""
        return watched(Runner.build_dataloader(dataloader, seed, diff_rank_seed))

    def load_or_resume(self) -> None:
        """Load or resume a checkpoint; without one apply the weights to start from, once."""
        super().load_or_resume()
        start, self.start = self.start, None
        if start is None or self.cfg.get('resume') or self.cfg.get('load_from'):
            return
        model = bare_model(self)
        # The first process's seed for all: heads that differ would never become the same again.
        seed = [self.seed]
        broadcast_object_list(seed)
        start.apply(model, seed[0])
        # As MMEngine tells hooks of a loaded checkpoint: EMA takes its copy from it.
        self.call_hook('after_load_checkpoint', checkpoint={'state_dict': model.state_dict(), 'meta': {}})
        self.weights_report = start.text()
        self.message_hub.update_info(INITIAL_WEIGHTS, start.facts())
        self.logger.info(start.summary())
