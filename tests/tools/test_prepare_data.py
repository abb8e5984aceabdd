"""`tools/prepare_data.py` as a command: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.builders.runs import TOOLS, Outcome, spawn

TOOL = TOOLS / 'prepare_data.py'


def write_coco(src: Path, *splits: str) -> None:
    for split in splits:
        image = src / f'images/{split}_1.jpg'
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (30, 20)).save(image)
        path = src / f'annotations/instances_{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    'images': [{'id': 0, 'file_name': image.name, 'width': 30, 'height': 20}],
                    'annotations': [{'id': 0, 'image_id': 0, 'category_id': 0, 'segmentation': [[1, 1, 9, 1, 9, 9]]}],
                    'categories': [{'id': 0, 'name': 'cat'}, {'id': 1, 'name': 'dog'}],
                }
            )
        )


def tool(*args: str | Path) -> Outcome:
    return spawn(TOOL, *args)


def test_a_data_set_is_prepared(tmp_path):
    write_coco(tmp_path / 'src', 'train', 'val')
    out = tmp_path / 'out'
    done = tool(tmp_path / 'src', out)
    assert (done.code, done.err) == (0, '')
    lines = done.out.splitlines()
    assert lines[0].startswith('read as coco: annotations/instances_train.json and 1 more')
    assert ['train', '1', '1', '0', '0'] in [line.split() for line in lines]
    assert ['cat', '1', '1'] in [line.split() for line in lines]
    assert lines[-2] == (
        f'next: python tools/check_dataset.py {out}, then python tools/new_config.py --data-root {out} --name NAME'
    )
    assert lines[-1].startswith('written: ')
    for path in lines[-1].split()[1:]:
        assert Path(path).exists()
    data = json.loads((out / 'annotations/instances_val.json').read_text())
    assert [c['id'] for c in data['categories']] == [1, 2]
    again = tool(tmp_path / 'src', out)
    assert again.code == 2 and '--overwrite' in again.err
    assert tool(tmp_path / 'src', out, '--overwrite', '--classes', 'dog', 'cat').code == 0


def test_a_data_set_without_splits_is_to_be_split_next(tmp_path):
    write_coco(tmp_path / 'src', 'default')
    done = tool(tmp_path / 'src', tmp_path / 'out', '--place', 'copy', '--workers', '1')
    assert done.code == 0 and f'tools/split_dataset.py {tmp_path / "out"}' in done.out
    done = tool(tmp_path / 'out', tmp_path / 'again')
    assert done.code == 0  # what it writes is a data set that it reads


def test_a_dry_run_says_so(tmp_path):
    write_coco(tmp_path / 'src', 'train')
    done = tool(tmp_path / 'src', tmp_path / 'out', '--dry-run')
    assert done.code == 0 and done.out.splitlines()[-1] == 'nothing written (--dry-run)'
    assert not (tmp_path / 'out').exists()


def test_problems_end_with_2_and_skip_bad_with_0(tmp_path):
    write_coco(tmp_path / 'src', 'train', 'val')
    path = tmp_path / 'src/images/extra.jpg'
    data = json.loads((tmp_path / 'src/annotations/instances_val.json').read_text())
    data['images'].append({'id': 1, 'file_name': path.name, 'width': 30, 'height': 20})
    (tmp_path / 'src/annotations/instances_val.json').write_text(json.dumps(data))
    path.write_bytes(b'')
    done = tool(tmp_path / 'src', tmp_path / 'out')
    assert done.code == 2 and done.out == '' and 'Traceback' not in done.err
    assert done.error == 'prepare-problems'
    assert 'image 1 (extra.jpg): images/extra.jpg: ' in done.err
    done = tool(tmp_path / 'src', tmp_path / 'out', '--skip-bad')
    assert done.code == 0 and 'left out:' in done.out and 'extra.jpg' in done.out


def test_names_of_the_last_release_still_work(tmp_path):
    write_coco(tmp_path / 'src', 'train')
    old = ('--kind', 'coco', '--images', 'copy', '--classes', 'dog,cat')
    done = tool(tmp_path / 'src', tmp_path / 'out', *old)
    assert done.code == 0, done.err
    assert done.err.count('note: ') == 3 and '--format' in done.err and '--place' in done.err
    data = json.loads((tmp_path / 'out/annotations/instances_train.json').read_text())
    assert [c['name'] for c in data['categories']] == ['dog', 'cat']


@pytest.mark.parametrize(
    'args, message',
    [
        ((), 'the following arguments are required: SRC, OUT'),
        (('a',), 'the following arguments are required: OUT'),
        (('nowhere', 'out'), 'error[prepare-source-missing]'),
        (('.', 'out', '--format', 'pascal'), "invalid choice: 'pascal'"),
        (('.', 'out', '--workers', '0'), "'0' is not a positive integer"),
        (('.', 'out', '--min-area', 'x'), "'x' is not a positive integer"),
        (('.', 'out', '--min-area', '9' * 5000), 'is not a positive integer'),
        (('.', 'out', '--threshold', '256'), "'256' is not an integer from 1 to 255"),
        (('.', 'out', '--void', '-2'), "'-2' is not an integer from -1 to"),
        (('.', 'out', '--classes', 'a,,b'), 'an empty name'),
        (('.', 'out', '--place', 'move'), 'invalid choice'),
    ],
)
def test_mistakes_are_told_in_one_message(tmp_path, args, message):
    done = spawn(TOOL, *args)
    assert done.code == 2 and message in done.err and 'Traceback' not in done.err


def test_real_data_sets_are_recognised(real_data, tmp_path):
    for name, kind, images in (
        ('coco2017_real', 'coco2017', 80),
        ('voc2012_real', 'voc', 29),
        ('labelme_real', 'labelme', 3),
        ('magnetic_tile_real', 'binary-masks', 80),
    ):
        done = tool(real_data / name, tmp_path / name, '--place', 'reference')
        assert done.code == 0, done.err
        assert done.out.startswith(f'read as {kind}: ')
        assert f'images: {images} referred to' in done.out
