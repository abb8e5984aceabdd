"""The figures of a run: what is drawn, names of any script, and sizes."""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfinetune.evaluation import plots
from mmfinetune.evaluation.history import History
from mmfinetune.utils import fonts
from tests.builders.runs import REPO

# Matplotlib brings a font along that has this letter, which its default font lacks.
BOLD_A, OTHER_FONT = '\U0001d504', 'STIXGeneral'
CHINESE = '\u6d88\u9632\u6813'


@pytest.fixture(autouse=True)
def _strict():
    """No warning of a layout that does not fit, of missing letters, of an axis without extent."""
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.simplefilter('ignore', ResourceWarning)  # of whatever an earlier test left to the collector
        yield
    forget()


@pytest.fixture
def no_wide_fonts(monkeypatch):
    """As on a machine without Chinese letters."""
    monkeypatch.setattr(fonts, 'WIDE_FONTS', ())


def forget() -> None:
    plots._families.cache_clear()
    plots._has_glyph.cache_clear()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))


def count(png: bytes, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((pixels(png) == wanted).all(axis=-1).sum())


def history(epochs: int, **names: float) -> History:
    return History({'epoch': e, 'iter': e, **{k: v / e for k, v in names.items()}} for e in range(1, epochs + 1))


FULL = {
    'train/loss': 2.0,
    'val/loss': 2.5,
    'coco/bbox_mAP': 0.3,
    'coco/segm_mAP': 0.2,
    'coco/segm_mAP_50': 0.4,
    'lr': 0.02,
    'lr/neck': 0.01,
    'lr/roi_head': 0.02,
}


def test_titles():
    assert [
        plots.title_of(m)
        for m in ('coco/segm_mAP', 'coco/segm_mAP_50', 'coco/bbox_mAP_s', 'coco/segm_AP/person', 'val/loss')
    ] == ['mask AP', 'mask AP50', 'box APs', 'coco/segm_AP/person', 'val/loss']


def test_panels_show_what_there_is():
    losses, aps, rates = plots._panels(history(2, **FULL))
    assert losses[1] == {'training': {1: 2.0, 2: 1.0}, 'validation': {1: 2.5, 2: 1.25}}
    assert aps[1] == {'box AP': {1: 0.3, 2: 0.15}, 'mask AP': {1: 0.2, 2: 0.1}, 'mask AP50': {1: 0.4, 2: 0.2}}
    assert rates[1] == {'neck': {1: 0.01, 2: 0.005}, 'roi_head': {1: 0.02, 2: 0.01}}
    # Of one group, or of no ground truth.
    _, aps, rates = plots._panels(history(1, lr=0.5, **{'coco/bbox_mAP': -1.0}))
    assert rates[1] == {'lr': {1: 0.5}} and aps[1]['box AP'] == {}


@pytest.mark.parametrize('epochs', [1, 3, 300])
def test_curves_of_few_and_many_epochs(epochs):
    image = plots.curves(history(epochs, **FULL))
    assert pixels(image).shape == (484, 1650, 3)
    for colour in plots.COLOURS[:3]:
        assert count(image, colour) > 50


@pytest.mark.parametrize('number', [2, 3, 4])
@pytest.mark.parametrize('points', [1, 3, 40])
def test_equal_curves_are_all_seen(number, points):
    figure, (axes,) = plots.new_figure(5, 4)
    plots.lines(axes, [{x: x / points for x in range(1, points + 1)}] * number, 'loss', 'epoch')
    png = plots.png(figure)
    assert all(count(png, colour) > 15 for colour in plots.COLOURS[:number])


def test_panels_without_values_are_left_out():
    assert pixels(plots.curves(history(2, **{'train/loss': 1.0, 'lr': 0.1}))).shape[1] == 1100
    no_loss = {'train/loss': 1.0, 'coco/bbox_mAP': math.nan, 'lr': 0.0}
    assert pixels(plots.curves(history(2, **no_loss))).shape[1] == 1100
    assert pixels(plots.curves(History())).shape[1] == 550
    by_iteration = History([{'iter': 500, 'train/loss': 1.0}, {'iter': 1000, 'train/loss': 0.5}])
    assert pixels(plots.curves(by_iteration)).shape[1] == 550


def test_same_history_same_picture():
    assert plots.curves(history(4, **FULL)) == plots.curves(history(4, **FULL))


def classes(number: int) -> dict[str, dict[str, float]]:
    return {
        f'class {i}': {'segm_AP': i / number / 2, 'segm_AP50': i / number} if i % 5 else {}
        for i in range(1, number + 1)
    }


@pytest.mark.parametrize('number, size', [(0, (715, 202)), (1, (715, 202)), (20, (715, 704)), (203, (2420, 1522))])
def test_bars_of_few_and_many_classes(number, size):
    image = plots.class_bars(classes(number), 'validation after epoch 3')
    assert pixels(image).shape[1::-1] == size
    # AP is half of AP50, but its bar is thinner.
    if number > 1:
        assert count(image, plots.COLOURS[5]) > count(image, plots.COLOURS[0]) > 100


def test_the_best_class_is_on_top():
    image = pixels(
        plots.class_bars({'low': {'segm_AP': 0.1}, 'none': {}, 'high': {'segm_AP': 0.9}, 'mean': {'segm_AP': 0.5}})
    )
    wanted = [int(plots.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    widths = (image == wanted).all(axis=-1).sum(axis=1)
    bars = [w for i, w in enumerate(widths) if w and w != widths[i - 1]]
    assert len(bars) == 3 and bars == sorted(bars, reverse=True)
    assert bars[0] / bars[2] == pytest.approx(9, rel=0.05)


def test_boxes_are_shown_where_there_are_no_masks():
    both = plots.class_bars({'a': {'segm_AP': 0.1, 'bbox_AP': 0.9}})
    boxes = plots.class_bars({'a': {'bbox_AP': 0.9}})
    assert count(boxes, plots.COLOURS[0]) > 5 * count(both, plots.COLOURS[0])


def test_names_that_cannot_be_written_show_their_number(no_wide_fonts):
    names = ['person', CHINESE, f'{CHINESE} 2', 'a\nb', '', '\x07', '$5 or $6', 'na\u00efve', '_x', 'e\u0301', 'x' * 50]
    assert plots.legible(names) == [
        'person',
        '#1 \u25a1\u25a1\u25a1',
        '#2 \u25a1\u25a1\u25a1 2',
        'a b',
        '#4',
        '#5',
        '$5 or $6',
        'na\u00efve',
        '_x',
        'e\u0301',
        'x' * 39 + '\u2026',
    ]


def test_pictures_with_names_of_any_script(no_wide_fonts):
    names = [CHINESE, 'x' * 300, '$x$ $', '<b>', '', '_y', '\U0001f697', 'a\tb']
    values = {name: {'segm_AP': 0.5, 'segm_AP50': 0.7} for name in names}
    assert pixels(plots.class_bars(values, CHINESE)).shape[1] == 715
    assert plots.curves(History([{'epoch': 1, 'iter': 1, f'lr/{n}': 0.1} for n in names[:1]]))


def test_an_installed_font_with_the_letters_is_used(monkeypatch):
    assert plots.legible([BOLD_A]) == ['#0 \u25a1']
    without = plots.class_bars({'\u25a1': {'segm_AP': 0.5}})
    forget()
    monkeypatch.setattr(fonts, 'WIDE_FONTS', ('NoSuchFont.ttf', f'{OTHER_FONT}.ttf'))
    assert plots.legible([BOLD_A, 'plain']) == [BOLD_A, 'plain']
    assert plots.class_bars({BOLD_A: {'segm_AP': 0.5}}, BOLD_A) != without
    assert plots.curves(History([{'epoch': 1, 'iter': 1, f'lr/{BOLD_A}': 0.1}]))


def test_a_font_installed_since_matplotlib_looked_is_found(monkeypatch, tmp_path):
    from matplotlib import font_manager

    other = Path(font_manager.findfont(OTHER_FONT))
    new = tmp_path / 'new.ttf'
    new.write_bytes(other.read_bytes())
    broken = tmp_path / 'broken.ttf'
    broken.write_bytes(b'no font')
    others = [f for f in font_manager.fontManager.ttflist if f.name != OTHER_FONT]
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', others)
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: [str(new), str(broken)])
    monkeypatch.setattr(fonts, 'WIDE_FONTS', ('new.ttf',))
    assert OTHER_FONT in plots._families()


def test_an_environment_that_is_reached_through_links(tmp_path):
    import matplotlib

    # The files of a package store: links, and what they lead to has another name.
    package = Path(matplotlib.__file__).parent
    for path in package.rglob('*'):
        link = tmp_path / 'env/matplotlib' / path.relative_to(package)
        if path.is_dir():
            link.mkdir(parents=True, exist_ok=True)
        else:
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    for number, font in enumerate((tmp_path / 'env').rglob('DejaVuSans*.ttf')):
        shutil.copy(font, tmp_path / f'{number:08x}')
        font.unlink()
        font.symlink_to(tmp_path / f'{number:08x}')
    code = (
        'import matplotlib, mmfinetune.evaluation.plots as plots; from mmfinetune.utils import fonts; '
        'print(matplotlib.__file__, plots._families()[0], plots.class_bars({"a": {"segm_AP": 0.5}})[1:4], '
        'fonts.font_for(12, "a").getname()[0])'
    )
    env = {**os.environ, 'PYTHONPATH': f'{tmp_path}/env:{REPO}', 'MPLCONFIGDIR': str(tmp_path / 'cache')}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == f"{tmp_path}/env/matplotlib/__init__.py DejaVu Sans b'PNG' DejaVu Sans\n"


def test_import_is_cheap():
    code = (
        'import sys, mmfinetune.evaluation.plots, mmfinetune.evaluation.run_results; '
        'print(*{"matplotlib", "numpy", "torch", "mmengine"} & set(sys.modules))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ''
