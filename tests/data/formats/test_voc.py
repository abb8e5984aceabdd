from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mmfinetune.data import demo
from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.data.formats import detect, voc, voc_devkit
from mmfinetune.data.prepare import Summary, format_summary, prepare
from mmfinetune.utils.errors import Message
from tests.builders import voc as builder
from tests.builders.errors import codes, refused

TOOL = Path(__file__).parents[3] / 'tools' / 'prepare_voc.py'


def write_png(path: Path, indices: np.ndarray) -> None:
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


def write_xml(path: Path, names: list[str], extra: str = '') -> None:
    entries = ''.join(
        f'<object><name>{name}</name><difficult>{k % 2}</difficult>'
        f'<truncated>{k // 2 % 2}</truncated>'
        '<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>'
        for k, name in enumerate(names)
    )
    path.write_text(f'<annotation>{entries}{extra}</annotation>')


class Devkit:
    """A made devkit: rectangles and scattered pixels as objects, with void between them."""

    def __init__(self, root: Path, train: int = 21, val: int = 18) -> None:
        self.path = root / 'VOCdevkit' / 'VOC2012'
        self.rng = np.random.default_rng(1)
        for name in ('JPEGImages', 'SegmentationObject', 'SegmentationClass', 'Annotations', 'ImageSets/Segmentation'):
            (self.path / name).mkdir(parents=True)
        self.lists = {'train': [f'2007_{k:06}' for k in range(train)], 'val': [f'2011_{k:06}' for k in range(val)]}
        for split, ids in self.lists.items():
            self.list_file(split).write_text('\n'.join(ids) + '\n')
            for image_id in ids:
                self.add(image_id)

    def list_file(self, split: str) -> Path:
        return self.path / 'ImageSets' / 'Segmentation' / f'{split}.txt'

    def file(self, kind: str, image_id: str) -> Path:
        folder, suffix = {
            'jpeg': ('JPEGImages', 'jpg'),
            'object': ('SegmentationObject', 'png'),
            'class': ('SegmentationClass', 'png'),
            'xml': ('Annotations', 'xml'),
        }[kind]
        return self.path / folder / f'{image_id}.{suffix}'

    def add(self, image_id: str) -> None:
        height, width = (int(n) for n in self.rng.integers(30, 70, 2))
        count = int(self.rng.integers(1, 6))
        objects = np.zeros((height, width), np.uint8)
        for k in range(1, count + 1):
            y, x = self.rng.integers(0, height - 8), self.rng.integers(0, width - 8)
            objects[y : y + self.rng.integers(1, 20), x : x + self.rng.integers(1, 20)] = k
            objects[self.rng.random(objects.shape) < 0.01] = k
        objects[self.rng.random(objects.shape) < 0.05] = voc.VOID
        labels = self.rng.integers(1, 21, count)
        lookup = np.zeros(256, np.uint8)
        lookup[1 : count + 1], lookup[voc.VOID] = labels, voc.VOID
        write_png(self.file('object', image_id), objects)
        write_png(self.file('class', image_id), lookup[objects])
        write_xml(self.file('xml', image_id), [VOC_CLASSES[label - 1] for label in labels])
        Image.fromarray(self.rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(self.file('jpeg', image_id))

    def pixels(self, kind: str, image_id: str) -> np.ndarray:
        return np.asarray(Image.open(self.file(kind, image_id))).copy()


@pytest.fixture
def devkit(tmp_path) -> Devkit:
    return Devkit(tmp_path / 'data')


@pytest.fixture
def small(tmp_path) -> Devkit:
    return Devkit(tmp_path / 'data', train=3, val=2)


def convert(devkit: Devkit | Path, out: Path, **options) -> Summary:
    return builder.convert(devkit.path if isinstance(devkit, Devkit) else devkit, out, **options)


def decode(annotation: dict) -> np.ndarray:
    return mask_api.decode(annotation['segmentation']).astype(bool)


def check_exact(devkit: Path, json_path: Path) -> dict:
    """Compare a JSON with the PNGs, pixel for pixel, by other means than the converter's."""
    data = json.loads(json_path.read_text())
    assert [a['id'] for a in data['annotations']] == list(range(1, len(data['annotations']) + 1))
    assert [i['id'] for i in data['images']] == list(range(1, len(data['images']) + 1))
    assert [(c['id'], c['name']) for c in data['categories']] == list(enumerate(VOC_CLASSES, 1))
    by_image: dict[int, list[dict]] = {image['id']: [] for image in data['images']}
    for annotation in data['annotations']:
        by_image[annotation['image_id']].append(annotation)
    for image in data['images']:
        name = Path(image['file_name']).stem
        assert (devkit / image['file_name']).is_file()
        objects = np.asarray(Image.open(devkit / 'SegmentationObject' / f'{name}.png'))
        classes = np.asarray(Image.open(devkit / 'SegmentationClass' / f'{name}.png'))
        assert objects.shape == (image['height'], image['width'])
        numbers = [n for n in np.unique(objects) if n not in (0, 255)]
        assert len(numbers) == len(by_image[image['id']])
        rebuilt = np.zeros_like(objects)
        for number, annotation in zip(numbers, by_image[image['id']], strict=True):
            mask = decode(annotation)
            assert isinstance(annotation['segmentation']['counts'], str)
            np.testing.assert_array_equal(mask, objects == number)
            assert set(classes[mask].tolist()) == {annotation['category_id']}
            rows, columns = np.nonzero(objects == number)
            assert annotation['bbox'] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation['area'] == len(rows)
            assert annotation['iscrowd'] == 0
            rebuilt[mask] = number
        np.testing.assert_array_equal(rebuilt, np.where(objects == 255, 0, objects))
    return data


def test_every_annotation_is_exact(devkit, tmp_path):
    summary = convert(devkit, tmp_path / 'out')
    assert summary.files == builder.annotation_paths(tmp_path / 'out')
    assert sorted(tmp_path.joinpath('out').iterdir()) == sorted(summary.files.values())
    for split, counts in summary.splits.items():
        data = check_exact(devkit.path, summary.files[split])
        assert [Path(i['file_name']).stem for i in data['images']] == devkit.lists[split]
        assert counts.images == len(data['images'])
        assert counts.objects == len(data['annotations'])
        assert any(a['difficult'] for a in data['annotations'])
        assert any(a['truncated'] for a in data['annotations'])
        found = Counter(a['category_id'] for a in data['annotations'])
        assert list(counts.per_class.values()) == [found[k] for k in range(1, 21)]
        assert data['info'] == {'description': f'PASCAL VOC 2012 segmentation, {split}', 'left_out': []}


def test_pycocotools_reads_it(small, tmp_path, capsys):
    coco = COCO(str(convert(small, tmp_path / 'out').files['train']))
    assert all(coco.annToMask(a).sum() == a['area'] for a in coco.loadAnns(coco.getAnnIds()))


def test_difficult_and_truncated_follow_the_xml(small, tmp_path):
    image_id = small.lists['train'][0]
    objects = np.zeros(small.pixels('object', image_id).shape, np.uint8)
    objects[2:5, 2:9], objects[10:12, 3:4] = 4, 2  # objects 1 and 3 have no pixel
    write_png(small.file('object', image_id), objects)
    write_png(small.file('class', image_id), np.where(objects, 12, 0))
    write_xml(small.file('xml', image_id), ['cat', 'dog', 'cow', 'dog'])
    summary = convert(small, tmp_path / 'out')
    found = [a for a in json.loads(summary.files['train'].read_text())['annotations'] if a['image_id'] == 1]
    assert [(a['difficult'], a['truncated'], a['bbox']) for a in found] == [(1, 0, [3, 10, 1, 2]), (1, 1, [2, 2, 7, 3])]
    absent = [note.facts for note in summary.notes if note.code == 'voc-without-mask']
    assert dict(place=f'Annotations/{image_id}.xml', count=2) in absent


def test_image_without_objects_is_kept(small, tmp_path):
    image_id = small.lists['val'][0]
    empty = np.zeros_like(small.pixels('object', image_id))
    write_png(small.file('object', image_id), empty)
    write_png(small.file('class', image_id), empty)
    assert convert(small, tmp_path / 'out').splits['val'].images == 2


def test_result_does_not_depend_on_the_workers(devkit, tmp_path):
    results = []
    for name, workers in (('one', 1), ('two', 2), ('default', None)):
        summary = convert(devkit, tmp_path / name, workers=workers)
        results.append([path.read_bytes() for path in summary.files.values()])
    assert results[0] == results[1] == results[2]


def test_devkit_is_found_from_each_level(small, tmp_path):
    for root in (tmp_path / 'data', tmp_path / 'data' / 'VOCdevkit', small.path):
        assert voc_devkit.find_devkit(root) == small.path
    with refused('voc-missing', path=tmp_path / 'elsewhere') as caught:
        voc_devkit.find_devkit(tmp_path / 'elsewhere')
    assert len(caught.value.problems) == 3


def test_lists_with_windows_line_ends_blanks_and_mark(small, tmp_path):
    text = '\ufeff' + ''.join(f'{image_id}  \r\n' for image_id in small.lists['train']) + '\r\n'
    small.list_file('train').write_bytes(text.encode())
    assert convert(small, tmp_path / 'out').splits['train'].images == 3


def test_other_splits(small, tmp_path):
    small.list_file('trainval').write_text('\n'.join(small.lists['train'] + small.lists['val']))
    summary = convert(small, tmp_path / 'out', splits=['trainval', 'val'])
    assert [(s, x.images, summary.files[s].name) for s, x in summary.splits.items()] == [
        ('trainval', 5, 'instances_trainval.json'),
        ('val', 2, 'instances_val.json'),
    ]


def break_all(devkit: Devkit) -> dict[str, Message]:
    """Spoil images of a devkit in every way; returns code and facts of the problem, by image id."""
    expected, ids = {}, iter(devkit.lists['train'] + devkit.lists['val'][:8])

    def bad(code: str, name: str, **facts) -> str:
        image_id = next(ids)
        expected[image_id] = Message(code, '', place=name.format(image_id), **facts)
        return image_id

    jpeg, objects, classes, xml = (
        f'{name}/{{}}.{end}'
        for name, end in (
            ('JPEGImages', 'jpg'),
            ('SegmentationObject', 'png'),
            ('SegmentationClass', 'png'),
            ('Annotations', 'xml'),
        )
    )
    for kind, name in (('jpeg', jpeg), ('object', objects), ('class', classes)):
        devkit.file(kind, bad('image-file-missing', name)).unlink()
    devkit.file('xml', bad('voc-xml-missing', xml)).unlink()
    path = devkit.file('jpeg', bad('image-file-unreadable', jpeg))
    path.write_bytes(path.read_bytes()[:-900])
    devkit.file('jpeg', bad('image-file-empty', jpeg)).write_bytes(b'')
    path = devkit.file('object', bad('image-file-unreadable', objects))
    path.write_bytes(path.read_bytes()[:-40])
    path = devkit.file('class', bad('image-file-unknown', classes))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b'\0' * 50)
    devkit.file('xml', bad('voc-xml-unreadable', xml)).write_text('<annotation><obj')

    image_id = bad('voc-mode', objects, mode='RGB')
    Image.open(devkit.file('object', image_id)).convert('RGB').save(devkit.file('object', image_id))
    image_id = bad('voc-size', objects, width=9, height=8)
    write_png(devkit.file('object', image_id), np.ones((8, 9)))
    write_png(devkit.file('class', image_id), np.ones((8, 9)))
    write_xml(devkit.file('xml', image_id), ['aeroplane'])
    image_id = bad('voc-size', classes, width=9, height=8)
    write_png(devkit.file('class', image_id), np.ones((8, 9)))

    image_id = bad('voc-xml-lacks', objects, number=1, count=0)
    write_xml(devkit.file('xml', image_id), [])
    image_id = bad('voc-xml-class', xml, number=1, given='unicorn')
    names = ['unicorn'] * int(devkit.pixels('object', image_id).max())
    write_xml(devkit.file('xml', image_id), names)
    image_id = bad('voc-xml-flag', xml, number=1, key='difficult', value='maybe')
    path = devkit.file('xml', image_id)
    path.write_text(path.read_text().replace('<difficult>0', '<difficult>maybe'))

    def spoil_class(code: str, of_object: int, to: int, only_one: bool = False, **facts) -> None:
        image_id = bad(code, classes, **facts)
        where = np.nonzero(devkit.pixels('object', image_id) == of_object)
        values = devkit.pixels('class', image_id)
        if only_one:
            where = tuple(axis[:1] for axis in where)
        values[where] = to
        write_png(devkit.file('class', image_id), values)

    spoil_class('voc-class-value', 1, 21, number=1, value=21)
    spoil_class('voc-class-value', 1, 0, number=1, value=0)
    spoil_class('voc-class-mixed', 1, 0, only_one=True, number=1, others=1)
    spoil_class('voc-stray-pixels', 255, 3, only_one=True, count=1)
    spoil_class('voc-stray-pixels', 0, 3, only_one=True, count=1)
    return expected


