"""A trained model on any image: instances, and the proposals that they were chosen from."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfinetune.apis import run_weights
from mmfinetune.config import load, paths, views
from mmfinetune.data import coco_json
from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.text import near
from mmfinetune.weights import class_map, work_dir

if TYPE_CHECKING:
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.config import Config


@dataclass
class Prediction:
    """What a model finds in one image, best first.

    Attributes:
        boxes: (N, 4) float32 left, top, right, bottom in pixels of the image.
        scores: (N,) float32.
        labels: (N,) int64 positions in the list of classes.
        masks: (N, H, W) bool; None if the model has no masks.
        proposals: (P, 4) float32 boxes of the RPN, best first; None unless asked for.
        objectness: (P,) float32 scores of the proposals.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None
    proposals: np.ndarray | None = None
    objectness: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)


class Predictor:
    """A model ready to predict, with the config's own test pipeline.

    ``Predictor(config, checkpoint)(images)`` gives one :class:`Prediction` for each image; the
    same numbers as the Runner's test where no limit is given.

    Args:
        checkpoint: Weights of that architecture, in any of the forms that ``--weights`` takes.
        device: ``'cpu'``, ``'cuda'``, ``'cuda:1'``, or ``'auto'``: a GPU if there is one.
        score_thr: Lowest score; by default that of the config's ``test_cfg``.
        max_per_image: Most instances of an image; by default as many as the config says.
        classes: Names of the only classes to keep; by default all.
        proposals: How many of the RPN's proposals to return.

    Attributes:
        classes: Class names in the order of the labels.
        category_ids: Category id of each label: that of the run's annotation file if the file
            exists and has these classes, otherwise from 1 on.
        image_ids: Ids of the images in that file by their real paths; empty if it does not exist.

    Raises:
        UserError: The weights or their classes do not fit the config, an unknown class, a device
            that does not exist, or no RPN to take proposals from.
    """

    def __init__(
        self,
        config: Config | str | Path,
        checkpoint: str | Path,
        device: str = 'auto',
        *,
        score_thr: float | None = None,
        max_per_image: int | None = None,
        classes: Sequence[str] = (),
        proposals: int = 0,
    ) -> None:
        from mmcv.transforms import Compose
        from mmdet.registry import MODELS, TRANSFORMS
        from mmengine.model import revert_sync_batchnorm

        cfg = load.load(config) if isinstance(config, (str, Path)) else config
        self.device = choose_device(device)
        cfg = copy.deepcopy(cfg)  # limits are set in it, and mmdet's detectors write into it
        self.score_thr, self.max_per_image, self.proposals = score_thr, max_per_image, proposals
        paths.check_heads(cfg)
        # Before the model is built for good, for a message that tells all that does not fit.
        weights = run_weights.checkpoint_of(cfg, Path(checkpoint))
        self.classes = _common_classes(views.class_names(cfg), weights.source.classes, weights.source.path)
        self._kept = _labels_of(classes, self.classes)
        self.category_ids, self.image_ids = _known_ids(cfg, self.classes)
        _set_limits(cfg.model, score_thr, max_per_image)
        model = MODELS.build(cfg.model)
        if proposals and not hasattr(model, 'rpn_head'):
            raise UserError('model-no-rpn', model=cfg.model.type)
        weights.apply(model)
        self.model = revert_sync_batchnorm(model).to(self.device).eval()
        loader, steps = _pipeline(cfg)
        self._loader, self._steps = TRANSFORMS.build(loader), Compose(steps)

    def read(self, path: Path) -> np.ndarray:
        """An image as training reads it, (H, W, 3) RGB uint8.

        Raises:
            Problem: The image cannot be read.
        """
        try:
            image = self._loader({'img_path': str(path)})['img']
        except Exception as error:
            # Decoders and file backends raise whatever they like; some name the file at the end.
            why = error.facts.get('why', '') if isinstance(error, UserError) else str(error)
            reason = why.removesuffix(f': {path}') or type(error).__name__
            raise Problem('predict-image-unreadable', reason=reason) from None
        return np.ascontiguousarray(image[..., ::-1]).astype(np.uint8, copy=False)

    def prepare(self, image: np.ndarray) -> dict:
        """Make the model's input of an RGB uint8 image with the test pipeline.

        Raises:
            Problem: It has another form, or one that the pipeline cannot deal with.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise Problem('predict-not-rgb', shape=image.shape, dtype=image.dtype)
        try:
            return self._steps({'img': np.ascontiguousarray(image[..., ::-1]), 'img_id': 0})
        except Exception as error:
            # An image of one row, say, has none left when its long side is made smaller.
            reason, (height, width, _) = str(error).strip() or type(error).__name__, image.shape
            raise Problem('predict-pipeline', width=width, height=height, reason=reason) from None

    def forward(self, prepared: Sequence[dict]) -> list[Prediction]:
        """Run the model on a batch of what :meth:`prepare` returns."""
        import torch
        from mmengine.dataset import pseudo_collate

        with torch.no_grad(), self._recorded() as proposed:
            samples = self.model.test_step(pseudo_collate(prepared))
        return [self._prediction(sample, proposed[i] if proposed else None) for i, sample in enumerate(samples)]

    def __call__(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict on RGB uint8 images, as one batch."""
        return self.forward([self.prepare(image) for image in images]) if len(images) else []

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[list]:
        """Keep what the RPN passes to the heads in the same forward pass."""
        kept: list = []
        if not self.proposals:
            yield kept
            return
        predict = self.model.rpn_head.predict

        def keeping(*args: Any, **kwargs: Any) -> list:
            results = predict(*args, **kwargs)
            # Copies: the heads may rescale boxes in place.
            kept.extend((r.bboxes.clone(), r.scores.clone()) for r in results)
            return results

        self.model.rpn_head.predict = keeping
        try:
            yield kept
        finally:
            del self.model.rpn_head.predict

    def _prediction(self, sample: DetDataSample, proposed: tuple[torch.Tensor, torch.Tensor] | None) -> Prediction:
        import torch

        found = sample.pred_instances
        keep = torch.ones_like(found.scores, dtype=torch.bool)
        if self.score_thr is not None:
            keep &= found.scores >= self.score_thr
        if self._kept is not None:
            keep &= torch.isin(found.labels, found.labels.new_tensor(self._kept))
        order = torch.argsort(found.scores, descending=True, stable=True)
        found = found[order[keep[order]][: self.max_per_image]]
        masks = as_array(found.masks).astype(bool, copy=False) if 'masks' in found else None
        prediction = Prediction(as_array(found.bboxes), as_array(found.scores), as_array(found.labels), masks)
        if proposed is not None:
            height, width = sample.ori_shape[:2]
            boxes = proposed[0][: self.proposals].cpu().numpy()
            scale = np.tile(sample.metainfo.get('scale_factor', (1, 1)), 2)
            # The padding of a batch is not a part of the image.
            prediction.proposals = (boxes / scale).clip(0, (width, height, width, height)).astype(np.float32)
            prediction.objectness = as_array(proposed[1][: self.proposals])
        return prediction


