"""Fonts for text in pictures, in any script."""

from __future__ import annotations

import functools
import importlib.util
import math
from pathlib import Path
from typing import Any

from PIL import ImageFont

# Files of common system fonts with Chinese, Japanese and Korean letters.
WIDE_FONTS = (
    'NotoSansCJK-Regular.ttc',
    'NotoSansCJKsc-Regular.otf',
    'NotoSansSC-Regular.otf',
    'SourceHanSansSC-Regular.otf',
    'wqy-microhei.ttc',
    'wqy-zenhei.ttc',
    'DroidSansFallbackFull.ttf',
    'DroidSansFallback.ttf',
    'uming.ttc',
    'msyh.ttc',
    'simhei.ttf',
    'PingFang.ttc',
    'Arial Unicode.ttf',
)


@functools.cache
def _load_font(source: str, size: int) -> Any:
    try:
        return ImageFont.truetype(source, size) if source else ImageFont.load_default(size)
    except OSError:
        return None


@functools.cache
def _font_sources() -> tuple[str, ...]:
    """Fonts to try: matplotlib's DejaVu, Pillow's own, and those of the system."""
    found = importlib.util.find_spec('matplotlib')
    own = Path(found.origin or '').parent / 'mpl-data/fonts/ttf/DejaVuSans.ttf' if found else None
    return (*([str(own)] if own and own.is_file() else []), '', *WIDE_FONTS)


def font_for(size: int, text: str) -> ImageFont.FreeTypeFont:
    """The first font with all characters of a text, else the one that has most of them."""
    # Scores make most texts differ, but only what is beyond ASCII tells fonts apart.
    return _font_with(size, ''.join(sorted({c for c in text if not c.isascii()})))


@functools.lru_cache(1024)
def _font_with(size: int, text: str) -> ImageFont.FreeTypeFont:
    best: Any = None
    fewest = math.inf
    for font in filter(None, (_load_font(source, size) for source in _font_sources())):
        missing = len(_missing(text, font))
        if missing < fewest:
            best, fewest = font, missing
        if not fewest:
            break
    return best


def _missing(text: str, font: ImageFont.FreeTypeFont) -> set[str]:
    """Characters that a font does not have: it draws the same sign for all of them."""
    unknown = {c for c in text if not (c.isascii() and c.isprintable())}
    if not unknown:
        return set()
    # The full layout engine adds a circle to a mark that stands alone.
    plain = font
    if isinstance(font.path, str):
        plain = ImageFont.truetype(font.path, font.size, layout_engine=ImageFont.Layout.BASIC)
    sign = bytes(plain.getmask('\U0010fffd'))
    return {c for c in unknown if not c.isprintable() or bytes(plain.getmask(c)) == sign}


def fitted(text: str, size: int, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text as it can be drawn in a width in px, and the font for it; see `readable` and `shortened`."""
    font = font_for(size, text)
    return shortened(readable(text, font), font, width), font


def readable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text in one line, characters that cannot be drawn as numbers, as in ``\\u4eba``."""
    text = ' '.join(text.split())
    missing = _missing(text, font)
    return ''.join(c.encode('unicode_escape').decode() if c in missing else c for c in text)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or its beginning with the score if that fits a width; empty if nothing does."""
    if font.getlength(text) <= width:
        return text
    name, _, last = text.rpartition(' ')
    for start, tail in ((name, f'… {last}'), (name or text, '…')):
        for end in range(len(start), 0, -1):
            shorter = start[:end].rstrip() + tail
            if font.getlength(shorter) <= width:
                return shorter
    return ''
