"""Images and videos to predict on: which there are, and frames in and out of videos."""

from __future__ import annotations

import glob
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from mmfinetune.utils.errors import Message, Problem, UserError
from mmfinetune.utils.files import find_files, natural_key
from mmfinetune.utils.images import IMAGE_SUFFIXES, image_size, require_readable

# Containers that the FFmpeg inside OpenCV reads.
VIDEO_SUFFIXES = frozenset({'.mp4', '.m4v', '.avi', '.mov', '.mkv', '.webm'})
_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
# The share of the frames promised that must come; the count in the file is an estimate.
_ENOUGH = 0.9


@dataclass(frozen=True)
class Input:
    """One file to predict on.

    Attributes:
        path: The file.
        name: Its path below the folder that all inputs share, with slashes; no two are the same.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass
class Shot:
    """An image, or a frame of a video.

    Attributes:
        source: Where it is from.
        image: (H, W, 3) RGB uint8.
        frame: Number of the frame; None for an image.
        fps: Frames per second of the resulting video.
    """

    source: Input
    image: np.ndarray
    frame: int | None = None
    fps: float = 0


def find_inputs(given: Sequence[str], results: Sequence[Path]) -> tuple[list[Input], Path]:
    """Find the images and videos that files, folders and patterns stand for.

    Folders are searched recursively, in natural order. A file is used once, whichever way it
    is reached. A file that is named itself is used whatever its suffix.

    Args:
        given: Paths, or patterns such as ``'photos/**/*.jpg'``.
        results: Folders of results; what is in these is not an input.

    Returns:
        The files, and the folder that they share.

    Raises:
        UserError: Names that stand for nothing; all of them.
    """
    found: dict[str, Path] = {}
    anchors: list[str] = []
    problems: list[Message] = []
    own = tuple(os.path.realpath(folder) + os.sep for folder in results)
    for text in given:
        anchor = path = Path(text)
        if path.is_dir():
            files = find_files(path, _SUFFIXES)
            problem = Message('predict-empty-folder', name=text)
        elif path.is_file():
            files, anchor = [path], path.parent
            problem = Message('predict-own-output', name=text)
        elif glob.has_magic(text):
            # The folder above the first wildcard; the stand-in ends a bare folder.
            anchor = Path(glob.escape(text).partition('[')[0] + '_').parent
            files = _matching(anchor, path)
            problem = Message('predict-no-match', name=text)
        else:
            problems.append(Message('predict-no-file', name=text))
            continue
        chosen = [p for p in files if not os.path.realpath(p).startswith(own)]
        if not chosen:
            problems.append(problem)
        for p in chosen:
            found.setdefault(_absolute(p), p)
        anchors.append(_absolute(anchor))
    if problems:
        raise UserError('predict-inputs', problems=problems)
    root = os.path.commonpath(anchors)
    # Names that are not UTF-8 could not be written as JSON.
    names = [os.fsencode(os.path.relpath(place, root)).decode(errors='replace').replace(os.sep, '/') for place in found]
    return [Input(path, name) for path, name in zip(found.values(), names, strict=True)], Path(root)


def _absolute(path: Path) -> str:
    """The path without following links, so that a file keeps the name by which it is known."""
    return os.path.normpath(path.absolute())


def _matching(folder: Path, pattern: Path) -> list[Path]:
    """Files that match a pattern below a folder; hidden ones do not, as in a shell."""
    found = [p for p in folder.glob(str(pattern.relative_to(folder))) if p.suffix.lower() in _SUFFIXES and p.is_file()]
    seen = (p for p in found if not any(part.startswith('.') for part in p.relative_to(folder).parts))
    return sorted(seen, key=natural_key)


def output_names(names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Different paths for what is made of files, even where upper and lower case are the same.

    Args:
        names: Relative paths with slashes.
        suffixes: Suffix of what is made of each.
    """
    chosen: dict[str, str] = {}
    for name, suffix in zip(names, suffixes, strict=True):
        stem = PurePosixPath(name).with_suffix('')
        candidates = (f'{stem}_{count}{suffix}' if count > 1 else f'{stem}{suffix}' for count in itertools.count(1))
        free = next(c for c in candidates if c.casefold() not in chosen)
        chosen[free.casefold()] = free
    return list(chosen.values())


def check_image(path: Path) -> None:
    """Look for damage that decoders ignore, such as a missing end; raise it as a `Problem`."""
    require_readable(path)
    # Pillow may not know a format that OpenCV does.
    if path.suffix.lower() in IMAGE_SUFFIXES:
        image_size(path)


class Video:
    """A video file to read.

    Attributes:
        fps: Frames per second, as the file says.
        frames: Number of frames that the file promises; 0 if it does not tell.

    Raises:
        Problem: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        # FFmpeg would write its own lines between ours; what matters is in the errors below.
        os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
        require_readable(path, math.inf)
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise Problem('video-unreadable')
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else 25.0
        self.frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def read(self, every: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Every n-th frame with its number from 0, beginning with the first.

        Yields:
            The number and an (H, W, 3) RGB uint8 array.

        Raises:
            Problem: Frames are missing; after the last one that could be read.
        """
        number = 0
        try:
            while self._capture.grab():
                if number % every == 0:
                    good, frame = self._capture.retrieve()
                    if not good:
                        break
                    yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                number += 1
        finally:
            self._capture.release()
        if not number:
            raise Problem('video-no-frames')
        if number < _ENOUGH * self.frames:
            raise Problem('video-frames-missing', read=number, promised=self.frames)


class VideoWriter:
    """An MP4 file that appears when it is complete. The first frame sets the size."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self._part = path.with_name(f'.{path.stem}.{os.getpid()}.tmp.mp4')
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: np.ndarray) -> None:
        """Add an RGB frame; raise a UserError if the file cannot be written."""
        # Colours are stored for blocks of 2 x 2 pixels.
        odd = [n % 2 for n in frame.shape[:2]]
        frame = np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode='edge')
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter.fourcc(*'mp4v')
            self._writer = cv2.VideoWriter(str(self._part), codec, self.fps, frame.shape[1::-1])
            if not self._writer.isOpened():
                raise UserError('video-not-writable', path=self.path)
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self, keep: bool = True) -> None:
        """Put the file in its place, or discard it; do nothing if there was no frame."""
        if self._writer is None:
            return
        self._writer.release()
        if keep:
            self._part.replace(self.path)
        else:
            self._part.unlink(missing_ok=True)
