"""Which class of the weights each class of the data is, and which rows of a head that makes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmfinetune.utils.errors import UserError

# Names that data sets give to COCO's classes, beside other spellings (case, spaces, `_`, `-`),
# which need no entry: VOC, Open Images, Objects365, Cityscapes and BDD100K.
SYNONYMS = {
    'aeroplane': 'airplane',
    'plane': 'airplane',
    'motorbike': 'motorcycle',
    'sofa': 'couch',
    'tvmonitor': 'tv',
    'television': 'tv',
    'televisionset': 'tv',
    'pedestrian': 'person',
    'people': 'person',
    'human': 'person',
    'automobile': 'car',
    'doughnut': 'donut',
    'fridge': 'refrigerator',
    'hairdryer': 'hair drier',
    'mobilephone': 'cell phone',
    'cellularphone': 'cell phone',
    'houseplant': 'potted plant',
    'plantpot': 'potted plant',
    'table': 'dining table',
    'computermouse': 'mouse',
    'computerkeyboard': 'keyboard',
    'racket': 'tennis racket',
    'luggage': 'suitcase',
}
HEAD_INITS = ('reinit', 'remap')


def _plain(name: str) -> str:
    return re.sub(r'[\W_]+', '', name.lower())


@dataclass(frozen=True)
class ClassMap:
    """For each class of the data the class of the weights it takes over.

    Attributes:
        targets: Classes of the data, in the order of the rows.
        sources: Classes of the weights, in the order of the rows.
        indices: Position in ``sources`` for each target; None where there is none.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    indices: tuple[int | None, ...]

    def rows(self, target: int, source: int) -> list[tuple[int, int]]:
        """Pairs of rows (target, source) of a head's tensor.

        Args:
            target: Number of rows in the model: C (masks), C + 1 (classes, background last) or
                4 C (box deltas of each class).
            source: Number of rows in the weights, of the same kind.

        Raises:
            ValueError: The numbers are of different kinds.
        """
        ours, theirs = len(self.targets), len(self.sources)
        for per, background in ((1, 1), (4, 0), (1, 0)):
            if target == per * ours + background:
                if source != per * theirs + background:
                    break
                pairs = [
                    (per * t + k, per * s + k) for t, s in enumerate(self.indices) if s is not None for k in range(per)
                ]
                return pairs + ([(target - 1, source - 1)] if background else [])
        raise ValueError(f'{target} rows for {ours} classes do not go with {source} for {theirs}')

    def lines(self) -> list[str]:
        """``aeroplane <- airplane`` for each class."""
        return [
            f'{name} <- {"(drawn anew)" if i is None else self.sources[i]}'
            for name, i in zip(self.targets, self.indices, strict=True)
        ]


def match_classes(targets: Sequence[str], sources: Sequence[str], aliases: Mapping[str, str] | None = None) -> ClassMap:
    """Find the class of the weights for each class of the data, by name.

    ``aliases`` come first, then the same name, then :data:`SYNONYMS`; case, spaces and
    punctuation do not count. An alias of None leaves a class without a source.

    Args:
        targets: Classes of the data.
        sources: Classes of the weights.
        aliases: ``{class of the data: class of the weights or None}``.

    Raises:
        UserError: An alias names a class that is not there.
    """
    aliases = dict(aliases or {})
    by_name = {_plain(name): i for i, name in enumerate(sources)}
    problems = [f'{a!r} is no class of the data' + _near(a, targets) for a in aliases if a not in targets]
    problems += [
        f'{b!r}, the source of {a!r}, is no class of the weights' + _near(b, sources)
        for a, b in aliases.items()
        if b is not None and _plain(b) not in by_name
    ]
    if problems:
        raise UserError(
            'weights.aliases names classes that are not there:',
            problems,
            'write {class of the data: class of the weights}',
        )

    def find(name: str) -> int | None:
        if name in aliases:
            return None if aliases[name] is None else by_name[_plain(aliases[name])]
        plain = _plain(name)
        for candidate in (
            plain,
            _plain(SYNONYMS.get(plain, plain)),
            *(a for a, b in SYNONYMS.items() if _plain(b) == plain),
        ):
            if candidate in by_name:
                return by_name[candidate]
        return None

    return ClassMap(tuple(targets), tuple(sources), tuple(find(name) for name in targets))


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f'; did you mean {near[0]!r}?' if near else ''
