"""The one reader of COCO annotation files; what commands know of a file is a view of `Coco`. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import MOST_JSON, read_regular, reason_of
from mmfinetune.utils.text import brief, is_text

SECTIONS = ('images', 'annotations', 'categories')
_MAX_DIGITS = 20
_SHOWN = 5  # places of one problem; the same mistake is mostly in all entries


@dataclass(frozen=True)
class Coco:
    """An annotation file, parsed once. Views may share it: none of them changes it.

    Attributes:
        path: The file.
        data: Its top object. The three sections are lists of objects; an entry that is not an
            object is an empty one here, a section that is missing is an empty list.
        faults: What is wrong with the file as a whole.
    """

    path: Path
    data: dict[str, Any] = field(repr=False)
    faults: tuple[Message, ...] = ()

    @property
    def images(self) -> list[dict]:
        return self.data['images']

    @property
    def annotations(self) -> list[dict]:
        return self.data['annotations']

    @property
    def categories(self) -> list[dict]:
        return self.data['categories']

    @property
    def classes(self) -> tuple[str, ...]:
        """Category names in the file's order, which is that of the labels."""
        return tuple(c['name'] for c in self.categories)

    def require(
        self,
        images: Sequence[str] = (),
        annotations: Sequence[str] = (),
        links: bool = True,
        unique_files: bool = False,
        utf8: bool = False,
    ) -> Coco:
        """Insist on what a view relies on.

        Args:
            images: Keys that all images must have besides ``id`` and ``file_name``.
            annotations: Keys that all annotations must have besides ``image_id`` and
                ``category_id``; ``id`` must be unique and not 0 then.
            links: Whether the image and the category of each annotation must be in the file.
            unique_files: Whether each image file may be listed only once.
            utf8: Whether it must be plain UTF-8, which pycocotools needs.

        Raises:
            UserError: All problems of the first kind found: no file, faults of the file, entries.
        """
        if any(fault.code == 'coco-no-file' for fault in self.faults):
            raise UserError('coco-missing', path=self.path)
        faults = [f for f in self.faults if utf8 or f.code != 'coco-encoding' or not self.images]
        if faults:
            raise UserError('coco-file', problems=faults, path=self.path)
        problems = self._missing_keys(('id', 'file_name', *images), ('image_id', 'category_id', *annotations))
        if not problems:
            problems = self._contradictions('id' in annotations, links, unique_files)
        if problems:
            raise UserError('coco-entries', problems=problems.lines(), path=self.path)
        return self

    def _missing_keys(self, images: Sequence[str], annotations: Sequence[str]) -> Problems:
        problems = Problems()
        for section, keys in (('images', images), ('annotations', annotations), ('categories', ('id', 'name'))):
            for number, entry in enumerate(self.data[section], 1):
                if missing := [key for key in keys if key not in entry]:
                    problems.add('coco-keys-missing', f'number {number}', section=section, keys=', '.join(missing))
        return problems

    def _contradictions(self, own_ids: bool, links: bool, unique_files: bool) -> Problems:
        problems = Problems()
        unique = [('images', 'id'), ('categories', 'id'), ('categories', 'name')]
        unique += [('annotations', 'id')] * own_ids + [('images', 'file_name')] * unique_files
        for section, key in unique:
            for value in _repeated([entry[key] for entry in self.data[section]]):
                problems.add('coco-repeated', brief(value), section=section, key=key)
        for image in self.images:
            if reason := name_problem(image['file_name']):
                problems.add('coco-file-name', reason)
        for category in self.categories:
            if not isinstance(category['name'], str) or not is_text(category['name']):
                problems.add('coco-name', brief(category['name']))
        for annotation in self.annotations if own_ids else ():
            if annotation['id'] == 0:
                problems.add('coco-id-zero', brief(annotation['image_id']))
        for key, section in (('image_id', 'images'), ('category_id', 'categories')):
            known = {entry['id'] for entry in self.data[section] if not _is_container(entry['id'])}
            for annotation in self.annotations:
                value = annotation[key]
                if _is_container(value) or (links and value not in known):
                    problems.add('coco-link', brief(value), key=key)
        return problems


