"""What all readers share: detecting, writing completely or not at all, and the checks."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfinetune.data import formats, to_coco
from mmfinetune.data import prepare as data_prepare
from mmfinetune.data import writer as data_writer
from mmfinetune.data.formats import FORMATS, detect
from mmfinetune.data.prepare import format_summary, prepare
from mmfinetune.data.records import Instance, Item, Reader, Record
from mmfinetune.data.writer import SplitWriter, Target
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import sha256_of
from mmfinetune.utils.images import find_images
from mmfinetune.utils.masks import mask_to_rle
from tests.builders.errors import codes, refused

W, H = 24, 16
TRIANGLE = [2, 2, 20, 3, 9, 14]


class FakeReader(Reader):
    """A data set of image files; what `objects` gives for a name is what is seen in it."""

    def __init__(self, root: Path, objects: dict[str, Any] | None = None) -> None:
        super().__init__(root, ['cat', 'dog'])
        self.objects = objects or {}

    def items(self) -> list[Item]:
        return [
            Item(
                path.relative_to(self.root).as_posix(),
                path,
                None,
                next((name for name in ('train', 'val') if name in path.parts), None),
            )
            for path in find_images(self.root)
        ]

    def read(self, item: Item) -> Record:
        found = self.objects.get(item.image.stem, [Instance('cat', [TRIANGLE])])
        if callable(found):
            found = found()
        record = Record(item.image, W, H)
        if isinstance(found, str):
            record.problems.append(Message(found, '{place}', place=item.key))
        elif isinstance(found, Record):
            record.instances, record.extra, record.notes = (found.instances, found.extra, found.notes)
        else:
            record.instances = found
        return record


def kill_this_process() -> list:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def fail() -> list:
    raise RuntimeError('no reader foresees this')


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A function that prepares a folder of images with `FakeReader`."""

    def run(
        objects: dict[str, Any] | None = None,
        out: str = 'out',
        src: Path | None = None,
        attributes: dict[str, Any] | None = None,
        **options: Any,
    ):
        class Opener:
            @classmethod
            def open(cls, root: Path, options: dict[str, Any]) -> FakeReader:
                reader = FakeReader(root, objects)
                vars(reader).update(attributes or {})
                return reader

        monkeypatch.setattr(data_prepare, 'reader_for', lambda name: Opener)
        return prepare(src or tmp_path / 'src', tmp_path / out, 'coco', progress=False, **{'workers': 1, **options})

    return run


def write_images(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (W, H), (len(name), 2, 3)).save(path)


@pytest.fixture
def src(tmp_path) -> Path:
    write_images(tmp_path / 'src', 'train/a.png', 'train/b.png', 'val/a.png')
    return tmp_path / 'src'


def load(folder: Path, split: str = 'train') -> dict[str, Any]:
    return json.loads((folder / f'annotations/instances_{split}.json').read_text())


