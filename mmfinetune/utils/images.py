"""Image files: which they are, and how large, read from their headers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from mmfinetune.utils.files import find_files, looks_like

# What OpenCV, with which training reads images, can decode.
IMAGE_SUFFIXES = frozenset(
    {
        '.jpg',
        '.jpeg',
        '.jpe',
        '.jfif',
        '.png',
        '.bmp',
        '.dib',
        '.tif',
        '.tiff',
        '.webp',
        '.jp2',
        '.ppm',
        '.pgm',
        '.pbm',
        '.pnm',
    }
)

_TAIL = 2048  # bytes; some cameras and editors put a few behind the end mark
_END_MARKS = {'JPEG': b'\xff\xd9', 'MPO': b'\xff\xd9', 'PNG': b'IEND'}


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image, upright: EXIF orientation applied, as in training.

    Only the first and the last bytes of the file are read.

    Raises:
        ValueError: With a short reason: missing, empty, not an image, truncated.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not size:
            raise ValueError('empty file (0 bytes)')
        with warnings.catch_warnings():
            # Pillow warns of large images; their header alone is harmless.
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                width, height = image.size
                kind = image.format
                turned = _orientation(image) >= 5
        if turned and kind not in _END_MARKS:
            # OpenCV 4.12 does not turn WebP and does not decode a turned TIFF at all.
            raise ValueError(f'a {kind} turned by its EXIF orientation, which OpenCV does not follow; save it upright')
        with path.open('rb') as file:
            file.seek(-min(_TAIL, size), os.SEEK_END)
            tail = file.read()
    except FileNotFoundError:
        raise ValueError('missing') from None
    except UnidentifiedImageError:
        raise ValueError('not an image' + _instead(path)) from None
    except Image.DecompressionBombError:
        raise ValueError('too many pixels; cut it into tiles') from None
    except ValueError:
        raise
    # Pillow's plugins raise many kinds (OSError, SyntaxError, struct.error, …) on damaged headers.
    except Exception as error:
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise ValueError(f'unreadable ({reason})') from None
    mark = _END_MARKS.get(kind or '')
    if mark and mark not in tail:
        raise ValueError(f'truncated {kind} (its end is missing)')
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; from 5 on width and height change places."""
    exif = Image.Exif()
    if image.format == 'PNG':
        # Pillow's `getexif` would decode a PNG to look for EXIF data behind the pixels.
        exif.load(image.info.get('exif') or b'')
    else:
        exif = image.getexif()
    found = exif.get(ExifTags.Base.Orientation)
    return found if found in range(1, 9) else 1


def _instead(path: Path) -> str:
    try:
        found = looks_like(path)
    except OSError:
        return ''
    return f' but {found}' if found else ''


def find_images(root: str | Path) -> list[Path]:
    """All image files below a folder; see `find_files`."""
    return find_files(root, IMAGE_SUFFIXES)