class Problems:
    """Gathers what is wrong with many entries, the places of one kind in one line."""

    def __init__(self) -> None:
        self._found: dict[tuple, tuple[dict[str, Any], Counter[str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, code: str, place: str, /, **facts: Any) -> None:
        """Add a place of a problem; its wording may show ``{count}`` and ``{places}`` besides the facts."""
        self._found.setdefault((code, *facts.values()), (facts, Counter()))[1][place] += 1

    def lines(self) -> list[Message]:
        lines = []
        for (code, *_), (facts, places) in self._found.items():
            shown = ', '.join(list(places)[:_SHOWN]) + (', …' if len(places) > _SHOWN else '')
            lines.append(Message(code, count=places.total(), places=shown, **facts))
        return lines


_kept: dict[tuple, Coco] | None = None


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Until the end of the block keep what `read` parses, for commands that view one file several times."""
    global _kept
    before = _kept
    _kept = {} if before is None else before
    try:
        yield
    finally:
        _kept = before


def read(path: Path, compact: bool = False) -> Coco:
    """Read an annotation file as pycocotools does; never raises, see `Coco.faults`.

    Args:
        path: COCO JSON.
        compact: Polygons become arrays of doubles, a quarter of the memory.
    """
    if _kept is not None:
        # What has no status is not kept.
        with contextlib.suppress(OSError, ValueError):
            status = path.stat()
            key = path.resolve(), status.st_mtime_ns, status.st_size, compact
            if key not in _kept:
                _kept[key] = _parse(path, compact)
            return dataclasses.replace(_kept[key], path=path)
    return _parse(path, compact)


def _parse(path: Path, compact: bool) -> Coco:
    data: dict[str, Any] = {section: [] for section in SECTIONS}
    try:
        top, faults = _load(path, compact)
    except Problem as problem:
        return Coco(path, data, (problem.message,))
    for section in SECTIONS:
        if section not in top:
            faults.append(Message('coco-section-missing', section=section))
            continue
        entries = top[section]
        if not isinstance(entries, list):
            faults.append(Message('coco-section-type', section=section, kind=type(entries).__name__))
            continue
        wrong = {i: type(entry).__name__ for i, entry in enumerate(entries) if type(entry) is not dict}
        if wrong:
            position, kind = next(iter(wrong.items()))
            faults.append(Message('coco-entry-type', section=section, count=len(wrong), kind=kind, position=position))
            for i in wrong:
                entries[i] = {}
        data[section] = entries
        if not entries and section == 'images':
            faults.append(Message('coco-no-images'))
        if not entries and section == 'categories':
            faults.append(Message('coco-no-categories'))
    return Coco(path, {**top, **data}, tuple(faults))


def _load(path: Path, compact: bool) -> tuple[dict[str, Any], list[Message]]:
    """The top object and what is odd about its encoding; a Problem if there is none."""
    try:
        content = read_regular(path, MOST_JSON)
    except FileNotFoundError:
        raise Problem('coco-no-file') from None
    except (OSError, ValueError) as error:
        raise Problem('coco-file-unreadable', reason=reason_of(error)) from None
    encoding = json.detect_encoding(content)
    odd = []
    if encoding != 'utf-8':
        odd.append(Message('coco-encoding', found=encoding.replace('-sig', ' with a byte order mark')))
    # Millions of objects are made, none of them in a cycle: collecting would double the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        text = content.decode(encoding)
        del content
        top = json.loads(text, object_hook=_compact if compact else None)
    except UnicodeDecodeError as error:
        raise Problem('coco-encoding', found=f'byte {error.start} is not {encoding}') from None
    except RecursionError:
        raise Problem('coco-nesting') from None
    except ValueError as error:
        # Also for integers of more digits than Python converts.
        raise Problem('coco-not-json', reason=str(error)) from None
    finally:
        if collecting:
            gc.enable()
    if not isinstance(top, dict):
        raise Problem('coco-top-level', kind=type(top).__name__)
    odd += [Message('coco-section-repeated', section=section) for section in _repeated_sections(text)]
    return top, odd


def _repeated_sections(text: str) -> list[str]:
    """The sections that the top object has more than once: json keeps the last alone."""
    # A second parse, which takes as long as the first, only where a name stands twice anywhere.
    if all(text.count(f'"{section}"') < 2 for section in SECTIONS):
        return []
    keys = json.loads(text, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
    return [section for section in SECTIONS if keys.count(section) > 1]


def _compact(entry: dict) -> dict:
    segmentation = entry.get('segmentation')
    if type(segmentation) is list:
        # Otherwise they are not polygons of numbers, and the check of the masks says so.
        with contextlib.suppress(TypeError, OverflowError):
            entry['segmentation'] = [array('d', polygon) for polygon in segmentation]
    return entry


def _repeated(values: list) -> list:
    """The values that occur more than once; lists and objects, which are not ids, always."""
    with contextlib.suppress(TypeError):
        if len(set(values)) == len(values):
            return []
    counts = Counter(v for v in values if not _is_container(v))
    return [v for v in values if _is_container(v)] + [v for v, n in counts.items() if n > 1]


def _is_container(value: object) -> bool:
    return isinstance(value, (list, dict))


def as_id(value: Any) -> int | str | None:
    """An id as an integer if it can be read as one, a string if it is one, else None."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < _MAX_DIGITS else value or None
    return value if type(value) is int else None


def name_problem(name: object) -> str:
    """Why a ``file_name`` cannot name a file; empty if it can."""
    if not isinstance(name, str):
        return f'file_name {brief(name)}'
    if not name.strip():
        return 'file_name is empty'
    if '\0' in name:
        return 'file_name has a NUL character'
    return '' if is_text(name) else 'file_name is not valid Unicode'