def holds(found: list[Message], wanted: Message) -> bool:
    """Whether a problem has the code, and the facts among its own."""
    return any(m.code == wanted.code and wanted.facts.items() <= m.facts.items() for m in found)


def test_all_problems_are_listed_together_and_nothing_is_written(devkit, tmp_path):
    expected = break_all(devkit)
    with devkit.list_file('train').open('a') as file:
        file.write('2007_000001\ntwo words\n../up\n')
    out = tmp_path / 'out'
    for workers in (1, 2):
        with refused('prepare-problems', left_out=len(expected), images=39) as caught:
            convert(devkit, out, workers=workers)
        problems = caught.value.problems
        for image_id, wanted in expected.items():
            assert holds(problems, wanted), (image_id, wanted)
        assert [(m.code, m.facts['line'], m.facts['text']) for m in problems[:3]] == [
            ('id-list-twice', 22, '2007_000001'),
            ('id-list-not-an-id', 23, 'two words'),
            ('id-list-not-an-id', 24, '../up'),
        ]
        assert all(str(line) in str(caught.value) for line in problems)
        assert '--skip-bad' in caught.value.hint
        assert not out.exists()


def test_long_lists_of_problems_are_not_cut(tmp_path):
    devkit = Devkit(tmp_path / 'data', train=70, val=1)
    for image_id in devkit.lists['train']:
        devkit.file('xml', image_id).unlink()
    with refused('prepare-problems') as caught:
        convert(devkit, tmp_path / 'out')
    assert all(f'Annotations/{i}.xml: missing' in str(caught.value) for i in devkit.lists['train'])