def content(folder: Path) -> dict[str, tuple]:
    """Everything about the files below a folder that may not change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, sha256_of(path))
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


@pytest.mark.parametrize('placing', ['link', 'copy', 'reference'])
def test_images_are_placed_and_the_source_is_as_before(fake, src, tmp_path, placing):
    before = content(src)
    summary = fake(placing=placing)
    out = tmp_path / 'out'
    assert content(src) == before
    assert sorted(p.name for p in out.iterdir()) == ['annotations', 'images', 'prepare_report.json']
    # Two images of one name in two folders stay apart.
    assert [i['file_name'] for i in load(out)['images']] == ['train/a.png', 'train/b.png']
    assert [i['file_name'] for i in load(out, 'val')['images']] == ['val/a.png']
    assert (out / 'images/val/a.png').samefile(src / 'val/a.png') == (placing != 'copy')
    assert (out / 'images').is_symlink() == (placing == 'reference')
    assert summary.placed == {{'link': 'linked', 'copy': 'copied', 'reference': 'referred to'}[placing]: 3}
    report = json.loads((out / 'prepare_report.json').read_text())
    assert report['splits']['val'] == {
        'images': 1,
        'objects': 1,
        'crowds': 0,
        'empty': 0,
        'per_class': {'cat': 1, 'dog': 0},
    }
    assert report['images_from'] == str(src)


def test_copies_where_hard_links_cannot_be(fake, src, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, 'Invalid cross-device link')

    monkeypatch.setattr(os, 'link', refuse)
    assert fake().placed == {'copied': 3}
    assert (tmp_path / 'out/images/val/a.png').read_bytes() == (src / 'val/a.png').read_bytes()


def test_linked_images_of_the_source_become_files(fake, src, tmp_path):
    elsewhere = tmp_path / 'elsewhere.png'
    (src / 'val/a.png').rename(elsewhere)
    (src / 'val/a.png').symlink_to(elsewhere)
    fake()
    placed = tmp_path / 'out/images/val/a.png'
    assert not placed.is_symlink() and placed.samefile(elsewhere)


def test_one_folder_needs_no_folder_in_the_names(fake, src, tmp_path):
    shutil.rmtree(src / 'val')
    fake()
    assert [i['file_name'] for i in load(tmp_path / 'out')['images']] == ['a.png', 'b.png']


@pytest.mark.parametrize('count', [1, 7, 150])
def test_bytes_do_not_depend_on_workers(fake, tmp_path, count):
    write_images(tmp_path / 'src', *(f'train/{k}.png' for k in range(count)), *(f'val/v{k}.png' for k in range(count)))
    rng = np.random.default_rng(0)
    objects = {
        f'{k}': [
            Instance('dog', mask_to_rle(rng.random((H, W)) < 0.3)),
            Instance('cat', [TRIANGLE], iscrowd=k % 3 == 0),
        ]
        for k in range(count)
    }
    for workers, out in ((1, 'a'), (3, 'b'), (None, 'c')):
        fake(objects, out, workers=workers)
    for name in ('annotations/instances_train.json', 'annotations/instances_val.json', 'prepare_report.json'):
        texts = {(tmp_path / out / name).read_bytes() for out in 'abc'}
        assert len(texts) == 1
    data = load(tmp_path / 'a')
    assert [a['id'] for a in data['annotations']] == list(range(1, 2 * count + 1))
    assert [i['file_name'] for i in data['images']] == [f'train/{k}.png' for k in range(count)]


def test_without_splits_all_is_one_file(fake, tmp_path):
    write_images(tmp_path / 'src', 'a.png')
    summary = fake()
    assert list(summary.splits) == ['all']
    assert load(tmp_path / 'out', 'all')['info']['description'] == 'src, all (prepared from coco)'


def test_an_output_folder_with_files_is_refused(fake, src, tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'thesis.txt').write_text('mine')
    (out / 'images').mkdir()
    with refused('target-not-empty', names='images, thesis.txt'):
        fake()
    with refused('target-foreign', out=out):
        fake(overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ['images', 'thesis.txt']


def test_overwrite_replaces_what_was_made_and_nothing_else(fake, src, tmp_path):
    out = tmp_path / 'out'
    fake()
    (out / 'notes.txt').write_text('mine')
    (src / 'val/a.png').unlink()
    write_images(src, 'train/c.png')
    with refused('target-not-empty') as caught:
        fake()
    assert '--overwrite' in caught.value.hint
    fake(overwrite=True)
    assert (out / 'notes.txt').read_text() == 'mine'
    assert sorted(p.name for p in (out / 'annotations').iterdir()) == ['instances_train.json']
    assert [p.name for p in find_images(out / 'images')] == ['a.png', 'b.png', 'c.png']
    fake(overwrite=True, placing='reference')
    before = content(src)
    fake(overwrite=True)  # must remove the link, not what it leads to
    assert content(src) == before and not (out / 'images').is_symlink()


def test_a_failed_overwrite_leaves_the_old_results(fake, src, tmp_path, monkeypatch):
    fake()
    before = content(tmp_path / 'out')
    with refused('prepare-problems'):
        fake({'b': 'broken'}, overwrite=True)
    assert content(tmp_path / 'out') == before
    rename = Path.rename

    def full_disk(self: Path, target: Path) -> Path:
        if self.parent.name == '.partial' and self.name == 'annotations':
            raise OSError(errno.ENOSPC, 'No space left on device')
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', full_disk)
    with refused('file-not-writable', reason='No space left on device'):
        fake(overwrite=True)
    assert content(tmp_path / 'out') == before


def test_what_a_killed_run_left_is_no_obstacle(fake, src, tmp_path):
    (tmp_path / 'out/.partial/annotations').mkdir(parents=True)
    (tmp_path / 'out/.partial/annotations/instances_train.json').write_text('half')
    fake()
    assert not (tmp_path / 'out/.partial').exists()
    assert len(load(tmp_path / 'out')['images']) == 2


@pytest.mark.parametrize('stop', [KeyboardInterrupt, OSError(errno.ENOSPC, 'No space left')])
def test_nothing_is_left_of_a_run_that_stops(fake, src, tmp_path, monkeypatch, stop):
    def interrupt(*_):
        raise stop

    monkeypatch.setattr(data_writer.shutil, 'copyfile', interrupt)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else UserError):
        fake(out='new/folder/out', placing='copy')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['src']


@pytest.mark.parametrize(
    'out, code',
    [
        ('src', 'target-inside'),
        ('src/out', 'target-inside'),
        ('link/out', 'target-inside'),
        ('.', 'target-around'),
        ('file', 'target-file'),
    ],
)
def test_output_and_source_stay_apart(fake, src, tmp_path, out, code):
    (tmp_path / 'link').symlink_to(src)
    (tmp_path / 'file').touch()
    before = content(tmp_path)
    with refused(code):
        fake(out=out, overwrite=True)
    assert content(tmp_path) == before


def test_a_dry_run_writes_nothing(fake, src, tmp_path):
    summary = fake(dry_run=True)
    assert summary.splits['train'].objects == 2 and not summary.placed
    assert sorted(p.name for p in tmp_path.iterdir()) == ['src']
    with refused('prepare-problems'):
        fake({'b': 'broken'}, dry_run=True)


def test_all_problems_come_together_and_skip_bad_goes_on(fake, src, tmp_path):
    objects = {'a': 'too-dark', 'b': fail}
    with refused('prepare-problems', found='3 problems', left_out=3, images=3) as caught:
        fake(objects)
    assert [(m.code, m.facts['place']) for m in caught.value.problems] == [
        ('too-dark', 'train/a.png'),
        ('prepare-image-unreadable', 'train/b.png'),
        ('too-dark', 'val/a.png'),
    ]
    assert caught.value.problems[1].facts['type'] == 'RuntimeError'
    with refused('prepare-nothing-left'):
        fake(objects, skip_bad=True)
    summary = fake({'b': fail}, skip_bad=True)
    assert summary.left_out == {'train/b.png': 'train'} and 'RuntimeError' in format_summary(summary)
    assert [i['file_name'] for i in load(tmp_path / 'out')['images']] == ['train/a.png']
    assert not (tmp_path / 'out/images/train/b.png').exists()


@pytest.mark.parametrize(
    'instance, code, place',
    [
        (Instance('bird', [TRIANGLE], place='shape 3'), 'prepare-class-unknown', 'train/a.png: shape 3'),
        (Instance('cat', [[0, 0, 1]]), 'shape-polygon-odd', 'train/a.png'),
        (Instance('cat', [[0, 0, math.nan, 1, 1, 1]]), 'shape-polygon-nan', 'train/a.png'),
        (Instance('cat', {'size': [H, W], 'counts': [3]}), 'shape-rle-pixels', 'train/a.png'),
        (Instance('cat', {'size': [W, H], 'counts': [H * W]}), 'shape-rle-size', 'train/a.png'),
        (Instance('cat', 'x'), 'shape-polygon-type', 'train/a.png'),
        (Instance('cat', None), 'prepare-image-unreadable', 'train/a.png'),
    ],
)
def test_what_a_reader_gives_is_checked(fake, src, instance, code, place):
    with refused('prepare-problems') as caught:
        fake({'a': [Instance('dog', [TRIANGLE]), instance]})
    assert (caught.value.problems[0].code, caught.value.problems[0].facts['place']) == (code, place)


def test_objects_are_dropped_for_a_reason_that_is_counted(fake, src):
    small = np.zeros((H, W))
    small[2:4, 2:4] = 1
    shapes = [mask_to_rle(small), [TRIANGLE], mask_to_rle(np.zeros((H, W))), [[1, 1, 2, 2]]]
    objects = {
        'a': [
            *(Instance('cat', shape) for shape in shapes),
            Instance('dog', [TRIANGLE]),
            Instance('cat', mask_to_rle(small), iscrowd=True),
        ]
    }
    summary = fake(objects, min_area=5, classes=['cat'])
    assert summary.dropped == {
        'smaller than 5 pixels': 2,
        'without a pixel in the image': 2,
        'without area (fewer than 3 points)': 2,
        'of a class that --classes does not name': 2,
    }
    assert summary.splits['train'].objects == 2 and summary.splits['train'].crowds == 1
    text = format_summary(summary)
    assert '2 objects dropped: smaller than 5 pixels' in text


def test_further_keys_never_break_the_file(fake, src, tmp_path):
    extra = {'id': 7, 'bbox': 'x', 'ö': ['ß'], 'note': None}
    good = Record(Path(), W, H, [Instance('cat', [TRIANGLE], extra=extra)], extra={'license': 3})
    bad = Record(
        Path(),
        W,
        H,
        [Instance('cat', [TRIANGLE], extra={'score': math.inf})],
        extra={'name': '\ud800'},
        notes=[Message('seen', '')],
    )
    summary = fake({'a': good, 'b': bad})
    data = load(tmp_path / 'out')
    annotation = data['annotations'][0]
    assert annotation['id'] == 1 and annotation['bbox'] == [2, 2, 17, 11]
    assert annotation['ö'] == ['ß'] and annotation['note'] is None
    assert data['images'][0]['license'] == 3 and 'name' not in data['images'][1]
    assert 'score' not in data['annotations'][1]
    assert codes(summary.notes) == ['seen', 'prepare-keys-left-out', 'prepare-keys-left-out']


def test_a_file_name_that_is_not_utf8_is_a_problem(fake, src, tmp_path):
    name = os.fsdecode(b'\xff\xfe.png')
    try:
        shutil.copy(src / 'train/a.png', src / 'train' / name)
    except OSError:
        pytest.skip('this file system has UTF-8 names only')
    with refused('prepare-problems') as caught:
        fake()
    assert codes(caught.value.problems) == ['prepare-image-name']
    summary = fake(skip_bad=True)
    format_summary(summary).encode()
    assert len(load(tmp_path / 'out')['images']) == 2


def test_problems_and_ids_of_the_source_count(fake, src, tmp_path):
    problem = Message('image-gone', 'x.json: its image is missing')
    with refused('prepare-problems', found='1 problem', left_out=0, advice='look again') as caught:
        fake(attributes={'problems': [problem], 'hint': 'look again'})
    assert caught.value.problems == [problem]
    assert 'look again' in caught.value.hint and '--skip-bad' in caught.value.hint
    fake(
        attributes={
            'category_ids': {'cat': 3, 'dog': 9},
            'supercategories': {'dog': 'animal'},
            'headers': {'train': {'info': {'year': 1}, 'licenses': [2]}},
        }
    )
    data = load(tmp_path / 'out')
    assert data['categories'] == [{'id': 3, 'name': 'cat'}, {'id': 9, 'name': 'dog', 'supercategory': 'animal'}]
    assert (data['info'], data['licenses']) == ({'year': 1}, [2])
    assert load(tmp_path / 'out', 'val')['licenses'] == []


@pytest.mark.parametrize(
    'options, code, problems',
    [
        (dict(objects={'a': [], 'b': []}), 'prepare-no-objects', []),
        (dict(classes=['cat', 'cat']), 'prepare-classes', [Message('class-repeated', '', name='cat', count=2)]),
        (
            dict(classes=['kat']),
            'prepare-classes',
            [Message('class-unknown', '', name='kat', near='; did you mean cat?')],
        ),
        (
            dict(classes=['dog']),
            'prepare-no-objects',
            [Message('prepare-dropped', '', count=3, reason='of a class that --classes does not name')],
        ),
        (dict(attributes={'classes': []}), 'prepare-no-classes', []),
        (dict(src=Path('/nowhere')), 'prepare-source-missing', []),
    ],
)
def test_what_cannot_be_is_refused(fake, src, tmp_path, options, code, problems):
    with refused(code) as caught:
        fake(**options)
    assert caught.value.problems == problems
    assert not (tmp_path / 'out').exists()


def test_no_images(fake, tmp_path):
    (tmp_path / 'src').mkdir()
    with refused('prepare-no-images', format='coco'):
        fake()


def test_a_killed_worker_is_one_clean_message(fake, src, tmp_path):
    with refused('worker-killed') as caught:
        fake({'b': kill_this_process}, workers=2)
    assert '--workers 1' in caught.value.hint and not (tmp_path / 'out').exists()


def test_results_go_between_processes():
    result = to_coco.Result(Item('a', Path('a.png')), image='"x":1', notes=[Message('a-note', '')])
    assert pickle.loads(pickle.dumps(result)) == result


def test_an_unknown_folder_lists_what_was_looked_for(tmp_path, src):
    (src / 'train/a.txt').write_text('hello')
    with refused('format-unknown') as caught:
        detect(src)
    assert [line.facts['format'] for line in caught.value.problems] == list(FORMATS)
    (src / 'inner').mkdir()
    (src / 'inner/annotations.json').write_text('{"images": [], "annotations": [], "categories": []}')
    with refused('format-inside', inner=f'{src / "inner"} (coco)'):
        detect(src)
    with refused('format-unknown'):
        detect(src / 'train/a.txt')
    assert detect(src / 'inner/annotations.json')[0] == 'coco'


def test_a_folder_of_two_formats_is_refused(tmp_path):
    (tmp_path / 'a.json').write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / 'leftImg8bit').mkdir()
    (tmp_path / 'inst').mkdir()
    (tmp_path / 'inst/a.mat').touch()
    (tmp_path / 'img').mkdir()
    with refused('format-ambiguous') as caught:
        detect(tmp_path)
    assert [line.facts['format'] for line in caught.value.problems] == ['coco', 'sbd']
    assert '--format' in caught.value.hint


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_has_a_reader_that_refuses_an_empty_folder(name, tmp_path):
    assert issubclass(data_prepare.reader_for(name), Reader)
    with refused('format-unknown'):
        detect(tmp_path)
    with pytest.raises(UserError):
        prepare(tmp_path, tmp_path.with_name(tmp_path.name + '_out'), name, progress=False)
    assert not tmp_path.with_name(tmp_path.name + '_out').exists()


def test_many_classes_and_lines_are_cut_short(fake, src):
    classes = ['cat', *(f'class {k}' for k in range(200))]
    notes = [Message('a-note', 'note {k}', k=k) for k in range(50)]
    text = format_summary(fake(attributes={'classes': classes, 'notes': notes}))
    assert '… and 101 more classes' in text and '… and 30 more, see prepare_report.json' in text
    assert max(map(len, text.splitlines())) < 100


def test_split_writer_numbers_from_one(tmp_path):
    writer = SplitWriter(tmp_path / 'a.json')
    writer.add(None, '"file_name":"ä"', ['"area":1', '"area":2'])
    writer.add(None, '"file_name":"b"', [])
    writer.finish({'info': {}, 'categories': []})
    assert json.loads((tmp_path / 'a.json').read_bytes()) == {
        'info': {},
        'categories': [],
        'images': [{'id': 1, 'file_name': 'ä'}, {'id': 2, 'file_name': 'b'}],
        'annotations': [{'id': 1, 'image_id': 1, 'area': 1}, {'id': 2, 'image_id': 1, 'area': 2}],
    }
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']


@pytest.mark.filterwarnings('error::ResourceWarning', 'error::pytest.PytestUnraisableExceptionWarning')
def test_no_file_is_left_open_where_preparing_fails(tmp_path):
    target = Target(tmp_path / 'out', tmp_path / 'in', False)
    with contextlib.suppress(RuntimeError), target:
        writer = target.writer('train')
        assert target.writer('train') is writer
        writer.add(None, '"file_name":"a"', [])
        raise RuntimeError
    del target, writer
    gc.collect()
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_coco_train_size_takes_little_memory(tmp_path):
    """118,287 images and 860,000 annotations without the images; prints time and peak memory."""
    images, annotations = 118_287, 860_000
    rng, path = random.Random(0), tmp_path / 'src/annotations/instances_train2017.json'
    path.parent.mkdir(parents=True)
    with path.open('w') as file:
        file.write(
            '{"images":['
            + ','.join(f'{{"id":{k},"file_name":"{k:012}.jpg","width":640,"height":480}}' for k in range(1, images + 1))
            + '],"annotations":['
        )
        for k in range(annotations):
            count, radius = max(4, int(rng.lognormvariate(2.9, 0.75))), rng.uniform(5, 150)
            x, y = rng.uniform(0, 640), rng.uniform(0, 480)
            points = [
                round(v, 2)
                for j in range(count)
                for v in (
                    x + radius * rng.uniform(0.7, 1) * math.cos(2 * math.pi * j / count),
                    y + radius * rng.uniform(0.7, 1) * math.sin(2 * math.pi * j / count),
                )
            ]
            file.write(
                f'{"," * (k > 0)}{{"id":{k + 1},"image_id":{rng.randint(1, images)},'
                f'"category_id":{rng.randint(1, 80)},"iscrowd":0,'
                f'"segmentation":[{points}]}}'
            )
        file.write('],"categories":' + json.dumps([{'id': k, 'name': f'class {k}'} for k in range(1, 81)]) + '}')
    size, start = path.stat().st_size, time.perf_counter()
    summary = prepare(tmp_path / 'src', tmp_path / 'out', placing='reference', trust_sizes=True, progress=False)
    seconds = time.perf_counter() - start
    # Of this process and of the largest worker, in KiB.
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    print(f'\n{size / 1e6:.0f} MB of JSON in {seconds:.0f} s, {peak:.2f} GiB')
    assert summary.splits['train'].images == images
    # Outlines that touch the image with a corner only have no pixel in it.
    assert 0.99 * annotations < summary.splits['train'].objects <= annotations
    assert peak < 4


def test_options_of_another_format_are_refused(tmp_path):
    site = tmp_path / 'in'
    (site / 'images').mkdir(parents=True)
    (site / 'data.yaml').write_text('names: [cat]\ntrain: images')
    options = dict(boxes_as_masks=True, trust_masks=True, threshold=9, relative=False, sbd_split=None, void=0, ratio=1)
    with refused('format-options', format='yolo') as caught:
        prepare(site, tmp_path / 'out', **options)
    assert [(p.facts['option'], p.facts['others']) for p in caught.value.problems] == [
        ('trust-masks', 'voc'),
        ('threshold', 'binary-masks'),
        ('void', 'mask-png'),
        ('ratio', 'no format'),
    ]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', FORMATS)
def test_each_option_of_a_format_is_one_of_the_tool_and_of_its_reader(name):
    module = FORMATS[name].reader.split('.')[0]
    source = Path(formats.__file__).with_name(f'{module}.py').read_text()
    tool = (Path(__file__).parents[2] / 'tools/prepare_data.py').read_text()
    for option in FORMATS[name].options:
        assert f"'{option}'" in source
        assert f"'--{option.replace('_', '-')}'" in tool or option == 'splits'
