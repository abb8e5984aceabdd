"""Whether the image files exist, are complete, of the size that is written, and different."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mmfinetune.data.check.table import Table
from mmfinetune.utils.files import looks_like, read_regular, reason_of
from mmfinetune.utils.images import MOST_BYTES, has_end, is_too_large, open_image, orientation_of
from mmfinetune.utils.workers import in_order

_CHUNK = 32  # images per task of a worker
# Upper-case suffixes that name each of Pillow's formats.
_SUFFIXES = {
    'JPEG': ('.JPG', '.JPEG', '.JPE', '.JFIF'),
    'PNG': ('.PNG',),
    'BMP': ('.BMP', '.DIB'),
    'TIFF': ('.TIF', '.TIFF'),
    'WEBP': ('.WEBP',),
    'GIF': ('.GIF',),
    'MPO': ('.JPG', '.JPEG', '.MPO'),
}
# dHash: 64 comparisons of neighbours in a row of a 9x8 thumbnail (N. Krawetz, 2013).
_HASH_BITS = 3  # that two hashes may differ in
_HASH_SIDE = (9, 8)
_LEAST_CONTRAST = 8.0  # standard deviation of the thumbnail, grey levels
_LOOK_SIDE, _LOOK_DIFFERENCE, _LOOK_CORRELATION = 64, 8.0, 0.97


@dataclass
class ImageFacts:
    """What one image file is.

    Attributes:
        problem: Code of what is wrong with it; the rest is not filled in then.
        detail: The same in words.
        width, height: Size as stored.
        turned: EXIF orientation, 1 to 8.
        mode: Pillow's mode.
        format: Pillow's name of the format.
        digest: Digest of the content.
        dhash: 64 bits, or None for an image without contrast.
    """

    problem: str = ''
    detail: str = ''
    width: int = 0
    height: int = 0
    turned: int = 1
    mode: str = ''
    format: str = ''
    digest: bytes = b''
    dhash: int | None = None

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as mmcv reads it, EXIF orientation applied."""
        size = (self.width, self.height)
        return size[::-1] if self.turned >= 5 else size


def look_at(path: Path) -> ImageFacts:
    """Read and decode an image; never raises."""
    try:
        content = read_regular(path, MOST_BYTES)
    except FileNotFoundError:
        return ImageFacts('image-missing')
    except (OSError, ValueError, RuntimeError) as error:
        # A loop of links, no right to read, a name too long.
        return ImageFacts('image-unreadable', reason_of(error))
    if not content:
        return ImageFacts('image-unreadable')
    facts = ImageFacts(digest=hashlib.blake2b(content, digest_size=16).digest())
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter('ignore')
            facts.width, facts.height = image.size
            facts.mode, facts.format = image.mode, image.format or ''
            if is_too_large(facts.width, facts.height):
                size = f'{facts.width}x{facts.height}'
                return ImageFacts(
                    'image-unreadable', f'{size}: more than 2^30 pixels or 2^20 a side, which OpenCV refuses'
                )
            with contextlib.suppress(Exception):  # cameras and phones write EXIF in many damaged ways
                facts.turned = orientation_of(image)
            # All bytes are still decoded, but a JPEG to an eighth of its size at once.
            image.draft('L', (9 * 8, 8 * 8))
            facts.dhash = _dhash(image)
    except UnidentifiedImageError:
        return ImageFacts('image-unreadable', looks_like(content) or 'not an image')
    # Pillow's decoders raise many kinds (OSError, SyntaxError, ValueError, struct.error, …).
    except Exception as error:
        text = str(error) or type(error).__name__
        short = any(word in text.lower() for word in ('truncated', 'incomplete', 'end of file'))
        return ImageFacts('image-truncated' if short else 'image-unreadable', text)
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before
    if not has_end(facts.format, content):
        # Pillow forgives a JPEG of which only the end mark is missing.
        return ImageFacts('image-truncated')
    return facts


def _dhash(image: Image.Image) -> int | None:
    small = np.asarray(image.convert('L').resize(_HASH_SIDE, Image.Resampling.BOX), np.int16)
    if small.std() < _LEAST_CONTRAST:
        return None
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), 'big')


def read_images(paths: Sequence[Path], workers: int | None = None, progress: bool = True) -> dict[Path, ImageFacts]:
    """Look at image files in several processes.

    Raises:
        UserError: A worker was killed.
    """
    paths = list(dict.fromkeys(paths))
    workers = workers or os.cpu_count() or 1
    facts = in_order(look_at, paths, workers, _CHUNK, desc='images', wanted=progress)
    return dict(zip(paths, facts, strict=True))