def dispute(devkit: Devkit, image_id: str) -> None:
    """Take the last object out of an image's XML; its masks stay."""
    path = devkit.path / 'Annotations' / f'{image_id}.xml'
    text = path.read_text()
    start = text.rindex('<object>')
    path.write_text(text[:start] + text[text.index('</object>', start) + len('</object>') :])


def test_trusted_masks_settle_what_the_xml_disputes(small, tmp_path):
    whole = convert(small, tmp_path / 'whole')
    image_id = next(
        a
        for a in (small.path / 'ImageSets/Segmentation/train.txt').read_text().split()
        if '<object>' in (small.path / 'Annotations' / f'{a}.xml').read_text()
    )
    dispute(small, image_id)
    with refused('prepare-problems') as caught:
        convert(small, tmp_path / 'out')
    assert '--trust-masks' in caught.value.hint
    assert codes(caught.value.problems) == ['voc-xml-lacks']
    assert image_id in caught.value.problems[0].facts['xml']
    summary = convert(small, tmp_path / 'out', trust_masks=True)
    assert summary.splits['train'].objects == whole.splits['train'].objects
    assert summary.notes == caught.value.problems
    assert str(summary.notes[0]) in format_summary(summary)
    check_exact(small.path, tmp_path / 'out' / 'instances_train.json')


