"""MMEngine's Runner: its weights compared before it is built, and all that it runs built before its first step."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmdet.models import BaseDetector
from mmdet.registry import RUNNERS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.dist import broadcast_object_list
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from torch.utils.data import DataLoader

from mmfinetune.config import schedule
from mmfinetune.config.resolve import set_rehearsal
from mmfinetune.engine import compat
from mmfinetune.engine.hooks import EXTRAS
from mmfinetune.engine.loader import watched
from mmfinetune.engine.training_dataset import random_state_kept
from mmfinetune.utils import console
from mmfinetune.utils.building import building
from mmfinetune.utils.dist import bare_model
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.extras import extra
from mmfinetune.weights.check import WeightCheck

# Where the message hub, and with it each checkpoint, keeps the facts on the weights of the start.
INITIAL_WEIGHTS = 'initial_weights'
_VISUALIZERS = itertools.count()
# What MMEngine's methods build, as settings of the config.
_PARTS = {
    '__init__': 'the run',  # what is built within it is named by the others
    'setup_env': 'env_cfg',
    'set_randomness': 'randomness',
    'build_log_processor': 'log_processor',
    'build_visualizer': 'visualizer',
    'build_model': 'model',
    'wrap_model': 'model_wrapper_cfg',
    'register_default_hooks': 'default_hooks',
    'register_custom_hooks': 'custom_hooks',
    'build_optim_wrapper': 'optim_wrapper',
    'build_param_scheduler': 'param_scheduler',
    'build_train_loop': 'train_dataloader or train_cfg',
    'build_val_loop': 'val_dataloader, val_evaluator or val_cfg',
    'build_test_loop': 'test_dataloader, test_evaluator or test_cfg',
}


def _named(part: str, build: Callable) -> Callable:
    @functools.wraps(build)
    def named(*args: Any, **kwargs: Any) -> Any:
        with building(part):
            return build(*args, **kwargs)

    return named


@RUNNERS.register_module()
class FineTuningRunner(Runner):
    """A Runner whose model starts from given weights where no checkpoint is resumed or loaded.

    Not by ``init_cfg``, since children's ``init_weights`` run after their parent's and would
    overwrite it, and not by ``load_from``, which only warns of tensors that do not fit.

    Attributes:
        start: The weights to start from; None once the model has them, or for none.
        weights_report: What ``--check-weights`` prints of them; empty until the model has them.
            File, SHA-256 and counts are in the message hub, under `INITIAL_WEIGHTS`.
        new_schedule: Whether a resumed run takes the config's learning rates and schedule, and not the checkpoint's.
        group_settings: The settings of each param group before any schedule; of a runner that is built.
    """

    start: WeightCheck | None = None
    weights_report = ''
    new_schedule = False
    _has_stepped = False
    optim_wrapper: Any
    param_schedulers: Any
    group_settings: Sequence[dict[str, Any]] = ()

    def build(self) -> None:
        """Build all that `train` and `test` would build on their way.

        Raises:
            UserError: Something cannot be built; all of it is named.
        """
        problems: list[Message] = []
        for build in (self._build_train_loop, self._build_updates, lambda: self.val_loop, lambda: self.test_loop):
            try:
                build()
            except UserError as error:
                if error.code != 'config-cannot-build':
                    raise
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise UserError('config-cannot-build', problems=problems)

    def try_out(self) -> None:
        """Let a sample of each loader through its pipeline, and a small batch through training and prediction.

        The model is not the same afterwards.

        Raises:
            UserError: Something fails by what the config sets; all of it is named.
        """
        problems: list[Message] = []
        for name, loop in (('train', self.train_loop), ('val', self.val_loop), ('test', self.test_loop)):
            if loop is None:
                continue
            try:
                with building(f'{name}_dataloader.dataset.pipeline'), random_state_kept():
                    dataset = getattr(loop, 'data', loop.dataloader).dataset
                    self.model.data_preprocessor(loop.dataloader.collate_fn([dataset[0]]), name == 'train')
                if not isinstance(bare_model(self), BaseDetector):
                    continue  # of other models it is not known what they take
                small = demo_mm_inputs(2, [(3, 256, 320)] * 2, num_items=[1, 1], num_classes=2, with_mask=True)
                for sample in small['data_samples']:
                    sample.gt_instances.labels.zero_()  # every model has this class
                with building(f'a step of {name}_dataloader'), random_state_kept():
                    if name == 'train':
                        self.model.train()
                        self.model.train_step(small, self.optim_wrapper)
                    else:
                        with torch.no_grad():
                            found = self.model.eval().val_step(small)
                        self._try_evaluator(f'{name}_evaluator', loop.evaluator, found)
            except UserError as error:
                if error.code == 'config-cannot-build':
                    problems += [p for p in error.problems if isinstance(p, Message)]
                elif error.code != 'image-unreadable-in-training':  # that is for the check of the data
                    raise
        if problems:
            raise UserError('config-cannot-build', problems=problems)

    @staticmethod
    def _try_evaluator(place: str, evaluator: Evaluator, found: Sequence[BaseDataElement]) -> None:
        """Let the metrics take predictions, e.g. masks which a model may not have."""
        with building(place):
            evaluator.process(found)
        for metric in evaluator.metrics:
            metric.results.clear()

    def _build_train_loop(self) -> None:
        try:
            self.train_loop  # noqa: B018
        except UserError as error:
            if error.__cause__ is not None and compat.is_empty_dataset(error.__cause__):
                raise UserError('train-no-steps', samples=0, batch=self.cfg.train_dataloader.batch_size) from None
            raise

    def _build_updates(self) -> None:
        if self.optim_wrapper is None:
            return
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        # The last of the wrapper's only carries the base rate.
        groups = self.optim_wrapper.param_groups
        self.group_settings = [{k: v for k, v in group.items() if k != 'params'} for group in groups]
        if self.param_schedulers is not None:
            self.param_schedulers = self.build_param_scheduler(self.param_schedulers)

    def build_visualizer(self, visualizer: Visualizer | dict | None = None) -> Visualizer:
        """Build the visualizer of this run: MMEngine finds one of the same name again, with the files of its run."""
        if isinstance(visualizer, dict):
            visualizer = {**visualizer, 'name': f'{self.experiment_name}_{next(_VISUALIZERS)}'}
        return super().build_visualizer(visualizer)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """As MMEngine builds it; on the console of a tool it shows little."""
        logger = super().build_logger(*args, **kwargs)
        console.adopt(logger)
        return logger

    def register_default_hooks(self, hooks: dict[str, Any] | None = None) -> None:
        """MMEngine's and, whatever the config, what shows the run on the console."""
        hooks = {'console': {'type': 'ConsoleHook'}, **(hooks or {})}
        super().register_default_hooks({name: hook for name, hook in hooks.items() if hook or name != 'console'})

    def dump_config(self) -> None:
        """Not while building, nor for a test alone: see `train`."""

    def train(self) -> torch.nn.Module:
        """Train; the work dir gets the config of what trains in it.

        Raises:
            UserError: The first step fails, by what the config sets.
        """
        super().dump_config()
        try:
            return super().train()
        except Exception as error:
            if self._has_stepped or compat.is_out_of_cpu_memory(error):
                raise
            with building('the first training step'):
                raise

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume a checkpoint; with `new_schedule` the schedule is replayed up to its step."""
        try:
            super().resume(filename, *args, **kwargs)
        except (KeyError, ValueError) as error:
            # PyTorch's, of other param groups.
            raise UserError('resume-other-optimizer', problems=[error], path=filename) from error
        if not self.new_schedule:
            return
        for group, settings in zip(self.optim_wrapper.param_groups, self.group_settings, strict=True):
            for key in [key for key in group if key.startswith('initial_')]:
                del group[key]
            group.update(settings)
        if self.param_schedulers is not None:
            self.param_schedulers = self.build_param_scheduler(self.cfg.param_scheduler)
        schedule.replay(self)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; where one of `EXTRAS` fails, warn. In `before_run` they are still built."""
        for hook in filter(lambda hook: hasattr(hook, fn_name), self.hooks):
            names = {cls.__name__ for cls in type(hook).__mro__}
            with contextlib.ExitStack() as stack:
                if fn_name == 'before_run':
                    stack.enter_context(building('default_hooks or custom_hooks'))
                if names & EXTRAS:
                    stack.enter_context(extra(f'{type(hook).__name__}.{fn_name}'))
                getattr(hook, fn_name)(self, **kwargs)
        self._has_stepped |= fn_name == 'after_train_iter'

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


for _name, _part in _PARTS.items():
    setattr(FineTuningRunner, _name, _named(_part, getattr(FineTuningRunner, _name)))


def rehearse(cfg: Config, world: int) -> schedule.Course:
    """Build all that a run would build, in one process and without writing into its folders.

    Args:
        cfg: Resolved config.
        world: Number of processes of the run.

    Raises:
        UserError: Something cannot be built.
    """
    cfg, visualizer = copy.deepcopy(cfg), cfg.get('visualizer')
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        set_rehearsal(cfg, folder, world)
        runner = FineTuningRunner.from_cfg(cfg)
        # Its backends open no file and no connection before the first record.
        runner.build_visualizer(visualizer)
        runner.build()
        runner.call_hook('before_run')
        course = schedule.course_of(runner, world)
        runner.try_out()
        return course
