"""Which class of the weights each class of the data is, and which rows of a head that makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.text import near

# Names that data sets give to COCO's classes. Other spellings (case, spaces, `_`, `-`) need no
# entry. From VOC, Open Images, Objects365, Cityscapes and BDD100K.
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
# What becomes of the heads: `KEEP` loads them as they are, and `AUTO` does where they are those of the data's classes.
REINIT, REMAP, KEEP, AUTO = 'reinit', 'remap', 'keep', 'auto'
HEAD_INITS = (REINIT, REMAP, KEEP, AUTO)


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

    def rows(self, target: int, source: int) -> list[tuple[int, int]] | None:
        """Pairs of rows (target, source) of a head's tensor; None if the numbers are of different kinds.

        Args:
            target: Number of rows in the model: C (masks), C + 1 (classes, background last) or
                4 C (box deltas of each class).
            source: Number of rows in the weights, of the same kind.
        """
        ours, theirs = len(self.targets), len(self.sources)
        for per, background in ((1, 1), (4, 0), (1, 0)):
            if target == per * ours + background:
                if source != per * theirs + background:
                    return None
                known = [(t, s) for t, s in enumerate(self.indices) if s is not None]
                pairs = [(per * t + k, per * s + k) for t, s in known for k in range(per)]
                return pairs + ([(target - 1, source - 1)] if background else [])
        return None

    def as_dict(self) -> dict[str, str | None]:
        """The class of the weights for each class of the data; None where there is none."""
        sources = [None if i is None else self.sources[i] for i in self.indices]
        return dict(zip(self.targets, sources, strict=True))

    def lines(self) -> list[str]:
        """``aeroplane <- airplane`` for each class."""
        return [f'{name} <- {source or "(re-initialized)"}' for name, source in self.as_dict().items()]


def match_classes(targets: Sequence[str], sources: Sequence[str], aliases: Mapping[str, str] | None = None) -> ClassMap:
    """Find the class of the weights for each class of the data, by name.

    ``aliases`` come first, then the same name, then :data:`SYNONYMS`; case, spaces and
    punctuation do not count. An alias of None leaves a class without a source.

    Args:
        targets: Classes of the data.
        sources: Classes of the weights.
        aliases: ``{class of the data: class of the weights or None}``.

    Raises:
        UserError: An alias names an unknown class.
    """
    aliases = dict(aliases or {})
    by_name = {_plain(name): i for i, name in enumerate(sources)}
    problems = [
        Message('alias-class', alias=name, near=near(name, targets, '; ', 0.5))
        for name in aliases
        if name not in targets
    ]
    problems += [
        Message('alias-source', source=source, near=near(source, sources, '; ', 0.5))
        for name, source in aliases.items()
        if source is not None and _plain(source) not in by_name
    ]
    if problems:
        raise UserError('weights-aliases', problems=problems)

    def find(name: str) -> int | None:
        if name in aliases:
            return None if aliases[name] is None else by_name[_plain(aliases[name])]
        plain = _plain(name)
        others = (a for a, b in SYNONYMS.items() if _plain(b) == plain)
        candidates = (plain, _plain(SYNONYMS.get(plain, plain)), *others)
        return next((by_name[candidate] for candidate in candidates if candidate in by_name), None)

    return ClassMap(tuple(targets), tuple(sources), tuple(find(name) for name in targets))
