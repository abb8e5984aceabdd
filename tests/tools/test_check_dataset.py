"""The tool: what it prints and writes, and its exit codes."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmfinetune.data import demo
from tests.builders import voc
from tests.builders.runs import CONFIGS, TRAIN_IMAGES, VAL_IMAGES, drive, files_in, spawn, write_tiny_config

TOOL = 'check_dataset'


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('made')
    devkit = demo.make_voc(folder / 'data/demo', TRAIN_IMAGES, VAL_IMAGES, progress=False)
    voc.convert(devkit, devkit / 'annotations', workers=1, progress=False)
    write_tiny_config(folder / 'tiny.py')
    return folder


@pytest.fixture
def site(made, tmp_path, monkeypatch) -> Path:
    """A prepared folder ``set/`` of 8 and 4 images, and the config ``tiny.py`` with its data."""
    folder = tmp_path / 'site'
    shutil.copytree(made, folder)
    devkit = folder / 'data/demo/VOCdevkit/VOC2012'
    shutil.copytree(devkit / 'JPEGImages', folder / 'set/images/JPEGImages')
    shutil.copytree(devkit / 'annotations', folder / 'set/annotations')
    monkeypatch.chdir(folder)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return folder


def change(split: str = 'train', folder: str = 'set/annotations'):
    """Load a file, and a function that saves it."""
    path = Path(folder) / f'instances_{split}.json'
    data = json.loads(path.read_text())
    return data, lambda: path.write_text(json.dumps(data))


def spoil() -> None:
    data, save = change()
    data['annotations'][0]['id'] = 0
    data['annotations'][1]['bbox'] = [3, 3, 9, 9]
    data['images'][7]['width'] = 7
    save()


def test_clean_folder(site):
    before = files_in(site)
    done = drive(TOOL, 'set')
    assert done.code == 0, done.err
    assert re.search(r'train +8 +\d+ +0 +20  set/annotations/instances_train.json', done.out)
    assert 'no errors' in done.last_lines(1)[0]
    assert files_in(site) == before


def test_errors_give_code_1_and_all_of_them(site):
    spoil()
    done = drive(TOOL, 'set/annotations/instances_train.json', '--image-root', 'set/images')
    assert done.code == 1
    for code in ('annotation-id-zero', 'box-mask', 'image-size'):
        assert f'[{code}]' in done.out
    assert 'is 224x224, the file says 7x224' in done.out
    assert done.out.count('    hint: ') == done.out.count('\nerror: ') + done.out.count('\nwarning: ') + done.out.count(
        '\nnote: '
    )


def test_json(site):
    spoil()
    done = drive(TOOL, 'set', '--json', '--max-examples', '1')
    report = json.loads(done.out)
    assert done.code == 1
    assert report['good'] is False
    finding = next(f for f in report['findings'] if f['code'] == 'box-mask')
    assert finding['severity'] == 'warning'
    assert finding['split'] == 'train'
    assert [e['annotation'] for e in finding['examples']] == [2]
    assert finding['examples'][0]['image'].startswith('JPEGImages/')


def test_no_images_reads_none(site):
    shutil.rmtree('set/images')
    assert drive(TOOL, 'set').code == 1
    done = drive(TOOL, 'set', '--no-images')
    assert done.code == 0
    assert 'image files not read' in done.out


def test_second_run_is_known(site):
    drive(TOOL, 'set')
    assert 'known from an earlier check' in drive(TOOL, 'set').last_lines(1)[0]
    assert 'known from' not in drive(TOOL, 'set', '--no-cache').out


def test_config_names_splits_folders_and_classes(site):
    done = drive(TOOL, '--config', 'tiny.py')
    assert done.code == 0, done.out + done.err
    assert 'val, test' in done.out
    data, save = change(folder='data/demo/VOCdevkit/VOC2012/annotations')
    data['categories'][0]['name'] = 'plane'
    save()
    done = drive(TOOL, '--config', 'tiny.py')
    assert done.code == 1
    assert '[class-order]' in done.out
    assert "class 1 is 'plane', expected is 'aeroplane'; has not 'aeroplane'" in done.out


class Page(HTMLParser):
    """The tags and image sources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.words = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ('src', 'href')]

    def handle_data(self, data):
        self.words += data


