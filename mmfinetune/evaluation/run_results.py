"""What a run leaves to read: its history, tables in other projects' formats, and a summary."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfinetune.evaluation import plots
from mmfinetune.evaluation.history import History
from mmfinetune.evaluation.stats import KINDS, PREFIX, STATS, number, stat_rows
from mmfinetune.utils.extras import extra
from mmfinetune.utils.files import atomic_write_all, atomic_write_text
from mmfinetune.utils.text import block, duration

RESULTS = 'results.csv'
DETECTION, SEGMENTATION = 'det_results.txt', 'seg_results.txt'
RECORD_MAP = 'record_mAP.txt'
CURVES, CLASS_BARS = 'curves.png', 'per_class.png'
SUMMARY = 'summary.md'
# As the torchvision-based fine-tuning projects have it.
_BOXES_FIRST = ('bbox', 'segm')
PerClass = Mapping[str, Mapping[str, float]]
# What the summary links to, if it exists.
_FILES = {
    RESULTS: 'every number of every epoch',
    DETECTION: 'box results, one line an epoch',
    SEGMENTATION: 'mask results, one line an epoch',
    RECORD_MAP: 'COCO summary and AP50 of each class',
    CURVES: 'curves',
    CLASS_BARS: 'classes',
    'test_results.json': 'numbers of the final test',
    'figures': 'test pictures',
    'tensorboard_logs': 'TensorBoard',
    'confusion_matrix.png': 'confusion matrix',
}


def set_aside(path: Path) -> Path:
    """Rename a file to a free ``<name>.bak`` and return the new path."""
    names = (f'{path.name}.bak{count if count > 1 else ""}' for count in itertools.count(1))
    return path.rename(next(path.with_name(n) for n in names if not path.with_name(n).exists()))


def per_class_of(evaluator: Any, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """AP and AP50 of each class: the ``per_class`` of a metric, or else ``coco/<kind>_AP/<class>`` of what it returned.

    Returns:
        ``bbox_AP``, ``bbox_AP50``, ``segm_AP``, ``segm_AP50`` by class, in the order of the labels
        where known; a class without ground truth lacks them.
    """
    for metric in getattr(evaluator, 'metrics', ()):
        if getattr(metric, 'per_class', None):
            return {name: dict(values) for name, values in metric.per_class.items()}
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        kind, mark, name = key.removeprefix(PREFIX).partition('_AP/')
        if mark and kind in KINDS:
            found.setdefault(name, {})[f'{kind}_AP'] = float(value)
    return found


def result_lines(history: History, kind: str) -> str:
    """One line per epoch in the format of the torchvision-based fine-tuning projects.

    ``epoch:{n}``, COCO's twelve numbers and the mean training loss with four digits, the base
    learning rate with six. Epochs count from 1, in those projects from 0; where training is
    not counted in epochs, lines begin with ``iter:``.

    Returns:
        The lines of those rows that have these numbers; empty if none has.
    """
    names = [f'{PREFIX}{kind}_{stat}' for stat in STATS]
    lines = []
    for row in history.rows:
        if all(name in row for name in names):
            numbers = [f'{row[name]:.4f}' for name in names]
            numbers += [f'{row.get("train/loss", math.nan):.4f}', f'{row.get("lr", math.nan):.6f}']
            lines.append(f'{history.unit}:{row[history.unit]} {"  ".join(numbers)}\n')
    return ''.join(lines)


def record_map_text(metrics: Mapping[str, float], per_class: PerClass, source: str = '') -> str:
    """COCO's twelve lines as pycocotools prints them, then AP50 of each class and their mean.

    For boxes and for masks, as far as `metrics` has them; those projects write a file for each, without the lines of
    the kind and the total. -1 stands for no ground truth.

    Args:
        source: What was evaluated, for the first line.
    """
    blocks = [f'{source}\n'] if source else []
    for kind in _BOXES_FIRST:
        if f'{PREFIX}{kind}_mAP' not in metrics:
            continue
        lines = [f'IoU metric: {kind}', 'COCO results:']
        for name, (_, iou, area, detections) in STATS.items():
            what = 'Average Precision  (AP)' if name.startswith('mAP') else 'Average Recall     (AR)'
            value = metrics.get(f'{PREFIX}{kind}_{name}', -1)
            lines.append(f' {what} @[ IoU={iou:<9} | area={area:>6s} | maxDets={detections:>3d} ] = {value:0.3f}')
        wide = any(f'{kind}_AP50' in values for values in per_class.values())
        key, iou, total = (f'{kind}_AP50', '0.5', 'mAP_50') if wide else (f'{kind}_AP', '0.50:0.95', 'mAP')
        if any(key in values for values in per_class.values()):
            lines += ['', f'mAP(IoU={iou}) for each category:']
            lines += [f' {name:15}: {values.get(key, -1)}' for name, values in per_class.items()]
            lines.append(f' {"total":15}: {metrics.get(f"{PREFIX}{kind}_{total}", -1)}')
        blocks.append('\n'.join(lines) + '\n')
    return '\n'.join(blocks)


@dataclass
class RunFacts:
    """What is known of a run besides its results.

    Attributes:
        total: Planned number of epochs (or iterations).
        unit: ``epoch`` or ``iter``.
        best: The metrics by which the best checkpoint is chosen, and whether less is better.
        setup: Weights, versions, device and the like.
        data: Rows of split, images, objects, classes, file.
    """

    name: str
    command: str
    total: int
    unit: str = 'epoch'
    best: Mapping[str, bool] = field(default_factory=dict)
    setup: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[Sequence[str]] = ()


def summary_text(facts: RunFacts, history: History, done: int, state: str, per_class: PerClass, work_dir: Path) -> str:
    """A run as one Markdown page.

    Args:
        done: Epochs (or iterations) trained so far.
        state: State of the run, as a phrase.
        per_class: AP of each class at the last validation.
        work_dir: Folder of the run; existing files are linked.
    """
    unit = {'epoch': 'epoch', 'iter': 'iteration'}[facts.unit]
    now = time.strftime('%Y-%m-%d %H:%M:%S')
    lines = [f'# {facts.name}', '', f'**{state}: {unit} {done} of {facts.total}** ({now})', '']
    for metric, less in facts.best.items():
        if best := history.best(metric, less):
            file = f'best_{metric}_{facts.unit}_{best[0]}.pth'.replace('/', '_')
            link = f', [{file}]({file})' if (work_dir / file).is_file() else ''
            lines.append(f'Best {metric}: **{best[1]:.4f}** after {unit} {best[0]}{link}\n')
    body = '\n'.join(lines)
    if (work_dir / CURVES).is_file():
        body += f'\n![Loss, AP and learning rates]({CURVES})\n'
    last = history.rows[-1][history.unit] if history.rows else 0
    setup = [['', ''], *([name, text] for name, text in facts.setup.items())]
    data = [['split', 'images', 'objects', 'classes', 'file'], *facts.data]
    sections = {
        'Test': 'Not tested yet.\n',
        f'{unit.capitalize()}s': _history_table(history),
        'Classes': class_section(per_class, f'Validation after {unit} {last}.', (work_dir / CLASS_BARS).is_file()),
        'Run': f'```bash\n{facts.command}\n```\n\n{block(setup, left=2)}',
        'Data': block(data),
        'Files': _file_list(work_dir),
    }
    return body + ''.join(f'\n## {title}\n\n{text}' for title, text in sections.items() if text)


def class_section(per_class: PerClass, source: str, picture: bool) -> str:
    """The table of classes, and the picture of it; empty without classes."""
    if not per_class:
        return ''
    columns = {f'{kind}_{which}': f'{word} {which}' for kind, word in KINDS.items() for which in ('AP', 'AP50')}
    keys = [key for key in columns if any(key in values for values in per_class.values())]
    rows = [['class', 'label', *(columns[key] for key in keys)]]
    for label, (name, values) in enumerate(per_class.items()):
        rows.append([name, str(label), *(number(values.get(key), 4) for key in keys)])
    link = f'\n![AP and AP50 of each class]({CLASS_BARS})\n' if picture else ''
    return f'{source}\n\n{block(rows)}{link}'


def report_test(work_dir: Path, checkpoint: Path, metrics: Mapping[str, float], per_class: PerClass) -> list[Path]:
    """Write ``record_mAP.txt`` and ``per_class.png`` of a test and put it into ``summary.md``.

    Args:
        work_dir: Folder of the run; a summary is started if there is none.
        checkpoint: The tested checkpoint.

    Returns:
        The files written.

    Raises:
        UserError: They cannot be written.
    """
    source = f'Test of {checkpoint.name}'
    path = work_dir / SUMMARY
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, ValueError):
        text = f'# {work_dir.resolve().name}\n'
    rows = stat_rows(metrics, _BOXES_FIRST, 4)
    body = f'`{checkpoint.name}`' + (f', loss {metrics["test/loss"]:.4f}' if 'test/loss' in metrics else '') + '\n\n'
    text = _with_section(text, 'Test', body + block(rows))
    contents = {work_dir / RECORD_MAP: record_map_text(metrics, per_class, source).encode()}
    if per_class:
        with extra(CLASS_BARS):
            contents[work_dir / CLASS_BARS] = plots.class_bars(per_class, f'test of {checkpoint.name}')
        section = class_section(per_class, f'{source}.', work_dir / CLASS_BARS in contents)
        text = _with_section(text, 'Classes', section)
    atomic_write_all(contents)
    text = _with_section(text, 'Files', _file_list(work_dir))
    atomic_write_text(path, text)
    return [*contents, path]


def _history_table(history: History) -> str:
    metrics = [f'{PREFIX}{kind}_{stat}' for kind in _BOXES_FIRST for stat in ('mAP', 'mAP_50')]
    titles = {'train/loss': 'training loss', 'val/loss': 'validation loss'}
    titles |= {name: plots.title_of(name) for name in metrics}
    titles |= {'lr': 'lr', 'train_seconds': 'training', 'val_seconds': 'validation'}
    forms: dict[str, Callable[..., str]] = {'lr': '{:g}'.format, 'train_seconds': duration, 'val_seconds': duration}
    there = [name for name in titles if name in history.columns()]
    rows = [[history.unit, *(titles[name] for name in there)]]
    for row in history.rows:
        values = [forms.get(k, '{:.4f}'.format)(row[k]) if row.get(k, -1) != -1 else '-' for k in there]
        rows.append([str(row[history.unit]), *values])
    return block(rows, left=0)


def _file_list(work_dir: Path) -> str:
    return ''.join(f'- [{name}]({name}): {what}\n' for name, what in _FILES.items() if (work_dir / name).exists())


def _with_section(text: str, title: str, body: str) -> str:
    """A page with a section replaced, or put last if it is new."""
    head, *sections = text.split('\n## ')
    bodies = {section.partition('\n')[0]: section for section in sections}
    bodies[title] = f'{title}\n\n{body}'
    return '\n## '.join(part if part.endswith('\n') else f'{part}\n' for part in (head, *bodies.values()))