def test_faults_of_the_official_archive_stop_nobody(small, tmp_path, monkeypatch):
    image_id = next(
        a
        for a in (small.path / 'ImageSets/Segmentation/train.txt').read_text().split()
        if '<object>' in (small.path / 'Annotations' / f'{a}.xml').read_text()
    )
    dispute(small, image_id)
    monkeypatch.setattr(voc, 'KNOWN_DISPUTES', frozenset({image_id}))
    assert image_id in convert(small, tmp_path / 'out').notes[0].facts['xml']


def test_existing_annotations_survive_a_failure(small, tmp_path):
    before = {s: path.read_bytes() for s, path in convert(small, tmp_path / 'out').files.items()}
    small.file('xml', small.lists['val'][1]).unlink()
    with refused('prepare-problems'):
        convert(small, tmp_path / 'out')
    assert before == {s: p.read_bytes() for s, p in builder.annotation_paths(tmp_path / 'out').items()}


def test_skip_bad_leaves_out_and_lists(devkit, tmp_path):
    expected = break_all(devkit)
    with devkit.list_file('val').open('a') as file:
        file.write('2011_000017\n')
    summary = convert(devkit, tmp_path / 'out', skip_bad=True)
    for split, path in summary.files.items():
        data = check_exact(devkit.path, path)
        kept = [Path(image['file_name']).stem for image in data['images']]
        assert kept == [i for i in devkit.lists[split] if i not in expected] != []
        assert data['info']['left_out'] == [i for i in devkit.lists[split] if i in expected]
    assert list(summary.left_out) == list(expected)
    assert (summary.problems[0].code, summary.problems[0].facts['text']) == ('id-list-twice', '2011_000017')
    text = format_summary(summary, lines=None)
    assert all(str(line) in text for line in summary.problems)


