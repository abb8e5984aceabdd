"""What TensorBoard shows of a run beyond the records of MMEngine's logger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.hooks import RemovableHandle

from mmfinetune.engine.hooks import PRIORITY
from mmfinetune.engine.hooks.pictures import Picker, batch_picture, class_names, spread, truth_and_prediction
from mmfinetune.engine.runner import INITIAL_WEIGHTS
from mmfinetune.engine.vis_backends import TensorBoardBackend
from mmfinetune.evaluation import tensorboard as curves
from mmfinetune.evaluation.stats import SCORE_THR
from mmfinetune.utils.dist import bare_model
from mmfinetune.utils.extras import extra

_PAIR = 800  # px, long side of each of two pictures next to each other


@HOOKS.register_module()
class TensorBoardHook(Hook):
    """Logs more of each step, resumes the curves with the run, and shows images.

    For all backends: the learning rate of each part, the norm of the gradient, and ``eta_hours``. For TensorBoard: the
    training loss from the first step on, hyperparameters, the first batch as the model gets it
    (``8_images/train_batch``) and after each validation the same images (``8_images/val/<name>``), ground truth next to
    prediction, spread over the data set or over the share of the first of several processes.

    Args:
        lr: Whether to log ``lr/<group>`` of each named param group; MMEngine logs that of the first group only.
        grad_norm: Whether to log the 2-norm of the gradient of each update before any clipping: summed over an
            accumulation, averaged over processes, without the loss scale. `NonFiniteHook` measures it.
        pictures: Number of validation images; 0 shows no images at all.
        score_thr: Predictions below this score are not drawn.
    """

    priority = PRIORITY['TensorBoardHook']

    def __init__(
        self, lr: bool = True, grad_norm: bool = True, pictures: int = 4, score_thr: float = SCORE_THR
    ) -> None:
        self.lr, self.grad_norm, self.pictures, self.score_thr = lr, grad_norm, pictures, score_thr
        self._training = False
        self._hparams_end: Summary | None = None
        self._hparams_run = curves.VAL
        self._shows_batch = False
        self._handle: RemovableHandle | None = None
        self._picker = Picker(())

    def before_train(self, runner: Runner) -> None:
        self._training = True
        self._shows_batch = self.pictures > 0
        tensorboard = tensorboard_of(runner)
        if tensorboard is None:
            return
        if runner.cfg.get('resume'):
            tensorboard.resume(runner.iter, getattr(runner.train_loop, 'missed_validation', False))
        if report := getattr(runner, 'weights_report', ''):
            tensorboard.add_text(curves.WEIGHTS, report, runner.iter + 1)
        weights = runner.message_hub.runtime_info.get(INITIAL_WEIGHTS)
        hparams = curves.hparams_of(runner.cfg, runner.world_size, runner.seed, weights)
        *start, self._hparams_end = curves.hparam_summaries(hparams)
        self._hparams_run = curves.VAL if runner.val_loop else curves.TRAIN  # which has the metrics of the table
        tensorboard.add_summaries(self._hparams_run, *start)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        if self.lr:
            # Not the wrapper's own list, which ends with a group that only carries the base lr.
            for i, group in enumerate(runner.optim_wrapper.optimizer.param_groups):
                runner.message_hub.update_scalar(f'train/lr/{group.get("name", f"group{i}")}', group['lr'])
        tensorboard = tensorboard_of(runner) if self._shows_batch else None
        self._shows_batch = False
        if tensorboard is None:
            return

        def show(_module: nn.Module, _args: tuple, batch: dict) -> None:
            cfg = runner.cfg.model.get('data_preprocessor') or {}
            with extra(curves.TRAIN_BATCH):  # in the model's forward pass
                tensorboard.add_image(
                    curves.TRAIN_BATCH, batch_picture(batch, class_names(runner), cfg), runner.iter + 1
                )

        # As it leaves the preprocessor, which might draw random numbers a second time.
        model: Any = bare_model(runner)
        self._handle = model.data_preprocessor.register_forward_hook(show)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        wrapper, hub = runner.optim_wrapper, runner.message_hub
        norm = getattr(wrapper, 'grad_norm', None)
        clips = getattr(wrapper, 'clip_grad_kwargs', None) and wrapper.grad_name == 'grad_norm'  # MMEngine logs it
        if self.grad_norm and norm is not None and not clips:
            hub.update_scalar('train/grad_norm', norm)
        if 'eta' in hub.runtime_info:
            hub.update_scalar('train/eta_hours', hub.get_info('eta') / 3600)
        if outputs and (tensorboard := tensorboard_of(runner)):
            tensorboard.add_losses(outputs, runner.iter + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        self._picker = Picker(spread(len(runner.val_dataloader.sampler), self.pictures))

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: Sequence[DetDataSample] | None = None
    ) -> None:
        if tensorboard := tensorboard_of(runner):
            for name, sample in self._picker.pick(outputs):
                picture = truth_and_prediction(sample, class_names(runner), self.score_thr, _PAIR)
                # Asking the runner for its steps would build the training loop.
                step = runner.iter if self._training else 0
                tensorboard.add_image(f'{curves.VAL_IMAGES}/{name}', picture, step)

    def after_train(self, runner: Runner) -> None:
        self._training = False
        if (tensorboard := tensorboard_of(runner)) and self._hparams_end is not None:
            tensorboard.add_summaries(self._hparams_run, self._hparams_end)


def tensorboard_of(runner: Runner) -> TensorBoardBackend | None:
    """The run's TensorBoard; None if the config has none, and on all processes but the first."""
    return runner.visualizer.get_backend(TensorBoardBackend.__name__) if is_main_process() else None
