"""Image files: which they are, and how large, read from their headers."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from mmfinetune.utils.errors import Problem
from mmfinetune.utils.files import find_files, looks_like, open_regular, reason_of

# What OpenCV, with which training reads images, can decode.
IMAGE_SUFFIXES = frozenset(
    '.jpg .jpeg .jpe .jfif .png .bmp .dib .tif .tiff .webp .jp2 .ppm .pgm .pbm .pnm'.split()  # noqa: SIM905
)

MOST_BYTES = 1 << 30  # of an image file
# OpenCV, with which training reads images, refuses larger ones (CV_IO_MAX_IMAGE_PIXELS, _WIDTH, _HEIGHT).
MOST_PIXELS, MOST_SIDE = 1 << 30, 1 << 20
_TAIL = 2048  # bytes; some cameras and editors put a few after the end mark
_END_MARKS = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image, upright: EXIF orientation applied, as in training.

    Reads the first and the last bytes of the file.

    Raises:
        Problem: The file is missing, empty, not an image or truncated, or OpenCV would not turn it.
    """
    path = Path(path)
    with _decoding(path), open_regular(path, MOST_BYTES) as file:
        image = Image.open(file)
        if is_too_large(*image.size):
            raise Problem('image-file-huge')
        size, found, is_turned = image.size, image.format or '', orientation_of(image) >= 5
        file.seek(-min(_TAIL, path.stat().st_size), os.SEEK_END)
        if not has_end(found, file.read()):
            raise Problem('image-file-truncated', format=found)
    if is_turned and found not in _END_MARKS:
        # OpenCV 4.12 does not turn WebP and does not decode a turned TIFF at all.
        raise Problem('image-file-turned', format=found)
    return size[::-1] if is_turned else size


def is_too_large(width: int, height: int) -> bool:
    """Whether OpenCV would refuse an image of this size."""
    return width * height > MOST_PIXELS or max(width, height) > MOST_SIDE


def read_pixels(path: str | Path, colours: bool = False) -> tuple[np.ndarray, str, str]:
    """The pixels of an image file as stored, Pillow's mode and Pillow's format; `colours` resolves palettes.

    Raises:
        Problem: The file is missing, empty, not an image or damaged.
    """
    path = Path(path)
    with _decoding(path), open_image(path) as opened:
        image: Image.Image = opened
        if colours and image.mode in ('P', 'PA'):
            image = image.convert('RGBA' if image.mode == 'PA' else 'RGB')
        return np.asarray(image), image.mode, opened.format or ''


def require_readable(path: Path, most: float = MOST_BYTES) -> None:
    """Raise a `Problem` for a file that another library would hang at or fill the memory with."""
    with _decoding(path), open_regular(path, most):
        pass


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image with Pillow, see `open_regular`; raises all that Pillow and the file system do."""
    with open_regular(path, MOST_BYTES) as file, Image.open(file) as image:
        yield image


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
            if path.is_file() and not path.stat().st_size:
                raise Problem('image-file-empty')
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