def test_skip_bad_with_nothing_left(small, tmp_path):
    for image_id in small.lists['val']:
        small.file('jpeg', image_id).unlink()
    with refused('prepare-nothing-left') as caught:
        convert(small, tmp_path / 'out', skip_bad=True)
    assert caught.value.problems[0] == Message('prepare-split-empty', '', split='val')
    assert not (tmp_path / 'out').exists()


def test_missing_folders_and_lists_are_said_once(small, tmp_path):
    for path in (small.path / 'SegmentationObject').iterdir():
        path.unlink()
    (small.path / 'SegmentationObject').rmdir()
    small.list_file('train').write_text(' \n')
    small.list_file('val').unlink()
    with refused('voc-devkit') as caught:
        convert(small, tmp_path / 'out', skip_bad=True)
    assert [(m.code, m.facts['place']) for m in caught.value.problems] == [
        ('voc-folder', 'SegmentationObject'),
        ('id-list-empty', 'ImageSets/Segmentation/train.txt'),
        ('text-file-missing', 'ImageSets/Segmentation/val.txt'),
    ]
    small.list_file('train').unlink()
    small.list_file('train').parent.rmdir()
    with refused('voc-devkit') as caught:
        convert(small, tmp_path / 'out')
    assert [(m.code, m.facts['place']) for m in caught.value.problems] == [
        ('voc-folder', 'SegmentationObject'),
        ('voc-folder', 'ImageSets/Segmentation'),
    ]


def test_image_in_train_and_val_is_refused(small, tmp_path):
    with small.list_file('val').open('a') as file:
        file.write(small.lists['train'][0])
    with refused('voc-devkit') as caught:
        convert(small, tmp_path / 'out', skip_bad=True)
    place = 'ImageSets/Segmentation'
    assert caught.value.problems == [Message('voc-train-in-val', '', place=place, image='2007_000000')]


def test_unwritable_folder_is_said_before_the_work(small, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(voc.VocReader, 'read', None)
    with refused('file-not-writable', path=tmp_path / 'file' / 'out'):
        convert(small, tmp_path / 'file' / 'out')


def test_other_files_in_the_folder_stay(small, tmp_path):
    (small.path / 'annotations').mkdir()
    (small.path / 'annotations/notes.txt').write_text('mine')
    before = {path: path.stat().st_mtime_ns for path in small.path.rglob('*') if path.is_file()}
    summary = convert(small, small.path / 'annotations')
    after = {path: path.stat().st_mtime_ns for path in small.path.rglob('*') if path.is_file()}
    assert after.keys() - before.keys() == set(summary.files.values())
    assert before.items() <= after.items()
    assert summary.placed == {}


def test_download_fetches_checks_and_unpacks(small, tmp_path, monkeypatch):
    archive = tmp_path / 'source.tar'
    with tarfile.open(archive, 'w') as tar:
        tar.add(small.path.parent, 'VOCdevkit')
    fetched = []

    def fetch(url, dst, **checks):
        fetched.append((url, checks['md5'], checks['size']))
        return archive.rename(dst)

    monkeypatch.setattr(voc_devkit, 'download', fetch)
    root = tmp_path / 'new'
    root.mkdir()
    devkit = voc_devkit.download_voc(root, progress=False)
    assert devkit == voc_devkit.find_devkit(root) == root / 'VOCdevkit' / 'VOC2012'
    assert fetched == [(voc_devkit.VOC_URL, '6cd6e144f989b92b3379bac3b3de84fd', 1_999_639_040)]
    voc_devkit.download_voc(root, progress=False)
    assert len(fetched) == 1
    assert convert(devkit, tmp_path / 'out').splits['train'].images == 3


def test_archive_put_there_by_hand_is_used(small, tmp_path, monkeypatch):
    root = tmp_path / 'new'
    root.mkdir()
    archive = root / 'VOCtrainval_11-May-2012.tar'
    with tarfile.open(archive, 'w') as tar:
        tar.add(small.path.parent, 'VOCdevkit')
    monkeypatch.setattr(voc_devkit, 'VOC_MD5', hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(voc_devkit, 'VOC_SIZE', archive.stat().st_size)
    voc_devkit.download_voc(root, 'http://127.0.0.1:9/nothing', progress=False)
    assert voc_devkit.find_devkit(root).is_dir()


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(TOOL.parents[1]), os.environ.get('PYTHONPATH', '')])
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        text=True,
        capture_output=True,
        env={**os.environ, 'PYTHONPATH': path},
        check=False,
    )


