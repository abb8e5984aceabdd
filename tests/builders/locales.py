"""Shells whose locale is not UTF-8."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LOCALES = {'ascii': None, 'gbk': ('zh_CN', 'GBK'), 'latin-1': ('en_US', 'ISO-8859-1'), 'utf-8': None}


def shell(coding: str, folder: Path) -> dict[str, str]:
    """The environment of a shell with a locale of this encoding, one of `LOCALES`; it is made in the folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(('LC_', 'LANG', 'PYTHONIO'))}
    if coding == 'utf-8':
        return {**env, 'LC_ALL': 'C.UTF-8'}
    if coding == 'ascii':
        return {**env, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
    language, charmap = LOCALES[coding]
    made = folder / f'{language}.{charmap}'
    command = ['localedef', '-i', language, '-f', charmap, made]
    if not shutil.which('localedef') or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip('no localedef, or it does not know this locale')
    return {**env, 'LOCPATH': str(folder), 'LC_ALL': made.name}
