"""The learning rate of each part in the log and in TensorBoard."""

from __future__ import annotations

from mmdet.registry import HOOKS
from mmengine.hooks import Hook


@HOOKS.register_module()
class GroupLrHook(Hook):
    """Logs ``lr/<group>`` for each named param group; MMEngine logs the first group's only."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        # Not the wrapper's own list: it ends with a group that only carries the base lr.
        for i, group in enumerate(runner.optim_wrapper.optimizer.param_groups):
            name = group.get('name', f'group{i}')
            runner.message_hub.update_scalar(f'train/lr/{name}', group['lr'])
