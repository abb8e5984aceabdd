"""Weights of a file into a model: the fate of every tensor on both sides, decided before anything changes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.text import is_number
from mmfinetune.weights.class_map import AUTO, HEAD_INITS, KEEP, REMAP, ClassMap, match_classes

if TYPE_CHECKING:
    import torch

    from mmfinetune.weights.source import Source

LOADED, REMAPPED, REINIT, UNTOUCHED = 'loaded', 'remapped', 'reinit', 'untouched'
MISSING, MISMATCHED = 'missing', 'mismatched'


@dataclass
class Plan:
    """What becomes of each tensor of a model and of a weights file.

    Attributes:
        into: Module of the model that the file is for; '' for all of it.
        class_map: Which class each class comes from, if heads are remapped.
        fates: For each tensor of the model, in its order: 'loaded' from the file; 're-init'ialized
            ('reinit'); 'remapped': rows of known classes loaded, the others re-initialized;
            'untouched': outside the part that the file is for, or a count that files may lack;
            'missing' in the file; 'mismatched': of another shape in the file.
        kept: Whether the heads are loaded as they are: row k is class k of the data.
        stds: Standard deviation for each weight that is drawn.
        dropped: File keys whose place in the model is re-initialized.
        ignored: File keys that the config says to ignore.
        unexpected: File keys that have no place in the model.
        problems: Why training must not start; empty if it may.
    """

    into: str = ''
    class_map: ClassMap | None = None
    kept: bool = False
    fates: dict[str, str] = field(default_factory=dict)
    stds: dict[str, float] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[Message] = field(default_factory=list)

    def keys(self, fate: str) -> list[str]:
        """The model's tensors with a fate."""
        return [key for key, own in self.fates.items() if own == fate]

    def source_key(self, key: str) -> str:
        """The name in the file of a tensor of the model."""
        return key[len(self.into) + 1 :] if self.into else key


def plan_transfer(
    target: Mapping[str, torch.Tensor],
    source: Source,
    weights_cfg: Mapping,
    classes: Sequence[str] = (),
    buffers: Collection[str] = (),
) -> Plan:
    """Decide for every tensor on both sides what happens to it.

    Args:
        target: The model's state dict.
        source: What the file holds.
        weights_cfg: ``weights`` of the config: ``reinit`` (``{module: {'std': float}}``), ``into``
            (module that the file's keys belong under), ``ignore`` (prefixes of file keys that may
            remain unused), ``head_init`` and ``aliases``. {} to load the whole model.
        classes: Classes of the data in label order; needed to remap and compared with those of heads that are kept.
        buffers: The model's tensors that are not parameters.

    Raises:
        UserError: ``weights`` itself is wrong. What does not fit is in the plan's ``problems``.
    """
    stds = _stds(weights_cfg.get('reinit') or {})
    plan = Plan(weights_cfg.get('into') or '', _class_map(source, weights_cfg, classes))
    unknown = [module for module in stds if not any(_is_under(key, module) for key in target)]
    plan.problems += [Message('weights-reinit-unknown', module=module) for module in unknown]
    head_init = weights_cfg.get('head_init')
    if head_init in (KEEP, AUTO):
        others = _other_labels(source, weights_cfg, classes)
        plan.kept = head_init == KEEP or (not others and _heads_fit(plan, target, source, stds))
        plan.problems += others if plan.kept else []
        stds = {} if plan.kept else stds
    drawn = {key: module for key in target if (module := _innermost(key, stds)) is not None}
    plan.stds = {
        key: stds[module]
        for key, module in drawn.items()
        if target[key].dim() >= 2
        and target[key].is_floating_point()
        and not key.endswith('bias')
        and key not in buffers
    }
    for key, tensor in target.items():
        theirs = source.tensors.get(plan.source_key(key)) if _is_under(key, plan.into) else None
        plan.fates[key], problem = _fate_of(plan, key, tensor, theirs, key in drawn)
        if problem is not None:
            plan.problems.append(problem)
    ignore = weights_cfg.get('ignore') or ()
    for original in source.tensors:
        key = f'{plan.into}.{original}' if plan.into else original
        fate = plan.fates.get(key)
        if _innermost(key, stds) is not None:
            if fate != REMAPPED:
                plan.dropped.append(original)
        elif fate is None and _innermost(original, ignore) is not None:
            plan.ignored.append(original)
        elif fate is None:
            plan.unexpected.append(original)
            plan.problems.append(Message('weights-key-unexpected', key=original))
    return plan


def _other_labels(source: Source, weights_cfg: Mapping, classes: Sequence[str]) -> list[Message]:
    """The labels that mean another class in the file than in the data, as far as both have names."""
    # Where a person says so, 80 classes without names are those of the data, not COCO's.
    assumed = weights_cfg['head_init'] == KEEP and any(note.code == 'weights-coco-assumed' for note in source.notes)
    if not source.classes or not classes or assumed:
        return []
    found = match_classes(classes, source.classes, weights_cfg.get('aliases')).indices
    theirs = [*source.classes, *([None] * len(classes))]
    return [
        Message('weights-label', label=label, data=ours, file=theirs[label] or 'none')
        for label, (ours, row) in enumerate(zip(classes, found, strict=True))
        if row != label
    ]