def test_tool(small, tmp_path):
    done = run_tool('--data-root', tmp_path / 'data', '--workers', 2)
    assert done.returncode == 0, done.stderr
    paths = builder.annotation_paths(small.path / 'annotations')
    for path in paths.values():
        check_exact(small.path, path)
    assert done.stdout.splitlines()[-1] == f'written: {paths["train"]} {paths["val"]}'
    assert 'tvmonitor' in done.stdout


def test_tool_with_problems(small, tmp_path):
    small.file('jpeg', small.lists['train'][1]).write_bytes(b'\xff\xd8\xff nothing')
    small.file('object', small.lists['val'][0]).unlink()
    out = tmp_path / 'out'
    done = run_tool('--data-root', small.path, '--out', out)
    assert done.returncode == 2
    assert done.stderr.startswith('error[prepare-problems]')
    assert 'JPEGImages/2007_000001.jpg' in done.stderr
    assert 'SegmentationObject/2011_000000.png' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not out.exists()
    done = run_tool('--data-root', small.path, '--out', out, '--skip-bad', '--splits', 'train')
    assert done.returncode == 0
    assert 'JPEGImages/2007_000001.jpg' in done.stdout
    assert [path.name for path in out.iterdir()] == ['instances_train.json']


@pytest.mark.parametrize(
    'arguments',
    [
        ('--data-root', '/nowhere'),
        ('--workers', '0'),
        ('--workers', 'many'),
        ('--data-root', '/nowhere', '--download', '--url', 'ftp://127.0.0.1/x'),
    ],
)
def test_tool_refuses(arguments):
    done = run_tool(*arguments)
    assert done.returncode == 2
    assert re.search(r'error(\[[a-z0-9-]+\])?: ', done.stderr)
    assert 'Traceback' not in done.stderr


def test_help_has_examples_and_no_torch():
    assert 'prepare_voc.py --download' in run_tool('--help').stdout
    code = 'import sys, mmfinetune.data.formats.voc; sys.exit("torch" in sys.modules or "cv2" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], cwd=TOOL.parents[1]).returncode == 0


def real_data() -> Path:
    root = os.environ.get('MMFINETUNE_REAL_DATA')
    if not root:
        pytest.skip('MMFINETUNE_REAL_DATA is not set')
    return Path(root)


def test_real_images_are_exact(tmp_path):
    devkit = voc_devkit.find_devkit(real_data() / 'voc2012_real')
    summary = convert(devkit, tmp_path, workers=2)
    assert {s: (x.images, x.objects) for s, x in summary.splits.items()} == {'train': (16, 37), 'val': (13, 30)}
    for path in summary.files.values():
        check_exact(devkit, path)
    assert summary.left_out == {}


def test_official_lists(small, tmp_path):
    for split, count in (('train', 1464), ('val', 1449)):
        text = (real_data() / 'voc2012_official_lists' / f'{split}.txt').read_bytes()
        small.list_file(split).write_bytes(text)
        ids = voc._read_lists(small.path, [split])[0][split]
        assert len(ids) == count
    assert not voc._read_lists(small.path, ['train', 'val'])[1]


