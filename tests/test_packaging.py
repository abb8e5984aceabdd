"""What a wheel holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_holds_every_package_and_what_it_reads(tmp_path):
    # A copy, since setuptools writes its build folders next to the sources.
    for name in 'pyproject.toml', 'README.md':
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'mmfinetune', tmp_path / 'mmfinetune', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'tests/builders', tmp_path / 'tests/builders')
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', 'dist', '.'],
        cwd=tmp_path,
        check=True,
    )
    (wheel,) = (tmp_path / 'dist').glob('*.whl')
    held = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    assert held == {
        p.relative_to(ROOT).as_posix()
        for suffix in ('py', 'yaml', 'html')
        for p in (ROOT / 'mmfinetune').rglob(f'*.{suffix}')
    }