def _heads_fit(plan: Plan, target: Mapping[str, torch.Tensor], source: Source, modules: Iterable[str]) -> bool:
    """Whether the file has all tensors of these modules, in the model's shapes."""
    found = ((ours, source.tensors.get(plan.source_key(k))) for k, ours in target.items() if _innermost(k, modules))
    return all(theirs is not None and theirs.shape == ours.shape for ours, theirs in found)


def _fate_of(
    plan: Plan, key: str, ours: torch.Tensor, theirs: torch.Tensor | None, reinit: bool
) -> tuple[str, Message | None]:
    """The fate of a tensor of the model, and what is wrong with it."""
    if reinit:
        # Normalisation and buffers have no rows by class: they start as the model's own do.
        if plan.class_map is None or not _of_drawn_layer(plan, key):
            return REINIT, None
        problem = _remap_problem(key, ours, theirs, plan.class_map)
        return (MISMATCHED, problem) if problem else (REMAPPED, None)
    if theirs is not None:
        return (LOADED, None) if ours.shape == theirs.shape else (MISMATCHED, _shape_problem(key, ours, theirs))
    # PyTorch counts batches in BN only since 0.4.1, and frozen BN never uses the count.
    if not _is_under(key, plan.into) or key.endswith('num_batches_tracked'):
        return UNTOUCHED, None
    return MISSING, Message('weights-key-missing', key=key)


def _of_drawn_layer(plan: Plan, key: str) -> bool:
    """Whether a tensor is a weight that is drawn or the bias of one, not of a normalisation, nor a buffer."""
    return key in plan.stds or (key.endswith('bias') and f'{key.removesuffix("bias")}weight' in plan.stds)


def _shape_problem(key: str, ours: torch.Tensor, theirs: torch.Tensor) -> Message:
    return Message('weights-shape', key=key, model=tuple(ours.shape), file=tuple(theirs.shape))


def _remap_problem(key: str, ours: torch.Tensor, theirs: torch.Tensor | None, class_map: ClassMap) -> Message | None:
    if theirs is None:
        return Message('weights-rows-missing', key=key)
    if ours.shape[1:] != theirs.shape[1:]:
        return _shape_problem(key, ours, theirs)
    if class_map.rows(len(ours), len(theirs)) is not None:
        return None
    facts = dict(classes=len(class_map.targets), file_classes=len(class_map.sources))
    return Message('weights-rows', key=key, model=len(ours), file=len(theirs), **facts)


def initial_state(
    plan: Plan, target: Mapping[str, torch.Tensor], source: Source, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The state dict that a model starts from; changes nothing.

    In re-initialized modules weights of layers come from N(0, std) and biases are 0; normalisation
    and buffers stay as the model has them. The draw has its own generator on the CPU, so that all
    ranks and devices get the same numbers, and with or without remapping.

    Args:
        plan: A plan without problems, made for this model and file.
        target: The model's state dict, freshly initialized.
        source: What the file holds.
        seed: Seed of the generator.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    state = dict(target)
    for key, ours in target.items():
        fate = plan.fates[key]
        if fate == LOADED:
            state[key] = source.tensors[plan.source_key(key)]
        elif key in plan.stds:
            state[key] = torch.normal(0.0, plan.stds[key], ours.shape, generator=generator)
        elif fate in (REINIT, REMAPPED) and _of_drawn_layer(plan, key):
            state[key] = torch.zeros(ours.shape)
        if fate == REMAPPED and plan.class_map is not None:
            theirs = source.tensors[plan.source_key(key)]
            for row, known in plan.class_map.rows(len(ours), len(theirs)) or ():
                state[key][row] = theirs[known]
    return state


def _is_under(key: str, prefix: str) -> bool:
    """Whether a key is in a module; in '' are all. ``head`` is a module, not the start of a name."""
    return not prefix or key == prefix or key.startswith(prefix if prefix.endswith('.') else f'{prefix}.')


def _innermost(key: str, modules: Iterable[str]) -> str | None:
    """The module that a key is in, of nested ones the innermost."""
    return max((module for module in modules if _is_under(key, module)), key=len, default=None)


def _stds(reinit: Mapping) -> dict[str, float]:
    def is_std(value: object) -> bool:
        return is_number(value) and value >= 0

    wrong = [
        Message('weights-reinit-value', module=module, value=value)
        for module, value in reinit.items()
        if not isinstance(value, Mapping) or set(value) != {'std'} or not is_std(value['std'])
    ]
    if wrong:
        raise UserError('weights-reinit-std', problems=wrong)
    return {module: float(value['std']) for module, value in reinit.items()}


def _class_map(source: Source, weights_cfg: Mapping, classes: Sequence[str]) -> ClassMap | None:
    head_init = weights_cfg.get('head_init')
    if head_init and head_init not in HEAD_INITS:
        raise UserError('weights-head-init', head_init=head_init)
    if head_init != REMAP:
        return None
    if not source.classes or not classes:
        raise UserError('weights-remap-classes', owner='the data' if source.classes else source.path)
    return match_classes(classes, source.classes, weights_cfg.get('aliases'))