def check_images(table: Table, facts: dict[Path, ImageFacts]) -> None:
    """Mark the images of a table whose files are wrong."""
    found: dict[str, dict[int, str]] = {}
    first_of: dict[bytes, int] = {}
    for row, name in enumerate(table.files):
        if name is None:
            continue
        fact = facts[table.root / name]
        if fact.problem:
            detail = _other_form(table.root, name) if fact.problem == 'image-missing' else ''
            found.setdefault(fact.problem, {})[row] = detail or fact.detail
            continue
        for code, detail in _problems_of(fact, name, int(table.widths[row]), int(table.heights[row])):
            found.setdefault(code, {})[row] = detail
        other = first_of.setdefault(fact.digest, row)
        if table.files[other] != name:
            found.setdefault('image-duplicate', {})[row] = f'the same as {table.files[other]}'
    for code, details in found.items():
        table.marks.add(code, list(details), details)


def _other_form(root: Path, name: str) -> str:
    """Where a missing file is: under a name that looks the same, with accents as one character or as two."""
    names = {form: unicodedata.normalize(form, name) for form in ('NFC', 'NFD')}
    form = next((form for form, other in names.items() if other != name and (root / other).is_file()), '')
    return form and f'its name is there in Unicode form {form}; tools/prepare_data.py SRC OUT reads it'


def _problems_of(fact: ImageFacts, name: str, width: int, height: int) -> Iterator[tuple[str, str]]:
    """Codes and details of what does not fit between a whole image file and its entry."""
    upright, stored = fact.upright, (fact.width, fact.height)
    if width and (width, height) != upright:
        if (width, height) == stored:
            yield 'image-exif', f'{width}x{height} becomes {upright[0]}x{upright[1]} (orientation {fact.turned})'
        else:
            yield 'image-size', f'is {upright[0]}x{upright[1]}, the file says {width}x{height}'
    elif fact.turned > 1 and (fact.turned < 5 or fact.width == fact.height):
        yield 'image-exif-same-size', f'orientation {fact.turned}'
    if fact.mode.startswith(('I', 'F')):
        yield 'image-depth', f'mode {fact.mode}'
    elif fact.mode in ('RGBA', 'LA', 'PA', 'CMYK', 'YCCK'):
        yield 'image-channels', fact.mode
    known = _SUFFIXES.get(fact.format)
    suffix = Path(name).suffix.upper()
    if known and suffix not in known and any(suffix in s for s in _SUFFIXES.values()):
        yield 'image-extension', f'{fact.format} inside'


def similar(first: dict[Path, ImageFacts], second: dict[Path, ImageFacts]) -> list[tuple[Path, Path]]:
    """Pairs of images, one of each, that show the same picture; verified by looking at both."""
    near = _near(first, second)
    return [(one, two) for one, two in near if first[one].digest != second[two].digest and _same_picture(one, two)]


def _near(first: dict[Path, ImageFacts], second: dict[Path, ImageFacts]) -> list[tuple[Path, Path]]:
    """Pairs whose hashes differ in at most `_HASH_BITS` bits."""
    ours = [(p, f.dhash) for p, f in first.items() if f.dhash is not None]
    theirs = [(p, f.dhash) for p, f in second.items() if f.dhash is not None]
    found = set()
    # One of 4 parts is the same in both if no more than 3 bits differ.
    for shift in range(0, 64, 16):
        bins: dict[int, list[int]] = {}
        for i, (_, value) in enumerate(ours):
            bins.setdefault(value >> shift & 0xFFFF, []).append(i)
        for k, (_, value) in enumerate(theirs):
            for i in bins.get(value >> shift & 0xFFFF, ()):
                if (ours[i][1] ^ value).bit_count() <= _HASH_BITS:
                    found.add((i, k))
    return [(ours[i][0], theirs[k][0]) for i, k in sorted(found)]


def _same_picture(one: Path, two: Path) -> bool:
    try:
        with open_image(one) as a, open_image(two) as b:
            if abs(a.width * b.height - b.width * a.height) > 0.05 * a.width * b.height:
                return False
            pixels = [np.asarray(image.convert('RGB').resize((_LOOK_SIDE,) * 2), np.float32) for image in (a, b)]
    except (OSError, ValueError):
        return False
    correlation = np.corrcoef(pixels[0].ravel(), pixels[1].ravel())[0, 1]
    return bool(np.abs(pixels[0] - pixels[1]).mean() <= _LOOK_DIFFERENCE and correlation >= _LOOK_CORRELATION)
