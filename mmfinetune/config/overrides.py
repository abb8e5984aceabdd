"""``KEY=VALUE`` of ``--cfg-options``: read as literals, then merged into a config."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmfinetune.config.keys import FREE_FORM, HELPERS, TOP_LEVEL, accepted_keys, is_judged, unknown_key_problem
from mmfinetune.utils.errors import Message, UserError

if TYPE_CHECKING:
    from mmengine.config import Config

_CLOSING = {'(': ')', '[': ']', '{': '}'}


def parse(pairs: Sequence[str]) -> dict[str, Any]:
    """``['a.b=1', 'c=[1,2]']`` to ``{'a.b': 1, 'c': [1, 2]}``.

    Raises:
        UserError: A pair has no key, or a value has unbalanced brackets.
    """
    wrong = [p for p in pairs if not p.partition('=')[0] or '=' not in p]
    if wrong:
        raise UserError('override-not-a-pair', problems=wrong)
    found = {}
    for pair in pairs:
        key, _, text = pair.partition('=')
        try:
            found[key] = parse_value(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise UserError('override-unreadable', pair=pair, why=str(error) or type(error).__name__) from None
    return found


def parse_value(text: str) -> Any:
    """Read a value as MMEngine does: ``[1,2]`` and ``1,2`` are lists, ``(1,2)`` is a tuple, bare words are text.

    Beyond that, quotes make text of anything, and ``{'a': 1}`` or ``dict(a=1)`` make a dict.

    Raises:
        ValueError: Brackets do not match.
        SyntaxError: A dict that is not one.
    """
    text = text.strip()
    if text.startswith(('{', 'dict(')) and text.endswith(('}', ')')):
        return _literal(ast.parse(text, mode='eval').body)
    if text[:1] in ('(', '[') and text[-1:] == _CLOSING[text[0]]:
        items = list(_split(text[1:-1]))
        return tuple(items) if text[0] == '(' else items
    return list(_split(text)) if ',' in text and not _is_quoted(text) else _scalar(text)


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] in '\'"' and text.find(text[0], 1) == len(text) - 1


def _split(text: str) -> Iterator[Any]:
    """The values between commas that are not within brackets or quotes."""
    start, open_brackets, quote = 0, '', ''
    for i, char in enumerate(text):
        if quote:
            quote = '' if char == quote else quote
        elif char in '\'"' and not text[start:i].strip(' ([{:='):
            quote = char
        elif char in _CLOSING:
            open_brackets += _CLOSING[char]
        elif char in _CLOSING.values():
            if not open_brackets.endswith(char):
                raise ValueError(f'unexpected {char!r}')
            open_brackets = open_brackets[:-1]
        elif char == ',' and not open_brackets:
            yield parse_value(text[start:i])
            start = i + 1
    if open_brackets:
        raise ValueError(f'missing {open_brackets[-1]!r}')
    if text[start:].strip():
        yield parse_value(text[start:])


def _scalar(text: str) -> Any:
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    if text == 'None':
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text[1:-1] if _is_quoted(text) else text


def _literal(node: ast.expr) -> Any:
    """A literal of a config file: ``dict(...)`` as well; bare words are text."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict' and not node.args:
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_literal(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Name):
        return _scalar(node.id)
    return ast.literal_eval(node)