def model_files(run: Path | None, config: Path | None, checkpoint: Path | None) -> work_dir.RunFiles:
    """Config and checkpoint of a run, see `work_dir.find_run`, or those that are named."""
    if run is not None:
        return work_dir.find_run(run, config, checkpoint)
    if config is None or checkpoint is None:
        raise UserError('model-not-named')
    return work_dir.RunFiles(checkpoint.parent, config, checkpoint)


def choose_device(name: str) -> str:
    """A device by its name, ``'auto'`` is a GPU if there is one; raise a UserError if there is no such device."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == 'auto':
        return 'cuda' if count else 'cpu'
    there = ['cpu', *(['cuda'] if count else []), *(f'cuda:{i}' for i in range(count))]
    if name not in there:
        raise UserError('device-missing', device=name, known=', '.join(there))
    return name


def _common_classes(ours: Sequence[str], theirs: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    """The class names of the config, or of the weights where it has none."""
    if not ours or not theirs:
        return tuple(ours or theirs or ())
    same = list(class_map.match_classes(ours, theirs).indices)
    if same != list(range(len(ours))):
        pairs = enumerate(zip(ours, theirs, same, strict=False))
        problems = [Message('predict-label', label=i, config=a, weights=b) for i, (a, b, k) in pairs if k != i]
        raise UserError('predict-other-classes', problems=problems, path=path)
    return tuple(ours)


def _labels_of(wanted: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    unknown = [name for name in wanted if name not in classes]
    problems = [Message('predict-class', name=name, suggestion=near(name, classes, ': ', 0.5)) for name in unknown]
    if problems:
        raise UserError('predict-classes', problems=problems, known=', '.join(classes))
    return sorted({classes.index(name) for name in wanted}) if wanted else None


def _test_dataset(cfg: Config) -> Any:
    """The config of the test data set without its wrappers."""
    dataset = views.innermost((cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get('dataset'))
    if dataset is None or not dataset.get('pipeline'):
        raise UserError('predict-no-pipeline')
    return dataset


def _known_ids(cfg: Config, classes: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Ids of the classes, and of images by path, in the annotation file of the test data."""
    dataset = _test_dataset(cfg)
    root = Path(dataset.get('data_root') or '')
    # The data may be gone by now; a prediction does not need them.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = coco_json.read(root / (dataset.get('ann_file') or ''), compact=True)
        ids = {c['name']: int(c['id']) for c in known.categories}
        folder = root / (dataset.get('data_prefix') or {}).get('img', '')
        image_ids = {os.path.realpath(folder / i['file_name']): int(i['id']) for i in known.images}
        return [ids[name] for name in classes], image_ids
    return list(range(1, len(classes) + 1)), {}


def _set_limits(model: Any, score_thr: float | None, max_per_image: int | None) -> None:
    """Let the second stage drop what would be dropped later, before it makes masks for it."""
    stage = (model.get('test_cfg') or {}).get('rcnn')
    if stage is None:
        return
    if score_thr is not None:
        # The stage takes what is above its threshold, here the threshold itself counts too.
        stage.score_thr = float(np.nextafter(np.float32(score_thr), np.float32(-1)))
    if max_per_image is not None:
        stage.max_per_img = max(max_per_image, stage.get('max_per_img', 0))


def _pipeline(cfg: Config) -> tuple[dict, list[dict]]:
    """The step of the test pipeline that reads a file, and all steps for an image in memory."""
    from mmfinetune.engine.transforms import from_memory

    pipeline = _test_dataset(cfg).pipeline
    names = [getattr(step['type'], '__name__', str(step['type'])).rpartition('.')[2] for step in pipeline]
    found = from_memory(pipeline)
    if not found or found[0].get('color_type', 'color').split('_')[0] != 'color':
        raise UserError('predict-pipeline-start', steps=', '.join(names))
    loader, steps = found
    truth = [name.startswith('Load') and 'Annotation' in name for name in names]
    return loader, [step for step, is_truth in zip(steps, truth, strict=True) if not is_truth]


def as_array(values: Any) -> np.ndarray:
    import torch

    values = getattr(values, 'tensor', values)
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
