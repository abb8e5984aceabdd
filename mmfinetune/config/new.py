"""Write a short config for a data set of one's own, its numbers worked out from the data."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import load, paths, sizing
from mmfinetune.data import coco_json
from mmfinetune.data.layout import SPLITS, Prepared, file_name
from mmfinetune.data.preflight import read_split
from mmfinetune.data.statistics import Statistics, gather
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_text

if TYPE_CHECKING:
    from mmengine.config import Config


MAX_LINES = 29
WIDTH = 100
# What mmdet drops silently, a setting of the VOC base: images with a side under 32 px.
_MIN_SIZE = 32
FLIPS = ('horizontal', 'vertical', 'diagonal')  # the names of mmdet's RandomFlip
_SUITABLE = 'take another --base, such as configs/mask_rcnn_voc_pretrained.py'


@dataclass(frozen=True)
class Written:
    """The config file and what to say of it."""

    path: Path
    lines: list[str]


def write(
    root: Path,
    name: str,
    out: Path | None = None,
    base: Path = Path('configs/mask_rcnn_voc_pretrained.py'),
    images_per_gpu: int | None = None,
    epochs: int | None = None,
    flip: Sequence[str] = (),
    overwrite: bool = False,
) -> Written:
    """Write a config of under 30 lines for the data in a folder, and make sure that it loads.

    Args:
        root: Folder with ``annotations/instances_{train,val[,test]}.json`` and ``images/``.
        name: Of the config and of its work dir.
        out: The file (default: ``configs/<name>.py``).
        base: Config to inherit from.
        images_per_gpu: Default: the base's.
        epochs: Default: worked out, see `sizing.plan_schedule`.
        flip: Directions of random flips, of `FLIPS`; default: the base's.
        overwrite: Whether to replace the file.

    Raises:
        UserError: Bad arguments, or data that cannot be trained on; nothing is written then.
    """
    out = _check_arguments(name, out, base, images_per_gpu, epochs, overwrite)
    data = Prepared(root)
    files = data.splits()
    base_cfg = load.load(base)
    with coco_json.parsed_once():
        statistics = gather(files)
        prefix = data.image_prefix([statistics.first_image])
        for file in files.values():
            read_split(file, root / prefix, statistics.classes)
    text, lines = compose(
        base_cfg,
        statistics,
        base=_base_path(base, out),
        run=_from_here(out),
        root=f'{_from_here(root).rstrip("/")}/',
        name=name,
        prefix=prefix,
        splits=list(files),
        images_per_gpu=images_per_gpu,
        epochs=epochs,
        flip=list(dict.fromkeys(flip)),
    )
    # Beside the file, since its base may be named relative to it; and not in its place yet.
    trial = out.with_name(f'new_config_{os.getpid()}_{out.name}')
    try:
        atomic_write_text(trial, text)
        cfg = load.load(trial)
        paths.check_heads(cfg)
    finally:
        trial.unlink(missing_ok=True)
    atomic_write_text(out, text)
    return Written(out, lines)


def _check_arguments(
    name: str, out: Path | None, base: Path, images_per_gpu: int | None, epochs: int | None, overwrite: bool
) -> Path:
    """What can be said without looking at the data; returns the file to write."""
    if not re.fullmatch(r'\w[\w-]*', name):
        near = re.sub(r'\W+', '_', name).strip('_')
        raise UserError(
            f'--name {name!r}: a name has letters, digits, _ and - only',
            cure=f'e.g. --name {near}' if near else 'e.g. --name tiles',
        )
    wrong = [
        f'{flag} {value}'
        for flag, value in (('--images-per-gpu', images_per_gpu), ('--epochs', epochs))
        if value is not None and value < 1
    ]
    if wrong:
        raise UserError('These must be 1 or more:', wrong)
    out = out or Path('configs') / f'{name}.py'
    if out.suffix != '.py':
        raise UserError(f'--out {out}: the name of a config ends in .py', cure=f'e.g. --out {out.with_suffix(".py")}')
    if out.exists() and base.exists() and out.samefile(base):
        raise UserError(f'{out} would inherit from itself', cure='take another --name or --out')
    if out.exists() and not overwrite:
        raise UserError(f'{out} is there already', cure='take another --name or --out, or replace it with --overwrite')
    return out


def compose(
    base_cfg: Config,
    statistics: Statistics,
    *,
    base: str,
    run: str,
    root: str,
    name: str,
    prefix: str,
    splits: Sequence[str],
    images_per_gpu: int | None = None,
    epochs: int | None = None,
    flip: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The text of the config, and lines to print about it.

    Args:
        base_cfg: The loaded base.
        statistics: Of the data.
        base: What to write as ``_base_``.
        run: The config's path, for the command at its top.
        root: Data folder, with a slash at its end.
        name: Of the work dir.
        prefix: Folder of the images in ``root``, with a slash at its end, or ''.
        splits: Those there are.
        images_per_gpu: Or None for the base's.
        epochs: Or None.
        flip: Directions, or none for the base's.

    Raises:
        UserError: The base lacks what is to be changed.
    """
    _check_base(base_cfg)
    images = statistics.images['train']
    empty = images - statistics.with_objects
    negatives = 0 < empty <= statistics.with_objects
    batch_size = images_per_gpu or base_cfg.train_dataloader['batch_size']
    schedule = sizing.plan_schedule(
        images if negatives else statistics.with_objects,
        statistics.images['val'],
        batch_size,
        base_cfg.train_cfg['max_epochs'],
        base_cfg.get('param_scheduler') or [],
        epochs,
    )
    resizes = dict(_resizes(base_cfg))
    generator = base_cfg.model['rpn_head']['anchor_generator']
    scale = (
        sizing.plan_scale(statistics, next(iter(resizes.values())), generator['scales'], generator['strides'])
        if resizes
        else None
    )
    notes = [
        f'{len(statistics.classes):,} classes, {images:,} training images, {len(statistics.objects):,} objects',
        scale.why if scale else 'Input size: left as it is, the base has no Resize to a box.',
        schedule.why,
    ]
    if empty:
        notes.append(
            f'{empty:,} training images without annotations: '
            + (
                'trained on as well, to learn what is no object.'
                if negatives
                else 'left out, being more than those with.'
            )
        )
    parts = [
        _head(statistics, schedule, base, run, name, root, bool(base_cfg.get('demo_data'))),
        [
            f'dataset = dict(data_root=data_root, data_prefix=dict(img={prefix!r}), metainfo=dict(classes=classes))',
            *_model(base_cfg, statistics, scale),
        ],
        (_comment(scale.why) if scale else [])
        + [f'_base_.{place}.scale = {scale.size}' for place in resizes]
        + _flips(base_cfg, flip),
        (_comment(notes[-1]) if empty else [])
        + _loaders('test' in splits, images_per_gpu, negatives, statistics.sizes.min() < _MIN_SIZE),
        _comment(schedule.why) + _length(base_cfg, schedule),
    ]
    if sum(map(len, parts)) >= MAX_LINES:
        parts = [_unwrapped(part) for part in parts]
    room = MAX_LINES - sum(map(len, parts))
    parts[0] += _classes(statistics.classes, max(1, room - len(parts) + 1))
    room = MAX_LINES - sum(map(len, parts))
    lines = []
    for part in filter(None, parts):
        if lines and room > 0:
            lines.append('')
            room -= 1
        lines += part
    return '\n'.join(lines) + '\n', notes + _warnings(statistics)


