"""The report of a check: as text for the terminal, and as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from mmfinetune.data.check.findings import Example, Report
from mmfinetune.data.check.kinds import SEVERITIES
from mmfinetune.utils.images import open_image
from mmfinetune.utils.masks import check_rle, to_rle
from mmfinetune.utils.text import plural

_PICTURES = 60  # on a page, each about 15 kB
_SIDE = 300  # px of a picture
_BOX_COLOUR = (255, 150, 0)
_SURROUNDINGS, _LEAST_CROP = 1.0, 96  # px kept around an object: times its side, at least
_PAGE = Path(__file__).with_name('report.html')


def counts(report: Report) -> str:
    """``2 kinds of errors, no warnings, 1 kind of notes``."""
    words = []
    for severity in SEVERITIES:
        number = len(report.of(severity))
        words.append(f'{plural(number, "kind")} of {severity}s' if number else f'no {severity}s')
    return ', '.join(words)


def as_text(report: Report, examples: int = 5) -> str:
    """The report for the terminal."""
    width = max([5, *(len(s.name) for s in report.splits)])
    lines = [f'{"split":{width}}{"images":>10}{"objects":>10}{"crowd":>8}{"classes":>9}']
    lines += [
        f'{s.name:{width}}{s.images:>10,}{s.annotations - s.crowd:>10,}{s.crowd:>8,}{len(s.per_class):>9}  {s.path}'
        for s in report.splits
    ]
    for finding in report.findings:
        lines += ['', f'{finding.severity}: {finding.line(0)}']
        lines += [f'    {example}' for example in finding.examples[:examples]]
        hidden = finding.count - min(examples, len(finding.examples))
        if hidden and finding.examples:
            lines.append(f'    … and {hidden:,} more')
        lines.append(f'    hint: {finding.kind.hint}')
    what = '' if report.images_read else ' (image files not read)'
    when = 'known from an earlier check' if report.cached else 'checked'
    lines += ['', f'{counts(report)}; {when}{what} in {report.seconds:.1f} s']
    return '\n'.join(lines)


def as_html(report: Report, title: str = 'Data set report') -> str:
    """One page that needs no other file; all text of the data is escaped."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _PAGE.read_text(encoding='utf-8')
    )
    left, shown = _PICTURES, []
    for finding in report.findings:
        pictures = [(str(example), source) for example in finding.examples[:left] if (source := picture(example))]
        left -= len(pictures)
        shown.append((finding, pictures))
    charts = {
        'Objects of each class': 'per_class',
        'Objects in an image': 'per_image',
        'Mask side, √area in px': 'mask_sides',
        'Image sizes': 'sizes',
        'Width / height': 'aspects',
    }
    splits = [
        (split, [(chart, _bars(getattr(split, name))) for chart, name in charts.items()]) for split in report.splits
    ]
    return template.render(title=title, report=report, shown=shown, splits=splits, counts=counts(report))


def _bars(values: dict[str, int]) -> list[tuple[str, int, float]]:
    """Label, count and length in per cent."""
    largest = max(values.values(), default=0) or 1
    return [(label, number, round(100 * number / largest, 1)) for label, number in values.items()]


def picture(example: Example) -> str:
    """A data URL of the place of an example, its mask and box drawn; empty if there is none."""
    from PIL import Image, ImageDraw

    from mmfinetune.data.drawing import draw_instances, side_by_side

    pixels = _read(example.path)
    if pixels is None:
        return ''
    height, width = pixels.shape[:2]
    mask = _mask(example.shape, height, width)
    box = None
    if example.box is not None and np.abs(example.box).max() < 1e6:
        box = np.array(example.box, float)
        box[2:] += box[:2]
    left, top, right, bottom = _region(mask, box, width, height)
    drawn = pixels[top:bottom, left:right]
    if mask is not None:
        drawn = draw_instances(drawn, masks=mask[None, top:bottom, left:right])
    other = _read(example.other)
    if other is not None:
        drawn = side_by_side(drawn, other)
    small = Image.fromarray(drawn)
    small.thumbnail((_SIDE, _SIDE))
    if box is not None and other is None:
        # Drawn last, so that its line is as wide on all pictures.
        scale = small.width / (right - left)
        corners = np.clip((box - [left, top, left, top]) * scale, 0, np.array(small.size * 2) - 1)
        if (corners[2:] >= corners[:2]).all():
            ImageDraw.Draw(small).rectangle(corners.tolist(), outline=_BOX_COLOUR, width=2)
    file = io.BytesIO()
    small.save(file, 'JPEG', quality=80)
    return 'data:image/jpeg;base64,' + base64.b64encode(file.getvalue()).decode()


def _read(path: str) -> np.ndarray | None:
    """An image (H, W, 3) as training reads it, RGB."""
    from PIL import ImageOps

    try:
        with open_image(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
    # A finding may be about an image that no decoder likes.
    except Exception:
        return None


def _region(mask: np.ndarray | None, box: np.ndarray | None, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is shown: the object and as much around it."""
    corners = [] if box is None else [box]
    if mask is not None and mask.any():
        y, x = np.nonzero(mask)
        corners.append(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]))
    if not corners:
        return 0, 0, width, height
    low, high = np.min(corners, 0)[:2], np.max(corners, 0)[2:]
    margin = np.maximum(_SURROUNDINGS * (high - low), (_LEAST_CROP - (high - low)) / 2)
    left, top = np.clip(low - margin, 0, [width, height]).astype(int)
    right, bottom = np.clip(np.ceil(high + margin), 0, [width, height]).astype(int)
    if right - left < 8 or bottom - top < 8:
        return 0, 0, width, height
    return int(left), int(top), int(right), int(bottom)


def _mask(shape: object, height: int, width: int) -> np.ndarray | None:
    """The mask of a segmentation that may be damaged, bool (height, width)."""
    from pycocotools import mask as mask_api

    try:
        if isinstance(shape, list):
            limit = 4 * max(height, width)
            parts = [part[: len(part) // 2 * 2] for part in shape if len(part) >= 6]
            rle = to_rle([part for part in parts if np.abs(part).max() < limit], height, width)
        else:
            rle = check_rle(shape, height, width)
    except (ValueError, IndexError):
        return None
    return mask_api.decode(rle).astype(bool)
