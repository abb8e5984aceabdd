"""The config's ``weights``: get them, hold them against the model, report on each part."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.config import views
from mmfinetune.weights import find as weights_find
from mmfinetune.weights import transfer
from mmfinetune.weights.class_map import ClassMap
from mmfinetune.weights.find import find
from mmfinetune.weights.source import Source
from mmfinetune.weights.sources import read_source

if TYPE_CHECKING:
    import torch
    from mmengine.config import Config

_COLUMNS = ('tensors', 'parameters', 'loaded', 'remapped', 're-init', 'kept', 'missing', 'unexpected')


@dataclass
class WeightCheck:
    """A weights file held against a model.

    Attributes:
        path: The file.
        hash_verdict: What its name says of its content, as a phrase.
        source: What it holds.
        plan: What becomes of each tensor.
        class_map: Where each class comes from, if heads are remapped.
        target: The model's tensors.
        problems: Why it should not be trained on, one line each; empty if it may.
        into: Module of the model that the file is for; '' for all of it.
    """

    path: Path
    hash_verdict: str
    source: Source
    plan: transfer.TransferReport
    class_map: ClassMap | None
    target: Mapping[str, torch.Tensor]
    problems: list[str] = field(default_factory=list)
    into: str = ''

    def rows(self) -> list[dict]:
        """One dict a module: numbers of tensors by what becomes of them, and the largest |w|."""

        def module(key: str) -> str:
            parts = key.split('.')
            return '.'.join(parts[: 3 if parts[0] == 'roi_head' else 1])

        chosen = {
            'loaded': set(self.plan.loaded),
            'remapped': set(self.plan.remapped),
            're-init': set(self.plan.reinit),
            'kept': set(self.plan.kept),
            'missing': {*self.plan.missing, *self.plan.mismatched},
        }
        rows = []
        for name in dict.fromkeys(map(module, [*self.target, *self.plan.unexpected])):
            keys = [k for k in self.target if module(k) == name]
            strip = len(self.into) + 1 if self.into else 0
            values = [
                v for k in keys if (v := self.source.tensors.get(k[strip:])) is not None and v.is_floating_point()
            ]
            rows.append(
                {
                    'module': name,
                    'tensors': len(keys),
                    'parameters': sum(self.target[k].numel() for k in keys),
                    **{kind: sum(k in group for k in keys) for kind, group in chosen.items()},
                    'unexpected': sum(module(k) == name for k in self.plan.unexpected),
                    'max_abs': max((float(v.abs().max()) for v in values if v.numel()), default=math.nan),
                }
            )
        return rows

    def text(self) -> str:
        """The report for people."""
        source = self.source
        lines = [
            f'{self.path}: {self.path.stat().st_size / 1e6:.1f} MB, {len(source.tensors)} tensors, {self.hash_verdict}',
            f'origin: {source.kind}; style: {source.style or "not told"}; normalisation: {_statistics(source)}',
        ]
        lines += [f'note: {note}' for note in source.notes]
        lines.append(f'{"module":32}' + ''.join(f'{c:>11}' for c in _COLUMNS) + f'{"max |w|":>11}')
        for row in self.rows():
            lines.append(
                f'{row["module"]:32}' + ''.join(f'{row[c]:>11,}' for c in _COLUMNS) + f'{row["max_abs"]:>11.4g}'
            )
        if self.class_map is not None:
            lines += ['classes:', *(f'  {line}' for line in self.class_map.lines())]
        for label, keys in (
            ('drawn anew', self.plan.reinit),
            ('left over in the file', self.plan.dropped + self.plan.ignored),
            ('in the file, without a place in the model', self.plan.unexpected),
        ):
            if keys:
                lines.append(f'{label}: {", ".join(keys)}')
        return '\n'.join(lines)

    def as_dict(self) -> dict:
        """The report for machines."""
        plan, source = self.plan, self.source
        return {
            'path': str(self.path),
            'hash': self.hash_verdict,
            'origin': source.kind,
            'style': source.style,
            'mean': source.mean,
            'std': source.std,
            'rgb': source.rgb,
            'notes': source.notes,
            'modules': [
                {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
                for row in self.rows()
            ],
            'classes': None
            if self.class_map is None
            else {
                name: None if i is None else self.class_map.sources[i]
                for name, i in zip(self.class_map.targets, self.class_map.indices, strict=True)
            },
            'loaded': plan.loaded,
            'remapped': plan.remapped,
            'reinit': plan.reinit,
            'kept': plan.kept,
            'missing': plan.missing,
            'mismatched': plan.mismatched,
            'unexpected': plan.unexpected,
            'left_over': plan.dropped + plan.ignored,
            'problems': self.problems,
            'good_to_train': not self.problems,
        }

    def require_good(self) -> None:
        """Raise a UserError that lists why the weights should not be used, if anything does."""
        transfer.check_transfer(self.plan, self.path, self.problems)


def _statistics(source: Source) -> str:
    if source.mean is None:
        return 'not told'
    order = {True: 'RGB', False: 'BGR', None: 'order not told'}[source.rgb]
    return f'{order}, mean {_numbers(source.mean)}, std {_numbers(source.std or ())}'


def _numbers(values: Sequence[float]) -> str:
    return '(' + ', '.join(f'{v:g}' for v in values) + ')'


def check(cfg: Config, path: Path | None = None, recipe: Mapping | None = None) -> WeightCheck:
    """Hold a weights file against the config's model.

    Args:
        cfg: Resolved config.
        path: The file; the config's own by default.
        recipe: What to do with it; the config's ``weights`` by default, {} to load all of it.

    Raises:
        UserError: The file cannot be had or read, or the recipe is wrong.
    """
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    if path is None:
        path = find(cfg)
    recipe = dict(cfg.weights if recipe is None else recipe)
    verdict = weights_find.verify_file(path)
    source = read_source(path, any_model=True)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    # A copy, since mmdet's detectors write into the config they are built from.
    target = MODELS.build(copy.deepcopy(cfg.model)).state_dict()
    plan, class_map = transfer.plan(target, source, recipe, views.class_names(cfg))
    problems = plan.problems + _input_problems(cfg, source)
    if plan.problems and source.kind == 'other':
        # What the file seems to be explains all the others.
        problems.insert(0, source.notes[0])
    return WeightCheck(path, verdict, source, plan, class_map, target, problems, recipe.get('into') or '')


def _input_problems(cfg: Config, source: Source) -> list[str]:
    """Style and normalisation, which shapes do not show."""
    problems = []
    style = cfg.model.get('backbone', {}).get('style', 'pytorch')
    if source.style and source.style != style:
        problems.append(
            f'the weights are {source.style}-style, model.backbone.style is {style}: '
            f'the strides lie in other layers; set model.backbone.style={source.style}'
        )
    ours = cfg.model.get('data_preprocessor') or {}
    if source.rgb is not None and bool(ours.get('bgr_to_rgb')) != source.rgb:
        problems.append(
            f'the weights want {"RGB" if source.rgb else "BGR"} images, '
            f'model.data_preprocessor.bgr_to_rgb is {ours.get("bgr_to_rgb")}; set it '
            f'to {source.rgb}'
        )
    for name in ('mean', 'std'):
        theirs = getattr(source, name)
        if theirs is not None and not all(
            math.isclose(a, b, abs_tol=0.02) for a, b in zip(theirs, ours.get(name) or (), strict=False)
        ):
            problems.append(
                f'the weights want {name} {_numbers(theirs)}, '
                f'model.data_preprocessor.{name} is {ours.get(name)}; set it to theirs'
            )
    return problems