def _head(
    statistics: Statistics, schedule: sizing.Schedule, base: str, run: str, name: str, root: str, demo: bool
) -> list[str]:
    steps = f'{schedule.epochs * schedule.steps:,} steps'
    return [
        f'# {len(statistics.classes):,} classes, {statistics.images["train"]:,} training '
        f'images, {len(statistics.objects):,} objects. Written by tools/new_config.py.',
        f'# Run:     python tools/train_pretrained.py {shlex.quote(run)}',
        f'# Expect:  the best checkpoint by mask mAP in work_dirs/{name}/, after {steps}.',
        f'_base_ = {base!r}',
        f"work_dir = 'work_dirs/{name}'",
        f'data_root = {root!r}',
        *(['demo_data = None  # the base would draw its own'] if demo else []),
    ]


def _classes(names: Sequence[str], room: int) -> list[str]:
    """The class list; on one long line where there are too many for short ones."""
    opening = 'classes = ('
    items = [repr(name) for name in names]
    closing = ',)' if len(items) == 1 else ')'
    lines = _filled(opening, items, closing)
    if len(lines) <= room:
        return lines
    return [f'{opening}{", ".join(items)}{closing}  # noqa: E501']


def _model(base_cfg: Config, statistics: Statistics, scale: sizing.Scale | None) -> list[str]:
    count = len(statistics.classes)
    items = [f'roi_head=dict(bbox_head=dict(num_classes={count}), mask_head=dict(num_classes={count}))']
    if scale and scale.anchors:
        items.insert(0, f'rpn_head=dict(anchor_generator=dict(scales={scale.anchors}))')
    test = base_cfg.model['test_cfg']
    # False detections take places too.
    wanted, room = 2 * statistics.most_objects, test['rcnn']['max_per_img']
    if wanted > room:
        room = -(-wanted // 50) * 50
        proposals = max(test['rpn']['max_per_img'], 2 * room)
        items.append(f'test_cfg=dict(rcnn=dict(max_per_img={room}), rpn=dict(max_per_img={proposals}))')
    return _filled('model = dict(', items, ')')


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent='# ', subsequent_indent='#   ')


