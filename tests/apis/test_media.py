from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmfinetune.apis import media
from mmfinetune.utils.errors import Problem
from tests.builders.disk import STRANGE, strange
from tests.builders.errors import codes, faulty, refused


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'')


def names_of(given: list, results: list[Path] = ()) -> list[str]:
    return [i.name for i in media.find_inputs([str(g) for g in given], results)[0]]


def make_video(path: Path, frames: int = 10, size: tuple[int, int] = (64, 48), codec: str = 'MJPG') -> Path:
    """A video in which the grey level is ten times the number of the frame."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 20, size)
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 10 * i, np.uint8))
    writer.release()
    return path


def test_folder_is_searched_to_the_bottom_in_natural_order(tmp_path):
    touch(tmp_path, 'img10.jpg', 'img2.JPG', 'b/c/x.png', 'clip.MP4', 'notes.txt', '._img2.jpg', '.hidden/y.jpg')
    inputs, root = media.find_inputs([str(tmp_path)], [])
    assert [i.name for i in inputs] == ['b/c/x.png', 'clip.MP4', 'img2.JPG', 'img10.jpg']
    assert root == tmp_path
    assert [i.is_video for i in inputs] == [False, True, False, False]


@pytest.mark.parametrize(
    'pattern, expected',
    [
        ('a/*.jpg', ['x.jpg', 'y.jpg']),
        ('**/*.jpg', ['a/x.jpg', 'a/y.jpg', 'b/x.jpg']),
        ('?/x.*', ['a/x.jpg', 'b/x.jpg']),
        ('a/[y-z]*', ['y.jpg']),
    ],
)
def test_patterns(tmp_path, monkeypatch, pattern, expected):
    touch(tmp_path, 'a/x.jpg', 'a/y.jpg', 'b/x.jpg', 'a/.z.jpg', 'a/y.txt')
    assert names_of([tmp_path / pattern]) == expected
    monkeypatch.chdir(tmp_path)
    assert names_of([pattern]) == names_of([f'./{pattern}']) == expected


def test_a_name_that_looks_like_a_pattern_is_a_file_if_there_is_one(tmp_path):
    touch(tmp_path, 'a[1].jpg', 'a1.jpg')
    assert names_of([tmp_path / 'a[1].jpg']) == ['a[1].jpg']


def test_a_file_that_is_named_twice_is_taken_once(tmp_path):
    touch(tmp_path, 'a/x.jpg')
    given = [tmp_path / 'a/x.jpg', tmp_path / 'a', tmp_path / 'a/../a/x.jpg', tmp_path / 'a/*.jpg']
    assert names_of(given) == ['x.jpg']


def test_links_keep_the_name_by_which_they_are_known(tmp_path):
    touch(tmp_path, 'store/0001.jpg')
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/cat.jpg').symlink_to(tmp_path / 'store/0001.jpg')
    assert names_of([tmp_path / 'photos']) == ['cat.jpg']


def test_names_are_relative_to_what_all_inputs_share(tmp_path):
    touch(tmp_path, 'a/x.jpg', 'b/x.jpg', 'b/deep/er/z.jpg')
    assert names_of([tmp_path / 'a/x.jpg', tmp_path / 'b']) == ['a/x.jpg', 'b/deep/er/z.jpg', 'b/x.jpg']


def test_names_that_are_not_utf8_can_be_written_as_json(tmp_path):
    place = os.fsencode(tmp_path) + b'/caf\xe9.jpg'
    Path(os.fsdecode(place)).write_bytes(b'')
    (name,) = names_of([tmp_path])
    assert json.dumps(name, ensure_ascii=False).encode() == '"caf\ufffd.jpg"'.encode()


def test_results_are_no_inputs(tmp_path):
    touch(tmp_path, 'x.jpg', 'predictions/pictures/x.jpg', 'predictions_of_mine/y.jpg')
    assert names_of([tmp_path], [tmp_path / 'predictions']) == ['predictions_of_mine/y.jpg', 'x.jpg']
    with refused('predict-inputs') as caught:
        names_of([tmp_path / 'predictions/pictures/x.jpg'], [tmp_path / 'predictions'])
    assert codes(caught.value.problems) == ['predict-own-output']


def test_all_that_stands_for_nothing_is_named(tmp_path):
    touch(tmp_path, 'notes/a.txt')
    given = [tmp_path / 'no.jpg', tmp_path / 'notes', tmp_path / '*.png']
    with refused('predict-inputs') as caught:
        names_of(given)
    assert codes(caught.value.problems) == ['predict-no-file', 'predict-empty-folder', 'predict-no-match']
    assert [p.facts['name'] for p in caught.value.problems] == [str(path) for path in given]


def test_a_file_that_is_named_may_have_any_suffix(tmp_path):
    touch(tmp_path, 'picture.dat')
    assert names_of([tmp_path / 'picture.dat']) == ['picture.dat']


def test_output_names_never_meet():
    names = ['a/x.jpg', 'a/x.png', 'b/x.jpg', 'a/X.bmp', 'a/x_2.png', 'dots.in.name.jpg']
    made = media.output_names(names, ['.jpg'] * 6)
    assert made == ['a/x.jpg', 'a/x_2.jpg', 'b/x.jpg', 'a/X_3.jpg', 'a/x_2_2.jpg', 'dots.in.name.jpg']
    assert media.output_names(['x.avi', 'x.png'], ['.mp4', '.jpg']) == ['x.mp4', 'x.jpg']


@pytest.mark.parametrize(('name', 'content'), [('a.jpg', b''), ('a.png', b'hello'), ('no.jpg', None)])
def test_damaged_images_are_told(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Problem):
        media.check_image(tmp_path / name)


def test_truncated_jpeg_is_told(tmp_path):
    _, data = cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8))
    (tmp_path / 'a.jpg').write_bytes(data.tobytes())
    media.check_image(tmp_path / 'a.jpg')
    (tmp_path / 'a.jpg').write_bytes(data.tobytes()[: len(data) // 2])
    with pytest.raises(Problem) as caught:
        media.check_image(tmp_path / 'a.jpg')
    assert caught.value.message.code == 'image-file-truncated'


@pytest.mark.parametrize('every, numbers', [(1, list(range(10))), (3, [0, 3, 6, 9]), (50, [0])])
def test_frames_of_a_video(tmp_path, every, numbers):
    video = media.Video(make_video(tmp_path / 'v.avi'))
    assert (video.fps, video.frames) == (20, 10)
    frames = list(video.read(every))
    assert [n for n, _ in frames] == numbers
    for number, frame in frames:
        assert frame.shape == (48, 64, 3)
        assert abs(float(frame.mean()) - 10 * number) < 2


def test_frames_are_rgb(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / 'v.avi'), cv2.VideoWriter.fourcc(*'MJPG'), 20, (64, 48))
    writer.write(np.full((48, 64, 3), (0, 0, 200), np.uint8))
    writer.release()
    ((_, frame),) = media.Video(tmp_path / 'v.avi').read()
    assert frame[20, 20, 0] > 150 > 60 > frame[20, 20, 2]


def test_what_is_no_video(tmp_path):
    (tmp_path / 'v.mp4').write_bytes(b'nothing' * 100)
    with pytest.raises(Problem) as caught:
        media.Video(tmp_path / 'v.mp4')
    assert caught.value.message.code == 'video-unreadable'
    make_video(tmp_path / 'none.avi', frames=0)
    with pytest.raises(Problem) as caught:
        list(media.Video(tmp_path / 'none.avi').read())
    assert caught.value.message.code in ('video-unreadable', 'video-no-frames')


def test_half_a_video_gives_its_frames_and_then_says_so(tmp_path):
    path, random = tmp_path / 'v.avi', np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 20, (320, 240))
    for _ in range(10):
        writer.write(random.integers(0, 255, (240, 320, 3), np.uint8))
    writer.release()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    frames: list[np.ndarray] = []
    with pytest.raises(Problem) as caught:
        frames.extend(frame for _, frame in media.Video(path).read())
    problem = caught.value.message
    assert (problem.code, problem.facts['promised']) == ('video-frames-missing', 10)
    assert 3 <= len(frames) == problem.facts['read'] <= 7


@pytest.mark.parametrize('size', [(64, 48), (63, 47)])
def test_written_video_can_be_read(tmp_path, size):
    writer = media.VideoWriter(tmp_path / 'new/v.mp4', 12.5)
    for level in (0, 100, 200):
        writer.write(np.full((size[1], size[0], 3), level, np.uint8))
        assert not (tmp_path / 'new/v.mp4').exists()
    writer.close()
    video = media.Video(tmp_path / 'new/v.mp4')
    assert video.fps == 12.5
    frames = [f for _, f in video.read()]
    assert [f.shape for f in frames] == [(48, 64, 3)] * 3
    assert [round(float(f.mean()), -1) for f in frames] == [0, 100, 200]
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['v.mp4']


def test_video_that_is_given_up_leaves_nothing(tmp_path):
    writer = media.VideoWriter(tmp_path / 'v.mp4', 10)
    writer.close()
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.close(keep=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', STRANGE)
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    for name in ('a.jpg', 'a.mp4', 'a.raw'):
        path = strange(tmp_path / name, kind)
        if name != 'a.mp4' or kind != 'endless':
            with faulty('image-file-unreadable'):
                (media.Video if name == 'a.mp4' else media.check_image)(path)