# Through the tool for all data sets


@pytest.fixture(scope='module')
def made_devkit(tmp_path_factory) -> Path:
    """Not to be changed."""
    return demo.make_voc(tmp_path_factory.mktemp('voc'), 6, 4, progress=False)


@pytest.fixture
def own_devkit(tmp_path) -> Path:
    return demo.make_voc(tmp_path / 'voc', 3, 2, progress=False)


def run(src: Path, out: Path, **options):
    summary = prepare(src, out, progress=False, **{'workers': 1, **options})
    return summary, {
        name: json.loads((out / f'annotations/instances_{name}.json').read_text()) for name in summary.splits
    }


def without_prefix(data: dict) -> dict:
    return {
        **data,
        'info': None,
        'images': [{**image, 'file_name': Path(image['file_name']).name} for image in data['images']],
    }


@pytest.mark.parametrize('level', [0, 1, 2])
def test_devkit_gives_what_prepare_voc_gives(made_devkit, tmp_path, level):
    src = [made_devkit, *made_devkit.parents][level]
    assert detect(src)[0] == 'voc'
    summary, made = run(src, tmp_path / 'out')
    in_place = builder.convert(made_devkit, tmp_path / 'in_place')
    for split in ('train', 'val'):
        assert without_prefix(made[split]) == without_prefix(json.loads(in_place.files[split].read_text()))
        assert summary.splits[split].per_class == in_place.splits[split].per_class
    image = made['train']['images'][0]['file_name']
    assert (tmp_path / 'out/images' / image).samefile(made_devkit / 'JPEGImages' / image)


def test_real_devkit_gives_the_pixels_of_its_pngs(real_data, tmp_path):
    summary, made = run(real_data / 'voc2012_real', tmp_path / 'out', placing='reference')
    folder = real_data / 'voc2012_real/VOCdevkit/VOC2012'
    count = 0
    for data in made.values():
        for image in data['images']:
            stem = Path(image['file_name']).stem
            objects = np.asarray(Image.open(folder / f'SegmentationObject/{stem}.png'))
            labels = np.asarray(Image.open(folder / f'SegmentationClass/{stem}.png'))
            own = [a for a in data['annotations'] if a['image_id'] == image['id']]
            numbers = [n for n in np.unique(objects) if n not in (0, 255)]
            for number, annotation in zip(numbers, own, strict=True):
                mask = mask_api.decode(annotation['segmentation']).astype(bool)
                assert (mask == (objects == number)).all()
                assert set(labels[mask].tolist()) == {annotation['category_id']}
                count += 1
    assert count == sum(s.objects for s in summary.splits.values()) == 67


def test_disputed_images_are_problems_unless_masks_are_trusted(own_devkit, tmp_path):
    image_id = (own_devkit / 'ImageSets/Segmentation/train.txt').read_text().split()[0]
    (own_devkit / f'Annotations/{image_id}.xml').write_text('<annotation/>')
    with refused('prepare-problems') as caught:
        run(own_devkit, tmp_path / 'out')
    assert {m.facts['xml'] for m in caught.value.problems} == {f'Annotations/{image_id}.xml'}
    assert '--trust-masks' in caught.value.hint and not (tmp_path / 'out').exists()
    summary, made = run(own_devkit, tmp_path / 'out', trust_masks=True)
    assert len(made['train']['images']) == 3
    assert any(image_id in note.facts['xml'] for note in summary.notes)


def test_damaged_devkit_is_told_at_once(own_devkit, tmp_path):
    ids = (own_devkit / 'ImageSets/Segmentation/val.txt').read_text().split()
    (own_devkit / f'JPEGImages/{ids[0]}.jpg').unlink()
    (own_devkit / f'SegmentationObject/{ids[1]}.png').write_bytes(b'')
    with refused('prepare-problems', left_out=2, images=5) as caught:
        run(own_devkit, tmp_path / 'out')
    assert len(caught.value.problems) == 2
    (own_devkit / 'ImageSets/Segmentation/val.txt').unlink()
    with refused('voc-devkit'):
        run(own_devkit, tmp_path / 'out', format='voc')
    with refused('voc-missing'):
        run(tmp_path, tmp_path.with_name(tmp_path.name + '_out'), format='voc')
