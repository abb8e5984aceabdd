"""The report of a check: as text for the terminal, and as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np

from mmfinetune.data.check.findings import Example, Report
from mmfinetune.data.check.kinds import SEVERITIES
from mmfinetune.utils.files import atomic_write_text
from mmfinetune.utils.masks import check_rle, to_rle
from mmfinetune.utils.text import plural

_PICTURES = 60  # on a page, each about 15 kB
_SIDE = 300  # px of a picture
_BOX_COLOUR = (255, 150, 0)
_SURROUNDINGS, _LEAST_CROP = 1.0, 96  # px kept around an object: times its side, at least


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

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    left = _PICTURES
    shown = []
    for finding in report.findings:
        pictures = [(str(example), picture(example)) for example in finding.examples[:left]]
        pictures = [(caption, source) for caption, source in pictures if source]
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

    pixels = _read(example.path) if example.path else None
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
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
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


def write_html(report: Report, path: Path) -> None:
    """Write `as_html` to a file.

    Raises:
        UserError: It cannot be written.
    """
    atomic_write_text(path, as_html(report))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #202124; --soft: #5f6368; --line: #dadce0; --error: #b3261e; --warning: #b06000;
  --note: #1a5fb4; --bar: #7aa2d6; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: .9rem 0 .35rem; }
.soft, figcaption { color: var(--soft); }
.path { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin-top: .8rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.finding { border: 1px solid var(--line); border-left: 5px solid; border-radius: 4px;
  padding: .7rem 1rem; margin: .8rem 0; overflow-wrap: anywhere; }
.error { border-left-color: var(--error); } .warning { border-left-color: var(--warning); }
.note { border-left-color: var(--note); }
.tag { font-weight: 600; font-size: .8rem; text-transform: uppercase; margin-right: .5rem; }
.error .tag { color: var(--error); } .warning .tag { color: var(--warning); }
.note .tag { color: var(--note); }
code { font-size: .85em; background: #f1f3f4; padding: .05rem .3rem; border-radius: 3px; }
ul { margin: .4rem 0; padding-left: 1.2rem; }
.pictures { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: .6rem; }
figure { margin: 0; width: 200px; }
figure img { max-width: 200px; max-height: 200px; display: block; border: 1px solid var(--line); }
figcaption { font-size: .78rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr));
  gap: 0 2rem; align-items: start; }
.bars { display: grid; grid-template-columns: minmax(4rem, max-content) 1fr max-content;
  gap: 1px .5rem; font-size: .82rem; align-items: center; }
.bars .label { max-width: 11rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bars .bar { background: var(--bar); height: .75rem; min-width: 1px; border-radius: 0 2px 2px 0; }
.bars .n { text-align: right; font-variant-numeric: tabular-nums; color: var(--soft); }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ counts }}{{ '' if report.images_read else '; image files not read' }}</p>
<table>
<tr><th>split</th><th class="n">images</th><th class="n">objects</th><th class="n">crowd</th>
<th class="n">classes</th><th>file</th></tr>
{% for split in report.splits %}
<tr><td>{{ split.name }}</td><td class="n">{{ '{:,}'.format(split.images) }}</td>
<td class="n">{{ '{:,}'.format(split.annotations - split.crowd) }}</td>
<td class="n">{{ '{:,}'.format(split.crowd) }}</td><td class="n">{{ split.per_class|length }}</td>
<td class="path">{{ split.path }}<br><span class="soft">images in {{ split.image_root }}</span></td>
</tr>
{% endfor %}
</table>
<h2>Findings</h2>
{% if not shown %}<p>Nothing to report.</p>{% endif %}
{% for finding, pictures in shown %}
<div class="finding {{ finding.severity }}">
<span class="tag">{{ finding.severity }}</span>{{ finding.line(0) }}
<div class="soft">Hint: {{ finding.kind.hint }}</div>
{% if pictures %}
<div class="pictures">
{% for caption, source in pictures %}
<figure><img src="{{ source }}" alt=""><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% elif finding.examples %}
<ul>{% for example in finding.examples %}<li>{{ example }}</li>{% endfor %}</ul>
{% endif %}
{% if finding.count > finding.examples|length and finding.examples %}
<div class="soft">… and {{ '{:,}'.format(finding.count - finding.examples|length) }} more</div>
{% endif %}
</div>
{% endfor %}
{% for split, charts in splits %}
<h2>{{ split.name }}</h2>
<div class="charts">
{% for name, bars in charts %}
<div><h3>{{ name }}</h3>
<div class="bars">
{% for label, number, share in bars %}
<span class="label" title="{{ label }}">{{ label }}</span>
<div>{% if number %}<div class="bar" style="width: {{ share }}%"></div>{% endif %}</div>
<span class="n">{{ '{:,}'.format(number) }}</span>
{% endfor %}
</div></div>
{% endfor %}
</div>
{% endfor %}
</body>
</html>
"""
