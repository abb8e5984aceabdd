"""Write a short config for your own data, its numbers worked out from the data."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import flatten, load, paths, sizing
from mmfinetune.data import coco_json
from mmfinetune.data.layout import SPLITS, Prepared, file_name
from mmfinetune.data.preflight import read_split
from mmfinetune.data.statistics import Statistics, gather
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import atomic_write_text, require_writable

if TYPE_CHECKING:
    from mmengine.config import Config


WIDTH = 100
# mmdet leaves out images with a side under 32 px without a word, as the VOC base sets it.
_MIN_SIZE = 32
FLIPS = ('horizontal', 'vertical', 'diagonal')  # the names of mmdet's RandomFlip


@dataclass(frozen=True)
class Places:
    """Names and paths as they stand in the config.

    Attributes:
        name: Name of the work dir.
        base: ``_base_``.
        config: Path of the config, for the command at its top.
        root: Data folder, with a slash at its end.
        prefix: Folder of the images in ``root``, with a slash at its end, or ''.
        splits: Splits that have an annotation file.
    """

    name: str
    base: str
    config: str
    root: str
    prefix: str
    splits: Sequence[str]


def write(
    root: Path,
    name: str,
    out: Path | None = None,
    base: Path = Path('configs/mask_rcnn_voc_pretrained.py'),
    batch_size: int | None = None,
    epochs: int | None = None,
    flip: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[Path, list[str]]:
    """Write a short config for the data in a folder, and make sure that it loads.

    Args:
        root: Folder with ``annotations/instances_{train,val[,test]}.json`` and ``images/``.
        name: Name of the config and of its work dir.
        out: The file (default: ``configs/<name>.py``).
        base: Config to inherit from.
        batch_size: Images per step on one GPU (default: the base's).
        epochs: Length of the training (default: worked out, see `sizing.plan_schedule`).
        flip: Directions of random flips, from `FLIPS` (default: the base's).
        overwrite: Whether to replace the file.

    Returns:
        The file, and lines to print about it.

    Raises:
        UserError: Bad arguments, or data that cannot be trained on; nothing is written then.
    """
    out = _checked_out(name, out, base, overwrite)
    data = Prepared(root)
    files = data.splits()
    base_cfg = load.load(base)
    with coco_json.parsed_once():
        statistics = gather(files)
        prefix = data.image_prefix([statistics.first_image])
        for file in files.values():
            read_split(file, root / prefix, statistics.classes)
    folder = f'{_from_here(root).rstrip("/")}/'
    places = Places(name, _base_path(base, out), _from_here(out), folder, prefix, list(files))
    text, lines = compose(base_cfg, statistics, places, batch_size, epochs, list(dict.fromkeys(flip)))
    # Next to the file, since its base may be named relative to it; and not in its place yet.
    trial = out.with_name(f'new_config_{os.getpid()}_{out.name}')
    try:
        atomic_write_text(trial, text)
        paths.check_heads(load.load(trial))
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
    atomic_write_text(out, text)
    return out, lines


def _checked_out(name: str, out: Path | None, base: Path, overwrite: bool) -> Path:
    """The file to write, after what can be said without looking at the data."""
    if not re.fullmatch(r'\w[\w-]*', name):
        raise UserError('new-config-name', name=name, near=re.sub(r'\W+', '_', name).strip('_') or 'tiles')
    out = out or Path('configs') / f'{name}.py'
    if out.suffix != '.py':
        raise UserError('new-config-suffix', path=str(out), near=str(out.with_suffix('.py')))
    if out.exists() and base.exists() and out.samefile(base):
        raise UserError('new-config-own-base', path=str(out))
    flatten.require_new(out, overwrite)
    require_writable(out.parent)
    return out


def compose(
    base_cfg: Config,
    statistics: Statistics,
    places: Places,
    batch_size: int | None = None,
    epochs: int | None = None,
    flip: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The text of the config, and lines to print about it.

    See `write` for what is optional.

    Raises:
        UserError: The base lacks what is to be changed.
    """
    from yapf.yapflib.yapf_api import FormatCode

    _check_base(base_cfg)
    images = statistics.images['train']
    empty = images - statistics.with_objects
    negatives = 0 < empty <= statistics.with_objects
    schedule = sizing.plan_schedule(
        images if negatives else statistics.with_objects,
        statistics.images['val'],
        batch_size or base_cfg.train_dataloader['batch_size'],
        base_cfg.train_cfg['max_epochs'],
        base_cfg.get('param_scheduler') or [],
        epochs,
    )
    resizes = dict(_resizes(base_cfg))
    scale = None
    if resizes:
        anchors = base_cfg.model['rpn_head']['anchor_generator']
        scale = sizing.plan_scale(statistics, next(iter(resizes.values())), anchors['scales'], anchors['strides'])
    counts = f'{len(statistics.classes):,} classes, {images:,} training images, {len(statistics.objects):,} objects'
    size = scale.why if scale else 'Input size: that of the base, which has no Resize to a box.'
    about_empty = _about_empty(empty, negatives)
    where = f'data_root=data_root, data_prefix=dict(img={places.prefix!r})'
    parts = [
        _head(counts, schedule, places, bool(base_cfg.get('demo_data'))),
        [
            f'classes = {tuple(statistics.classes)!r}',
            f'dataset = dict({where}, metainfo=dict(classes=classes))',
            _model(base_cfg, statistics, scale),
        ],
        [*_comments(size), *(f'_base_.{p}.scale = {scale.size}' for p in resizes if scale), *_flips(base_cfg, flip)],
        [*_comments(about_empty), *_loaders(places, batch_size, negatives, statistics.sizes.min() < _MIN_SIZE)],
        [*_comments(schedule.why), *_length(base_cfg, schedule)],
    ]
    text = '\n\n'.join('\n'.join(part) for part in parts)
    # Wrapped by the formatter that MMEngine writes configs with.
    style = dict(based_on_style='pep8', column_limit=WIDTH, split_before_expression_after_opening_paren=True)
    notes = filter(None, [counts, size, schedule.why, about_empty])
    return FormatCode(text, style_config=style)[0], [*notes, *_warnings(statistics)]


def _comments(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent='# ', subsequent_indent='#   ')


def _about_empty(empty: int, negatives: bool) -> str:
    fate = 'trained on as well, to learn what is not an object' if negatives else 'left out, being more than those with'
    return f'{empty:,} training images without annotations: {fate}.' if empty else ''


def _head(counts: str, schedule: sizing.Schedule, places: Places, demo: bool) -> list[str]:
    return [
        f'# {counts}. Written by tools/new_config.py.',
        f'# Run:     python tools/train_pretrained.py {shlex.quote(places.config)}',
        f'# Expect:  the best checkpoint by mask mAP in work_dirs/{places.name}/, '
        f'after {schedule.epochs * schedule.steps:,} steps.',
        f'_base_ = {places.base!r}',
        f"work_dir = 'work_dirs/{places.name}'",
        f'data_root = {places.root!r}',
        *(['demo_data = None  # the base would draw its own'] if demo else []),
    ]


def _model(base_cfg: Config, statistics: Statistics, scale: sizing.Scale | None) -> str:
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
    return f'model = dict({", ".join(items)})'


def _flips(base_cfg: Config, directions: Sequence[str]) -> list[str]:
    """Each direction, and none at all, with the same probability."""
    if not directions:
        return []
    steps = base_cfg.train_dataloader['dataset']['pipeline']
    places = [i for i, step in enumerate(steps) if step.get('type') == 'RandomFlip']
    if not places:
        raise UserError('new-config-no-flip')
    shares = [round(1 / (len(directions) + 1), 3)] * len(directions)
    place = f'_base_.train_dataloader.dataset.pipeline[{places[0]}]'
    return [f'{place}.update(prob={shares}, direction={list(directions)})']


def _loaders(places: Places, batch_size: int | None, negatives: bool, tiny: bool) -> list[str]:
    batch = f'batch_size={batch_size}, ' if batch_size else ''
    filters = [*(['filter_empty_gt=False'] if negatives else []), *(['min_size=1'] if tiny else [])]
    kept = f'filter_cfg=dict({", ".join(filters)}), ' if filters else ''
    lines = []
    for split in (s for s in SPLITS if s in places.splits):
        first, more = (batch, kept) if split == 'train' else ('', '')
        file = f'annotations/{file_name(split)}'
        lines.append(f'{split}_dataloader = dict({first}dataset=dict(ann_file={file!r}, {more}**dataset))')
        if split != 'train':
            lines.append(f'{split}_evaluator = dict(ann_file=data_root + {file!r})')
    if 'test' in places.splits:
        return lines
    return [*lines, 'test_dataloader, test_evaluator = val_dataloader, val_evaluator']


def _length(base_cfg: Config, schedule: sizing.Schedule) -> list[str]:
    lines = [f'train_cfg = dict(max_epochs={schedule.epochs}, val_interval={schedule.val_interval})']
    if base_cfg.get('param_scheduler'):
        dicts = ['dict(' + ', '.join(f'{k}={v!r}' for k, v in s.items()) + ')' for s in schedule.schedulers]
        lines.append(f'param_scheduler = [{", ".join(dicts)}]')
    hooks = base_cfg.get('default_hooks') or {}
    wanted = {
        'logger': min(schedule.steps, hooks.get('logger', {}).get('interval', 10)),
        'checkpoint': schedule.val_interval,
    }
    changed = [hook for hook in wanted if hook in hooks and hooks[hook].get('interval') != wanted[hook]]
    if changed:
        lines.append(f'default_hooks = dict({", ".join(f"{h}=dict(interval={wanted[h]})" for h in changed)})')
    return lines


def _resizes(base_cfg: Config) -> Iterator[tuple[str, tuple[int, int]]]:
    """Place and box of the step of each pipeline that fits images into a box."""
    for split in SPLITS:
        for i, step in enumerate(base_cfg[f'{split}_dataloader']['dataset']['pipeline']):
            scale = step.get('scale')
            is_box = isinstance(scale, tuple) and all(isinstance(side, int) for side in scale)
            if is_box and str(step.get('type')).endswith('Resize'):
                yield f'{split}_dataloader.dataset.pipeline[{i}]', scale
                break


def _check_base(base_cfg: Config) -> None:
    settings = base_cfg.to_dict()
    needed = [
        *(f'{split}_dataloader.dataset.pipeline' for split in SPLITS),
        *(f'{split}_evaluator.ann_file' for split in ('val', 'test')),
        *('train_cfg.max_epochs', 'train_dataloader.batch_size', 'model.rpn_head.anchor_generator.scales'),
        *(f'model.roi_head.{head}_head.num_classes' for head in ('bbox', 'mask')),
        *(f'model.test_cfg.{part}.max_per_img' for part in ('rcnn', 'rpn')),
    ]

    def has(dotted: str) -> bool:
        node: Any = settings
        for key in dotted.split('.'):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node is not None

    lacking = [dotted for dotted in needed if not has(dotted)]
    if lacking:
        raise UserError('new-config-base', problems=lacking)


def _warnings(statistics: Statistics) -> list[str]:
    """What the user should know of the data before training."""
    names = statistics.classes
    lines = []
    for images, what in (
        (0, 'without an object in the training images: never found'),
        (1, 'in a single training image: hardly learnt'),
    ):
        found = [str(name) for name, n in zip(names, statistics.per_class, strict=True) if n == images]
        if found:
            more = f' and {len(found) - 10} more' if len(found) > 10 else ''
            lines.append(f'Warning: {len(found)} of {len(names)} classes {what}: {", ".join(found[:10])}{more}')
    if statistics.most_objects > 100:
        lines.append(
            f'Up to {statistics.most_objects} objects an image; the AP of COCO counts '
            'the 100 best detections of an image only'
        )
    return lines


def _from_here(path: Path) -> str:
    """A path as configs have them: relative to the working folder if it is in it."""
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