def test_html_page_stands_alone_and_escapes(site):
    spoil()
    for split in ('train', 'val'):
        data, save = change(split)
        data['categories'][0]['name'] = '<script>alert("x")</script>'
        data['images'][0]['file_name'] += '" onerror="alert(1)'
        save()
    done = drive(TOOL, 'set', '--html', 'out/report.html')
    assert done.last_lines(1) == ['Report: out/report.html']
    page = Page(Path('out/report.html').read_text())
    assert 'script' not in page.tags
    assert '<script>alert("x")</script>' in page.words
    assert page.tags.count('h2') == 3
    assert page.sources
    for source in page.sources:
        kind, _, content = source.partition(',')
        assert kind == 'data:image/jpeg;base64'
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            assert max(image.size) <= 300
    assert all(f'[{code}]' in page.words for code in ('annotation-id-zero', 'box-mask'))


def test_fix_writes_a_copy_without_errors(site):
    spoil()
    before = {p: p.read_bytes() for p in Path('set').rglob('*') if p.is_file()}
    done = drive(TOOL, 'set', '--fix', 'fixed')
    assert done.code == 0, done.out + done.err
    assert done.last_lines(1) == ['Repaired copy: fixed']
    assert 'annotation ids renumbered from 1' in done.out
    assert {p: p.read_bytes() for p in Path('set').rglob('*') if p.is_file()} == before
    assert drive(TOOL, 'fixed').code == 0
    assert len(json.loads(Path('fixed/changes.json').read_text())) > 1


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['set/images'], 'error[layout-no-files]'),
        (['set', '--image-root', 'nowhere'], 'error[layout-no-images]'),
        (['set', '--fix', 'set'], 'error[fix-exists]'),
        (['--config', 'nowhere.py'], 'There is no config nowhere.py'),
        (['set', '--fix', 'new', '--no-images'], 'leave --no-images out'),
        ([], 'pass annotation files, a folder, or --config'),
        (['set', '--config', 'tiny.py'], 'pass annotation files, a folder, or --config'),
        (['set', '--workers', '0'], '--workers'),
        (['--config', 'tiny.py', '--image-root', 'set'], 'leave --image-root out'),
    ],
)
def test_wrong_arguments(site, args, message):
    before = files_in(site)
    done = drive(TOOL, *args)
    assert done.code == 2
    assert message in done.err
    assert 'Traceback' not in done.err
    assert files_in(site) == before


def test_the_old_name_of_an_option_works_with_a_note(site):
    done = drive(TOOL, 'set', '--images', 'set/images')
    assert done.code == 0
    assert done.err.startswith('note: --images is now called --image-root')


def test_file_that_is_missing_is_a_finding(site):
    done = drive(TOOL, 'nowhere.json')
    assert done.code == 1
    assert '[no-file]' in done.out


def test_annotation_errors_do_not_load_torch(site):
    code = (
        'import sys, runpy; sys.argv = ["check_dataset.py", "set"]\n'
        'try: runpy.run_path(sys.path[0] or sys.argv[0])\nexcept SystemExit: pass\n'
    )
    script = Path('probe.py')
    script.write_text(
        code.replace(
            'sys.path[0] or sys.argv[0]', f'{str(CONFIGS.parent / "tools/check_dataset.py")!r}, run_name="__main__"'
        )
        + 'print([m for m in ("torch", "mmdet", "mmengine") if m in sys.modules])'
    )
    done = spawn(script)
    assert done.out.strip().endswith('[]'), done.out + done.err