def _unwrapped(lines: Sequence[str]) -> list[str]:
    """The lines with each comment and each setting on one, however long."""
    text = re.sub(r'([\[(]?)\n(?:#   | +)', lambda m: m[1] or ' ', '\n'.join(lines))
    return [f'{line}  # noqa: E501' if len(line) > WIDTH else line for line in text.splitlines()]


def _flips(base_cfg: Config, directions: Sequence[str]) -> list[str]:
    """Each direction, and none at all, with the same probability."""
    if not directions:
        return []
    places = [
        i for i, step in enumerate(base_cfg.train_dataloader['dataset']['pipeline']) if step.get('type') == 'RandomFlip'
    ]
    if not places:
        raise UserError('--flip: the training pipeline of the base has no RandomFlip', cure=_SUITABLE)
    share = round(1 / (len(directions) + 1), 3)
    return _filled(
        f'_base_.train_dataloader.dataset.pipeline[{places[0]}].update(',
        [f'prob={[share] * len(directions)}', f'direction={list(directions)}'],
        ')',
        hanging=True,
    )


def _loaders(test: bool, images_per_gpu: int | None, negatives: bool, tiny: bool) -> list[str]:
    def loader(split: str, before: Sequence[str] = (), inside: Sequence[str] = ()) -> list[str]:
        file = f"dataset=dict(ann_file='annotations/{file_name(split)}'"
        return _filled(f'{split}_dataloader = dict(', [*before, file, *inside, '**dataset'], '))')

    def evaluator(split: str) -> str:
        return f"{split}_evaluator = dict(ann_file=data_root + 'annotations/{file_name(split)}')"

    filters = [*(['filter_empty_gt=False'] if negatives else []), *(['min_size=1'] if tiny else [])]
    lines = [
        *loader(
            'train',
            [f'batch_size={images_per_gpu}'] if images_per_gpu else [],
            [f'filter_cfg=dict({", ".join(filters)})'] if filters else [],
        ),
        *loader('val'),
        evaluator('val'),
    ]
    if test:
        return [*lines, *loader('test'), evaluator('test')]
    return [*lines, 'test_dataloader, test_evaluator = val_dataloader, val_evaluator']


def _length(base_cfg: Config, schedule: sizing.Schedule) -> list[str]:
    lines = [f'train_cfg = dict(max_epochs={schedule.epochs}, val_interval={schedule.val_interval})']
    if base_cfg.get('param_scheduler'):
        dicts = ['dict(' + ', '.join(f'{k}={v!r}' for k, v in s.items()) + ')' for s in schedule.schedulers]
        lines += _filled('param_scheduler = [', dicts, ']', hanging=True)
    hooks = base_cfg.get('default_hooks') or {}
    wanted = {
        'logger': min(schedule.steps, hooks.get('logger', {}).get('interval', 10)),
        'checkpoint': schedule.val_interval,
    }
    items = [
        f'{hook}=dict(interval={interval})'
        for hook, interval in wanted.items()
        if hook in hooks and hooks[hook].get('interval') != interval
    ]
    return lines + (_filled('default_hooks = dict(', items, ')') if items else [])


