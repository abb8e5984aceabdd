"""Image files: which they are, and how large, read from their headers."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mmfinetune.utils.errors import Problem
from mmfinetune.utils.files import find_files, looks_like, reason_of

# What OpenCV, with which training reads images, can decode.
IMAGE_SUFFIXES = frozenset(
    '.jpg .jpeg .jpe .jfif .png .bmp .dib .tif .tiff .webp .jp2 .ppm .pgm .pbm .pnm'.split()  # noqa: SIM905
)

_TAIL = 2048  # bytes; some cameras and editors put a few after the end mark
_END_MARKS = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image file say.

    Attributes:
        size: Width and height as stored.
        format: Pillow's name of the format.
        orientation: EXIF orientation, 1 to 8.
    """

    size: tuple[int, int]
    format: str
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height with the EXIF orientation applied, as in training."""
        return self.size[::-1] if self.orientation >= 5 else self.size


def read_header(path: str | Path) -> Header:
    """Read the first and the last bytes of an image file.

    Raises:
        Problem: The file is missing, empty, not an image or truncated.
    """
    path = Path(path)
    with _decoding(path):
        size = path.stat().st_size
        if not size:
            raise Problem('image-file-empty')
        with Image.open(path) as image:
            header = Header(image.size, image.format or '', orientation_of(image))
        with path.open('rb') as file:
            file.seek(-min(_TAIL, size), os.SEEK_END)
            if not has_end(header.format, file.read()):
                raise Problem('image-file-truncated', format=header.format)
    return header


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image, upright: EXIF orientation applied, as in training.

    Raises:
        Problem: See `read_header`; or OpenCV would not turn the image.
    """
    header = read_header(path)
    if header.orientation >= 5 and header.format not in _END_MARKS:
        # OpenCV 4.12 does not turn WebP and does not decode a turned TIFF at all.
        raise Problem('image-file-turned', format=header.format)
    return header.upright


def read_pixels(path: str | Path, colours: bool = False) -> tuple[np.ndarray, str, str]:
    """The pixels of an image file as stored, Pillow's mode and Pillow's format.

    Args:
        path: The file.
        colours: Whether to resolve palettes.

    Raises:
        Problem: The file is missing, empty, not an image or damaged.
    """
    path = Path(path)
    with _decoding(path):
        if not path.stat().st_size:
            raise Problem('image-file-empty')
        with Image.open(path) as opened:
            image: Image.Image = opened
            if colours and image.mode in ('P', 'PA'):
                image = image.convert('RGBA' if image.mode == 'PA' else 'RGB')
            return np.asarray(image), image.mode, opened.format or ''


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on width and height change places."""
    exif = Image.Exif()
    if image.format == 'PNG':
        # Pillow's `getexif` would decode a PNG to look for EXIF data after the pixels.
        exif.load(image.info.get('exif') or b'')
    else:
        exif = image.getexif()
    found = exif.get(ExifTags.Base.Orientation)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def has_end(file_format: str, tail: bytes) -> bool:
    """Whether the last 2,048 bytes of a file hold the end mark of its format, where it has one."""
    return _END_MARKS.get(file_format, b'') in tail[-_TAIL:]


@contextlib.contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn all that reading an image may raise into a `Problem`."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images; their header alone is harmless.
            warnings.simplefilter('ignore')
            yield
    except Problem:
        raise
    except FileNotFoundError:
        raise Problem('image-file-missing') from None
    except UnidentifiedImageError:
        if found := looks_like(path):
            raise Problem('image-file-other', found=found) from None
        raise Problem('image-file-unknown') from None
    except Image.DecompressionBombError:
        raise Problem('image-file-huge') from None
    # Pillow's decoders raise many kinds (OSError, SyntaxError, struct.error, …) on damaged files.
    except Exception as error:
        raise Problem('image-file-unreadable', reason=reason_of(error)) from None


def find_images(root: str | Path) -> list[Path]:
    """All image files below a folder; see `find_files`."""
    return find_files(root, IMAGE_SUFFIXES)