def merge(
    cfg: Config, overrides: Mapping[str, Any], places: Callable[[str], str] = str
) -> tuple[list[str], list[Message]]:
    """Merge dotted overrides into a config, in their order; `keys.check_keys` then judges the result.

    A dict is merged into the dict that it meets, anything else replaces. Where a ``type`` changes, the
    settings of the old type that the new one does not take are dropped.

    Args:
        cfg: Changed in place, by the overrides without a problem only.
        overrides: As from `parse`.
        places: Which settings a helper variable of the files was put into, as text: a change of it comes too late.

    Returns:
        A line for each setting dropped, and what is wrong with the overrides.
    """
    before = cfg.to_dict()
    problems: list[Message] = []
    changed: set[str] = set()
    for dotted, value in overrides.items():
        parent, there, problem = _find(cfg, dotted)
        name = dotted.partition('.')[0]
        if name in cfg and name not in TOP_LEVEL:
            problem = Message('override-no-effect', key=dotted, name=name, places=places(dotted))
        if problem is None and _holds_dicts(there) and not _may_replace_dict(dotted, there, value):
            problem = Message('override-needs-dict', key=dotted, value=value)
        if problem is not None:
            problems.append(problem)
        elif isinstance(parent, list) and not (isinstance(value, Mapping) and isinstance(there, Mapping)):
            parent[int(dotted.rpartition('.')[2])] = value
        elif isinstance(value, Mapping) and not isinstance(there, Mapping):
            # MMEngine takes the mark away only where there was something to replace.
            replace = {'_delete_': True} if dotted.rpartition('.')[2] in parent else {}
            cfg.merge_from_dict({dotted: {**value, **replace}})
        else:
            cfg.merge_from_dict({dotted: value})
        changed.update(_leaves(dotted, value))
    return list(_drop_left_over(before, cfg, changed)), problems


def _find(cfg: Config, dotted: str) -> tuple[Any, Any, Message | None]:
    """What holds a dotted place, what is there now (None for nothing), and why nothing would read a value there."""
    node: Any = cfg
    parent: Any = None
    parts = dotted.split('.')
    for depth, part in enumerate(parts):
        place, parent = '.'.join(parts[:depth]), node
        facts = {'key': dotted, 'place': place}
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                return None, None, Message('override-position', length=len(node), **facts)
            node = node[int(part)]
        elif depth and not isinstance(node, Mapping):
            return None, None, Message('override-no-parts', value=node, **facts)
        elif part in node:
            node = node[part]
        elif depth and (parts[depth - 1] in FREE_FORM or not node or 'type' in node or is_judged(node, place)):
            return node, None, None
        else:
            # Only the keys that it has are known of a dict without a type; but hooks may have any name.
            known = set(node) if depth else {*node, *TOP_LEVEL, *HELPERS}
            key = '.'.join(parts[: depth + 1])
            return node, None, unknown_key_problem(key, place, known, place != 'default_hooks')
    return parent, node, None


def _holds_dicts(node: Any) -> bool:
    return isinstance(node, Mapping) or (isinstance(node, list) and any(isinstance(item, Mapping) for item in node))


def _may_replace_dict(dotted: str, there: Any, value: Any) -> bool:
    if isinstance(value, list) and isinstance(there, Mapping):
        return dotted.endswith('_evaluator')  # one or a list
    return value is None or isinstance(value, (Mapping, list)) or dotted.endswith('._delete_')


def _leaves(dotted: str, value: Any) -> Iterator[str]:
    yield dotted
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f'{dotted}.{key}', part)


def _drop_left_over(before: Any, after: Any, changed: set[str], place: str = '') -> Iterator[str]:
    """Delete what came with the old type of a dict and the new one does not take."""
    if isinstance(before, list) and isinstance(after, list):
        pairs = [(str(i), old, new) for i, (old, new) in enumerate(zip(before, after, strict=False))]
    elif isinstance(before, Mapping) and (isinstance(after, Mapping) or not place):
        if place and 'type' in before and before['type'] != after.get('type'):
            accepted, closed = accepted_keys(after, place)
            for key in [k for k in before if k in after and k not in accepted and f'{place}.{k}' not in changed]:
                if closed:
                    del after[key]
                    yield f'{place}.{key} is dropped: {after["type"]} does not take it'
        pairs = [(key, old, after[key]) for key, old in before.items() if key in after]
    else:
        return
    for key, old, new in pairs:
        yield from _drop_left_over(old, new, changed, f'{place}.{key}' if place else key)
