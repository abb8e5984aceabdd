"""Helper variables of configs (`data_root`, `train_pipeline`): whether they reach a setting, and which.

A base puts the value of a helper into its settings when it is read. Another value that an inheriting file or the
command line gives the helper later changes nothing, unless that file uses it too.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config.keys import TOP_LEVEL
from mmfinetune.utils.errors import Message

if TYPE_CHECKING:
    from mmengine.config import Config

_BASE = '_base_'
_OF_BASE = re.compile(r'\{\{\s*_base_\.(\w+)')  # MMEngine's {{_base_.name}}, in quotes or not


@dataclass(frozen=True)
class Source:
    """A config file as it is written.

    Attributes:
        path: The file.
        text: Its content.
        inherits: Whether it has bases.
    """

    path: Path
    text: str
    inherits: bool

    @cached_property
    def statements(self) -> list[tuple[list[ast.expr], ast.AST]]:
        """What each statement sets or changes in place, and what it uses."""
        found: list[tuple[list[ast.expr], ast.AST]] = []
        for node in ast.parse(self.text).body:
            if isinstance(node, ast.Assign):
                found.append((node.targets, node.value))
            elif isinstance(node, ast.AugAssign):
                found.append(([node.target], node.value))
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                # _base_.train_pipeline.insert(1, dict(...))
                changed = [node.value.func.value] if isinstance(node.value.func, ast.Attribute) else []
                found.append((changed, ast.Tuple(node.value.args)))
            else:
                found.append(([], node))
        return found

    @cached_property
    def assigned(self) -> dict[str, int]:
        """Names of its own and of its bases that it sets or changes, and in which line."""
        targets = [target for targets, _ in self.statements for target in targets]
        return {_place(target).partition('.')[0]: target.lineno for target in targets}

    @cached_property
    def _used(self) -> list[ast.AST]:
        return [node for _, value in self.statements for node in ast.walk(value)]

    @cached_property
    def read(self) -> set[str]:
        """Names that it uses, of its own and of its bases."""
        return {n.id for n in self._used if isinstance(n, ast.Name)} | self.read_of_bases

    @cached_property
    def read_of_bases(self) -> set[str]:
        """Names of its bases that it uses as theirs: ``_base_.name``."""
        names = {n.attr for n in self._used if isinstance(n, ast.Attribute) and _is_base(n.value)}
        return names | set(_OF_BASE.findall(self.text))

    def uses(self) -> Iterator[tuple[str, str, bool]]:
        """Each name, the dotted place that it is put at, and whether it is the whole value there."""
        for targets, value in self.statements:
            for target in targets:
                yield from _uses(value, _place(target), True)


def read_sources(path: Path) -> list[Source]:
    """A config file and all its bases, each after its own bases."""
    text = path.read_text(encoding='utf-8')
    bases = [
        constant.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == _BASE
        for constant in ast.walk(node.value)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    ]
    found = []
    for base in bases:
        package, _, rest = base.rpartition('::')
        spec = importlib.util.find_spec(package) if package else None
        folder = Path(spec.origin).parent / '.mim/configs' if spec and spec.origin else path.parent
        if (folder / rest).is_file():
            found += read_sources(folder / rest)
    return [*found, Source(path, text, bool(bases))]


def unread(sources: list[Source]) -> dict[str, Source]:
    """Names set at the top of a file that neither it nor one that inherits from it uses, and the last such file."""
    found = {}
    for i, source in enumerate(sources):
        used = source.read.union(*(later.read_of_bases for later in sources[i + 1 :]))
        found.update({name: source for name in source.assigned if name not in used})
    return found


def places(sources: list[Source], key: str) -> dict[str, bool]:
    """The settings that a helper, or what is at a dotted key in it, is put into, and whether it is their whole value."""
    helper, dot_of_key, rest_of_key = key.partition('.')
    uses = [use for source in sources for use in source.uses()]

    def follow(name: str, seen: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
        for used, place, whole in uses:
            root, dot, rest = place.partition('.')
            if used != name or root in seen:
                continue
            if root in TOP_LEVEL:
                yield place, whole
            # What holds it may itself be put somewhere.
            for outer, is_whole in follow(root, (*seen, root)):
                yield f'{outer}{dot}{rest}', whole and is_whole

    return {f'{place}{dot_of_key}{rest_of_key}': whole for place, whole in follow(helper, (helper,))}


def check(cfg: Config, sources: list[Source]) -> list[Message]:
    """Find values that files give to helpers and that reach nothing."""
    settings = {key: value for key, value in cfg.to_dict().items() if key in TOP_LEVEL}
    problems = []
    for name, source in unread(sources).items():
        if not source.inherits or name in TOP_LEVEL or name not in cfg or name == 'name':
            continue
        put = places(sources, name)
        found = put or dict.fromkeys(_with_key(settings, name), True)
        # Settings that are no longer there do not count.
        held = [h for place, whole in found.items() if (h := _holds(settings, place, cfg[name], whole)) is not None]
        if held and not (all(held) if put else any(held)):
            line = source.assigned[name]
            facts = {'path': source.path, 'line': line, 'places': shown(found)}
            problems.append(Message('config-no-effect', key=name, **facts))
    return problems


def shown(found: Mapping[str, bool]) -> str:
    """Places as text."""
    return ', '.join(found) or 'the setting itself'


def _is_base(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == _BASE


def _place(target: ast.expr) -> str:
    """``_base_.a.b[2].c`` as ``a.b.2.c``."""
    if isinstance(target, ast.Attribute):
        return target.attr if _is_base(target.value) else f'{_place(target.value)}.{target.attr}'
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        return f'{_place(target.value)}.{target.slice.value!s}'
    return target.id if isinstance(target, ast.Name) else ''


def _uses(node: ast.AST, place: str, whole: bool) -> Iterator[tuple[str, str, bool]]:
    if isinstance(node, ast.Name):
        yield node.id, place, whole
    elif isinstance(node, ast.Attribute) and _is_base(node.value):
        yield node.attr, place, whole
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        for keyword in node.keywords:
            name = keyword.arg
            yield from _uses(keyword.value, f'{place}.{name}' if name else place, whole and bool(name))
        for argument in node.args:
            yield from _uses(argument, place, whole)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            name = str(key.value) if isinstance(key, ast.Constant) else None
            yield from _uses(value, f'{place}.{name}' if name else place, whole and bool(name))
    elif isinstance(node, (ast.List, ast.Tuple)):
        for i, item in enumerate(node.elts):
            yield from _uses(item, f'{place}.{i}', whole)
    else:
        # {{_base_.name}} is a set in a set.
        for child in ast.iter_child_nodes(node):
            yield from _uses(child, place, whole and isinstance(node, ast.Set))


def _with_key(node: Any, key: str, place: str = '') -> Iterator[str]:
    """Places of a key in nested settings."""
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    for name, value in items:
        where = f'{place}.{name}' if place else str(name)
        if name == key and place:
            yield where
        yield from _with_key(value, key, where)


def _holds(node: Any, place: str, value: Any, whole: bool) -> bool | None:
    """Whether a value has reached its place; None if that is not there."""
    for part in place.split('.'):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        elif isinstance(node, (list, tuple)) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    if not whole and isinstance(value, Mapping) and isinstance(node, Mapping):
        return all(key in node and node[key] == part for key, part in value.items())
    return node == value if whole else str(value) in str(node)
