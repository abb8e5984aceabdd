"""Weights of a file into a model: every tensor of both sides accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import UserError
from mmfinetune.weights.class_map import HEAD_INITS, ClassMap, match_classes
from mmfinetune.weights.source import Source
from mmfinetune.weights.sources import read_source

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class TransferReport:
    """Where each tensor of the model comes from, and what becomes of each in the file.

    Attributes:
        loaded: Model keys taken from the file.
        reinit: Model keys drawn anew.
        remapped: Model keys whose rows come from the rows of other classes, the rest drawn anew.
        kept: Model keys outside the part that the file is for; they keep the model's own start.
        dropped: File keys whose place was re-initialised.
        ignored: File keys that the config says to leave.
        missing: Model keys that the file should have and has not.
        mismatched: Model keys that have another shape in the file.
        unexpected: File keys that have no place in the model.
        problems: One line for each of these three kinds, and for a wrong recipe.
    """

    loaded: list[str] = field(default_factory=list)
    reinit: list[str] = field(default_factory=list)
    remapped: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == p or key.startswith(p if p.endswith('.') else p + '.') for p in prefixes)


def plan_transfer(
    target: Mapping[str, torch.Tensor],
    source: Mapping[str, torch.Tensor],
    reinit: Sequence[str] = (),
    into: str = '',
    ignore: Sequence[str] = (),
    class_map: ClassMap | None = None,
) -> TransferReport:
    """Decide for every tensor on both sides what happens to it.

    Args:
        target: The model's state dict.
        source: The file's tensors.
        reinit: Module prefixes of the model to draw anew.
        into: Module of the model that the file's keys belong under; '' for the whole model.
        ignore: Prefixes of file keys that may be left over.
        class_map: Take the rows of the modules in ``reinit`` over from these classes.

    Returns:
        The plan; training must not start while it has ``problems``.
    """
    report = TransferReport()
    mapped = {(f'{into}.{k}' if into else k): k for k in source}
    for prefix in reinit:
        if not any(_under(k, [prefix]) for k in target):
            report.problems.append(f'weights.reinit names {prefix}, which the model does not have')
    for key, tensor in target.items():
        if _under(key, reinit) and class_map is None:
            report.reinit.append(key)
        elif _under(key, reinit):
            problem = _remap_problem(key, tensor, source.get(mapped.get(key, '')), class_map)
            if problem:
                report.mismatched.append(key)
                report.problems.append(problem)
            else:
                report.remapped.append(key)
        elif key in mapped:
            ours, theirs = tuple(tensor.shape), tuple(source[mapped[key]].shape)
            if ours == theirs:
                report.loaded.append(key)
            else:
                report.mismatched.append(key)
                report.problems.append(f'{key}: the model has {ours}, the file {theirs}')
        elif (into and not _under(key, [into])) or key.endswith('num_batches_tracked'):
            # PyTorch counts batches in BN only since 0.4.1, and frozen BN never uses the count.
            report.kept.append(key)
        else:
            report.missing.append(key)
            report.problems.append(f'{key}: not in the file')
    for key, original in mapped.items():
        if key in report.remapped:
            continue
        if _under(key, reinit):
            report.dropped.append(original)
        elif key not in target:
            if _under(original, ignore):
                report.ignored.append(original)
            else:
                report.unexpected.append(original)
                report.problems.append(f'{original}: in the file, but the model has no such tensor')
    return report


def _remap_problem(key: str, ours: torch.Tensor, theirs: torch.Tensor | None, class_map: ClassMap) -> str | None:
    if theirs is None:
        return f'{key}: not in the file, so there are no rows to take over'
    if ours.shape[1:] != theirs.shape[1:]:
        return f'{key}: the model has {tuple(ours.shape)}, the file {tuple(theirs.shape)}'
    try:
        class_map.rows(len(ours), len(theirs))
    except ValueError as error:
        return f'{key}: {error}'
    return None


CURE = (
    'use weights of the same architecture (for these configs mask_rcnn_r50_fpn), set '
    'num_classes of bbox_head and mask_head to that of the weights, or name the heads to draw '
    'anew in `weights.reinit`'
)


def check_transfer(report: TransferReport, path: Path, problems: Sequence[str] | None = None) -> None:
    """Raise a UserError that lists all problems, if there are any.

    Args:
        report: A plan.
        path: The file it is for.
        problems: More than the plan knows of; by default the plan's own.
    """
    problems = report.problems if problems is None else problems
    if problems:
        raise UserError(
            f'{path} does not fit the model ({len(report.loaded)} tensors fit, {len(problems)} problems):',
            problems,
            CURE,
        )


def transfer(
    model: nn.Module,
    path: Path,
    reinit: Mapping[str, Mapping[str, float]] | None = None,
    into: str = '',
    ignore: Sequence[str] = (),
    head_init: str = 'reinit',
    aliases: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> TransferReport:
    """Load a file into a model and draw the named modules anew.

    Weights of a module in ``reinit`` come from N(0, std), biases are 0; with ``head_init`` of
    ``'remap'`` the rows of classes that the weights know are then taken over, background too.
    The draw has its own generator on the CPU, so that all ranks and devices get the same numbers.

    Args:
        model: Changed in place, and only if everything fits.
        path: A verified file.
        reinit: ``{module prefix: {'std': float}}``.
        into: See :func:`plan_transfer`.
        ignore: See :func:`plan_transfer`.
        head_init: ``'reinit'`` or ``'remap'``.
        aliases: See :func:`mmfinetune.weights.class_map.match_classes`.
        classes: Classes of the data in label order; needed to remap.
        seed: Of the generator.

    Returns:
        What was done.

    Raises:
        UserError: A key or shape does not fit.
    """
    import torch

    source = read_source(path, any_model=True)
    target = model.state_dict()
    recipe = {'reinit': dict(reinit or {}), 'into': into, 'ignore': ignore, 'head_init': head_init, 'aliases': aliases}
    report, class_map = plan(target, source, recipe, classes)
    check_transfer(report, path)
    strip = len(into) + 1 if into else 0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key in report.loaded:
            target[key].copy_(source.tensors[key[strip:]])
        # In the model's order, so that remapping draws the same numbers as re-initialising.
        drawn = {*report.reinit, *report.remapped}
        for key in filter(drawn.__contains__, target):
            if key.endswith('bias'):
                target[key].zero_()
            else:
                module = max((k for k in recipe['reinit'] if _under(key, [k])), key=len)
                target[key].copy_(
                    torch.normal(0.0, float(recipe['reinit'][module]['std']), target[key].shape, generator=generator)
                )
        for key in report.remapped:
            rows = source.tensors[key[strip:]]
            ours, theirs = zip(*class_map.rows(len(target[key]), len(rows)), strict=True)
            target[key][list(ours)] = rows[list(theirs)].to(target[key])
    return report


def plan(
    target: Mapping[str, torch.Tensor], source: Source, recipe: Mapping, classes: Sequence[str] = ()
) -> tuple[TransferReport, ClassMap | None]:
    """Plan a transfer by the config's ``weights``.

    Args:
        target: The model's state dict.
        source: What the file holds.
        recipe: ``weights`` of the config.
        classes: Classes of the data in label order.

    Returns:
        The plan, and with ``head_init='remap'`` where each class comes from.

    Raises:
        UserError: The recipe itself is wrong.
    """
    reinit = recipe.get('reinit') or {}
    wrong = [f'weights.reinit.{k} = {v}' for k, v in reinit.items() if not isinstance(v, Mapping) or set(v) != {'std'}]
    if wrong:
        raise UserError(
            'These modules do not say how to be drawn anew:',
            wrong,
            "give each dict(std=…), e.g. 'roi_head.bbox_head.fc_cls': dict(std=0.01)",
        )
    head_init = recipe.get('head_init') or 'reinit'
    if head_init not in HEAD_INITS:
        raise UserError(f'weights.head_init is {head_init!r}', cure=f'set it to one of {", ".join(HEAD_INITS)}')
    class_map = None
    if head_init == 'remap':
        if not source.classes or not classes:
            whose = 'the data' if source.classes else f'the weights {source.path}'
            raise UserError(
                f'Heads cannot be remapped: the classes of {whose} are not known',
                cure="set metainfo.classes of the data, or head_init='reinit'",
            )
        class_map = match_classes(classes, source.classes, recipe.get('aliases'))
    return plan_transfer(
        target, source.tensors, list(reinit), recipe.get('into') or '', recipe.get('ignore') or (), class_map
    ), class_map