def _filled(opening: str, items: Sequence[str], closing: str, hanging: bool = False) -> list[str]:
    """Items between brackets: on one line, or on as many as the width asks for.

    Args:
        opening: Up to the bracket.
        items: Never broken.
        closing: The bracket.
        hanging: Whether they begin below the opening rather than beside it.
    """
    one = f'{opening}{", ".join(items)}{closing}'
    if len(one) <= WIDTH:
        return [one]
    indent = ' ' * (4 if hanging else len(opening))
    lines = [opening, indent] if hanging else [opening]
    pieces = [*(f'{item},' for item in items[:-1]), items[-1] + closing]
    lines[-1] += pieces[0]
    for piece in pieces[1:]:
        if len(f'{lines[-1]} {piece}') > WIDTH:
            lines.append(indent + piece)
        else:
            lines[-1] += f' {piece}'
    return lines


def _resizes(base_cfg: Config) -> Iterator[tuple[str, tuple[int, int]]]:
    """Place and box of the step of each pipeline that fits images into a box."""
    for split in SPLITS:
        for i, step in enumerate(base_cfg[f'{split}_dataloader']['dataset']['pipeline']):
            scale = step.get('scale')
            if (
                str(step.get('type')).endswith('Resize')
                and isinstance(scale, tuple)
                and all(isinstance(side, int) for side in scale)
            ):
                yield f'{split}_dataloader.dataset.pipeline[{i}]', scale
                break


def _check_base(base_cfg: Config) -> None:
    needed = [f'{s}_dataloader.dataset.pipeline' for s in SPLITS]
    needed += [
        'val_evaluator.ann_file',
        'test_evaluator.ann_file',
        'train_cfg.max_epochs',
        'train_dataloader.batch_size',
        'model.rpn_head.anchor_generator.scales',
        'model.roi_head.bbox_head.num_classes',
        'model.roi_head.mask_head.num_classes',
        'model.test_cfg.rcnn.max_per_img',
        'model.test_cfg.rpn.max_per_img',
    ]

    def has(dotted: str) -> bool:
        node: Any = base_cfg
        for key in dotted.split('.'):
            if (not isinstance(node, Mapping) and node is not base_cfg) or key not in node:
                return False
            node = node[key]
        return node is not None

    lacking = [dotted for dotted in needed if not has(dotted)]
    if lacking:
        raise UserError('The base lacks settings that are to be fitted to the data:', lacking, _SUITABLE)


def _warnings(statistics: Statistics) -> list[str]:
    """What the user should know of the data before training."""
    names = statistics.classes
    none = [name for name, n in zip(names, statistics.per_class, strict=True) if n == 0]
    one = [name for name, n in zip(names, statistics.per_class, strict=True) if n == 1]
    lines = []
    for found, what in (
        (none, 'without an object in the training images: never found'),
        (one, 'in a single training image: hardly learnt'),
    ):
        if found:
            more = f' and {len(found) - 10} more' if len(found) > 10 else ''
            lines.append(
                f'Warning: {len(found)} of {len(names)} classes {what}: {", ".join(map(str, found[:10]))}{more}'
            )
    if statistics.most_objects > 100:
        lines.append(
            f'Up to {statistics.most_objects} objects an image; the AP of COCO counts '
            'the 100 best detections of an image only'
        )
    return lines


def _from_here(path: Path) -> str:
    """A path as configs have them: relative to the working folder if it lies in it."""
    # Without resolving links: data folders often are some.
    absolute, here = Path(os.path.normpath(Path.cwd() / path)), Path.cwd()
    return (absolute.relative_to(here) if absolute.is_relative_to(here) else absolute).as_posix()


def _base_path(base: Path, out: Path) -> str:
    """``_base_`` as it must be in a file at ``out``: relative within the base's folder."""
    base, folder = base.resolve(), out.resolve().parent
    if folder.is_relative_to(base.parent):
        relative = Path(os.path.relpath(base, folder)).as_posix()
        return relative if relative.startswith('.') else f'./{relative}'
    return base.as_posix()
