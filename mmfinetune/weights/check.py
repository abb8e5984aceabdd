"""A weights file compared with a model: the plan, style and normalisation, as a report."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmfinetune.utils.building import building
from mmfinetune.utils.console import wrapped
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.text import table
from mmfinetune.weights import transfer
from mmfinetune.weights.source import Source, numbers

if TYPE_CHECKING:
    import torch
    from torch import nn

_FATES = (transfer.LOADED, transfer.REMAPPED, transfer.REINIT, transfer.UNTOUCHED, transfer.MISSING)
# The columns of the report that they count in.
_COLUMNS = {**{fate: fate for fate in _FATES}, transfer.REINIT: 're-init', transfer.MISMATCHED: 'missing'}


@dataclass
class WeightCheck:
    """A weights file compared with a model.

    Attributes:
        source: What the file holds.
        plan: What becomes of each tensor.
        target: The model's tensors.
        problems: Why it should not be trained on; empty if it may.
    """

    source: Source
    plan: transfer.Plan
    target: Mapping[str, torch.Tensor]
    problems: list[Message]

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each module: how many tensors have which fate, and the largest |w| in the file."""
        rows: dict[str, dict[str, Any]] = {}

        def row_of(key: str) -> dict[str, Any]:
            parts = key.split('.')
            name = '.'.join(parts[: 3 if parts[0] == 'roi_head' else 1])
            counts = dict.fromkeys(('tensors', 'parameters', *_COLUMNS.values(), 'unexpected'), 0)
            return rows.setdefault(name, {'module': name, **counts, 'max_abs': math.nan})

        for key, tensor in self.target.items():
            row = row_of(key)
            row['tensors'] += 1
            row['parameters'] += tensor.numel()
            row[_COLUMNS[self.plan.fates[key]]] += 1
            theirs = self.source.tensors.get(self.plan.source_key(key))
            if theirs is not None and theirs.is_floating_point() and theirs.numel():
                # In this order max() drops the NaN of a row without any.
                row['max_abs'] = max(float(theirs.abs().max()), row['max_abs'])
        for key in self.plan.unexpected:
            row_of(key)['unexpected'] += 1
        return list(rows.values())

    def summary(self) -> str:
        """A sentence: how many tensors have which fate."""
        plan, counts = self.plan, self.facts()
        modules = dict.fromkeys(key.rpartition('.')[0] for key in plan.keys(transfer.REINIT))
        others = {
            'remapped': counts['remapped'],
            'untouched': counts['untouched'],
            'unused': len(plan.dropped) + len(plan.ignored),
            f're-initialized ({", ".join(modules)})': counts['reinit'],
        }
        more = ''.join(f', {count} {what}' for what, count in others.items() if count)
        return wrapped(f'Weights: {self.source.path}: {counts["loaded"]} tensors loaded{more}', ' ' * 9)

    def facts(self) -> dict[str, Any]:
        """What the records of a run keep: file, SHA-256, and the number of tensors by fate."""
        counts = {fate: len(self.plan.keys(fate)) for fate in _FATES}
        return {'file': str(self.source.path), 'sha256': self.source.sha256, **counts}

    def text(self) -> str:
        """The report for people."""
        source, plan = self.source, self.plan
        lines = source.lines()
        rows = [{**row, 'max_abs': f'{row["max_abs"]:.4g}'} for row in self.rows()]
        # A line of all columns is too long for a terminal.
        zero = [name for name in rows[0] if not any(row[name] for row in rows)]
        columns = [name for name in rows[0] if name not in zero]
        lines.append(table([columns, *([row[name] for name in columns] for row in rows)]))
        lines += [f'all 0: {", ".join(zero)}'] * bool(zero)
        if plan.class_map is not None:
            lines += ['classes:', *(f'  {line}' for line in plan.class_map.lines())]
        labels: dict[tuple[str, ...], list[str]] = {}
        for label, keys in (
            ('re-initialized', plan.keys(transfer.REINIT)),
            ('unused tensors in the file', plan.dropped + plan.ignored),
            ('in the file, without a place in the model', plan.unexpected),
        ):
            if keys:
                labels.setdefault(tuple(_grouped(keys)), []).append(label)
        lines += [wrapped(f'{", ".join(label)}: {", ".join(names)}') for names, label in labels.items()]
        return '\n'.join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report for machines."""
        plan, source = self.plan, self.source
        return {
            'path': str(source.path),
            'sha256': source.sha256,
            'hash': source.hash_verdict,
            **{name: getattr(source, name) for name in ('origin', 'style', 'mean', 'std', 'rgb')},
            'notes': list(map(str, source.notes)),
            'modules': [
                {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
                for row in self.rows()
            ],
            'classes': None if plan.class_map is None else plan.class_map.as_dict(),
            **{fate: plan.keys(fate) for fate in _COLUMNS},
            'unexpected': plan.unexpected,
            'unused': plan.dropped + plan.ignored,
            'problems': list(map(str, self.problems)),
            'good_to_train': not self.problems,
        }

    def require_good(self) -> None:
        """Raise a UserError that lists why the weights should not be used, if anything does."""
        if self.problems:
            raise UserError(
                'weights-do-not-fit',
                problems=self.problems,
                path=self.source.path,
                fitting=len(self.plan.keys(transfer.LOADED)),
                count=len(self.problems),
            )

    def apply(self, model: nn.Module, seed: int = 0) -> None:
        """Give a model its initial state, see :func:`transfer.initial_state`; its parameters stay the same objects."""
        import torch

        target = model.state_dict()
        with torch.no_grad():
            for key, tensor in transfer.initial_state(self.plan, target, self.source, seed).items():
                target[key].copy_(tensor)


def _grouped(keys: Sequence[str]) -> list[str]:
    """Names of tensors, those of one module as ``module.{weight,bias}``."""
    modules: dict[str, list[str]] = {}
    for key in keys:
        module, _, name = key.rpartition('.')
        modules.setdefault(module, []).append(name)
    return [f'{m}.{{{",".join(names)}}}' if len(names) > 1 else f'{m}.{names[0]}' for m, names in modules.items()]


def compare(model_cfg: Mapping, source: Source, weights_cfg: Mapping, classes: Sequence[str] = ()) -> WeightCheck:
    """Compare a weights file with a config's model.

    Args:
        model_cfg: ``model`` of a resolved config; MMEngine's default scope must be set.
        source: What the file holds.
        weights_cfg: ``weights`` of the config; {} to load the whole model.
        classes: Classes of the data in label order.

    Raises:
        UserError: ``weights`` itself is wrong.
    """
    from mmdet.registry import MODELS

    with building('model'):
        # A copy, since mmdet's detectors write into the config they are built from.
        model = MODELS.build(copy.deepcopy(model_cfg))
    target = model.state_dict()
    plan = transfer.plan_transfer(target, source, weights_cfg, classes, dict(model.named_buffers()))
    if plan.kept and classes and not source.classes:
        source.note('weights-kept-unnamed', count=len(classes))
    problems = plan.problems + _input_problems(model_cfg, source)
    if plan.problems and source.origin == 'other':
        # What the file seems to be explains all the others.
        problems.insert(0, source.notes[0])
    return WeightCheck(source, plan, target, problems)


def _input_problems(model_cfg: Mapping, source: Source) -> list[Message]:
    """Style and normalisation, which shapes do not show."""
    problems = []
    style = (model_cfg.get('backbone') or {}).get('style', 'pytorch')
    if source.style and source.style != style:
        problems.append(Message('weights-style', file=source.style, model=style))
    ours = model_cfg.get('data_preprocessor') or {}
    if source.rgb is not None and bool(ours.get('bgr_to_rgb')) != source.rgb:
        order = 'RGB' if source.rgb else 'BGR'
        problems.append(Message('weights-channels', order=order, model=ours.get('bgr_to_rgb'), file=source.rgb))
    for name, theirs in (('mean', source.mean), ('std', source.std)):
        pairs = zip(theirs or (), ours.get(name) or (), strict=False)
        if theirs is not None and not all(math.isclose(a, b, abs_tol=0.02) for a, b in pairs):
            problems.append(Message('weights-statistics', name=name, file=numbers(theirs), model=ours.get(name)))
    return problems
