"""Fonts for text in pictures."""

from __future__ import annotations

import pytest
from PIL import ImageFont

from mmfinetune.utils import fonts


def drawn_text(name: str) -> str:
    font = fonts.font_for(20, name)
    return fonts.readable(name, font)


@pytest.mark.parametrize('name', ['naïve café', 'Москва', 'άλφα', 'سيارة', 'a±b → c'])
def test_names_that_the_bundled_font_has_are_drawn_as_they_are(name):
    assert drawn_text(name) == name


def test_what_no_font_has_is_written_by_number(monkeypatch):
    monkeypatch.setattr(fonts, 'WIDE_FONTS', ())
    fonts._font_sources.cache_clear()
    fonts._font_with.cache_clear()
    try:
        assert drawn_text('人 cat') == '\\u4eba cat'
        assert drawn_text('क्या') == '\\u0915\\u094d\\u092f\\u093e'
        assert drawn_text('a\n b\x00') == 'a b\\x00'
    finally:
        fonts._font_sources.cache_clear()
        fonts._font_with.cache_clear()


def test_long_names_are_shortened_but_keep_the_score():
    font = ImageFont.load_default(12)
    text = fonts.shortened('a name that never ends 0.93', font, 100)
    assert text.startswith('a name')
    assert text.endswith('… 0.93')
    assert font.getlength(text) <= 100
    assert fonts.shortened('endless' * 9, font, 60).endswith('…')
    assert fonts.shortened('cat 0.93', font, 3) == ''
