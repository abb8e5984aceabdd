"""Who may import whom, read off the syntax trees; and what the tools cost to start."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmfinetune'
# A folder imports those on lower floors only; `tools/` stands above all.
FLOOR = {
    'utils': 1,
    'data': 2,
    'weights': 2,
    'models': 2,
    'config': 3,
    'evaluation': 3,
    'engine': 4,
    'apis': 5,
    'register': 5,
}
HEAVY = ('torch', 'torchvision', 'mmengine', 'mmdet', 'mmcv')
# Where they may stand at the top of a file. A tool that only reads its command line needs none.
MAY_BE_HEAVY = ('models', 'engine', 'weights/read', 'weights/origins', 'register')
MODULES = sorted(PACKAGE.rglob('*.py'))
TOOLS = sorted((ROOT / 'tools').glob('*.py'))
# Runs on any Python 3 before anything is installed, and takes no options.
NO_HELP = ('check_platform.py',)
MOST_LINES, MOST_LINES_OF_FUNCTION, MOST_MODULES = 400, 60, 14


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def imports(tree: ast.AST, deep: bool) -> Iterator[str]:
    """Dotted names that a module imports.

    Args:
        tree: Of the module.
        deep: Those within functions too.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, 'relative import'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        elif not is_type_checking(node) and (
            deep or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        ):
            yield from imports(node, deep)


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix('').as_posix()


def files_imported(path: Path) -> set[str]:
    """Files of the package that a file imports, at its top or in a function, as in `place`."""
    found = set()
    for name in imports(read(path), deep=True):
        package, *parts = name.split('.')
        if package != 'mmfinetune':
            continue
        while parts and not (PACKAGE.joinpath(*parts).with_suffix('.py')).is_file():
            parts.pop()
        if parts:
            found.add('/'.join(parts))
    return found


ARROWS = {place(path): files_imported(path) for path in MODULES}


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Files that import each other by some way; what remains once all that end are taken off."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while ends := [name for name, targets in left.items() if not targets & set(left)]:
        for name in ends:
            del left[name]
    return sorted(left)


def test_what_counts_as_an_import():
    tree = ast.parse("""
import a.b, c
from d.e import f as g
if TYPE_CHECKING:
    import not_this
try:
    import h
except ImportError:
    h = None
class K:
    import i
def l():
    if 1:
        from m import n
""")
    assert list(imports(tree, deep=False)) == ['a.b', 'c', 'd.e.f', 'h', 'i']
    assert list(imports(tree, deep=True)) == ['a.b', 'c', 'd.e.f', 'h', 'i', 'm.n']


def test_a_circle_is_found():
    assert circles({'a': {'b'}, 'b': {'c'}, 'c': {'a'}, 'd': {'a'}, 'e': set()}) == ['a', 'b', 'c', 'd']
    assert circles({'a': {'b'}, 'b': {'c'}, 'c': set(), 'd': {'a', 'c'}}) == []


def test_no_files_import_each_other():
    assert len(ARROWS) > 60
    assert circles(ARROWS) == []


def test_every_folder_has_a_floor():
    assert {place(path).split('/')[0] for path in MODULES} == {'__init__', *FLOOR}
    assert max(FLOOR.values()) <= 5


@pytest.mark.parametrize('name', [n for n in ARROWS if n != '__init__'])
def test_module_imports_lower_floors_only(name):
    folder = name.split('/')[0]
    others = {target for target in ARROWS[name] if target.split('/')[0] != folder}
    assert {t for t in others if FLOOR[t.split('/')[0]] >= FLOOR[folder]} == set()


@pytest.mark.parametrize('path', [p for p in MODULES if not place(p).startswith(MAY_BE_HEAVY)], ids=place)
def test_low_floors_import_nothing_heavy_at_their_top(path):
    found = {name.split('.')[0] for name in imports(read(path), deep=False)}
    assert not found & set(HEAVY)


@pytest.mark.parametrize('path', TOOLS, ids=lambda p: p.name)
def test_tool_imports_no_registered_part(path):
    # Those are reached by the config only.
    assert {name for name in files_imported(path) if name.startswith(('engine/hooks', 'register'))} == set()


@pytest.mark.parametrize('path', TOOLS, ids=lambda p: p.name)
def test_tool_is_short(path):
    assert len(path.read_text().splitlines()) <= 130


@pytest.mark.parametrize('path', MODULES, ids=place)
def test_module_and_its_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(read(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MOST_LINES_OF_FUNCTION
    }
    assert long == {}


def test_no_folder_is_a_street():
    for folder in {path.parent for path in MODULES}:
        assert len([p for p in folder.glob('*.py') if p.name != '__init__.py']) <= MOST_MODULES, folder


def test_nobody_imports_tools_or_configs():
    files = [*MODULES, *TOOLS, *(ROOT / 'tests').rglob('*.py'), *(ROOT / 'configs').rglob('*.py')]
    assert len(files) > 30
    for path in files:
        # A tool is found by its bare name too, when it lies beside the one that runs.
        wrong = {'tools', 'configs'} | ({t.stem for t in TOOLS} if path in TOOLS else set())
        assert not {n.split('.')[0] for n in imports(read(path), deep=True)} & wrong, path


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT, timeout=60, **options)


def test_importing_the_low_floors_brings_nothing_heavy():
    names = [
        'mmfinetune',
        *(f'mmfinetune.{place(p).replace("/", ".")}' for p in MODULES if not place(p).startswith(MAY_BE_HEAVY)),
    ]
    code = (
        f'import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n'
        f'    bad = [m for m in {HEAVY} if m in sys.modules]\n    assert not bad, (name, bad)'
    )
    done = run('-c', code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('path', [t for t in TOOLS if t.name not in NO_HELP], ids=lambda p: p.name)
def test_help_is_quick(path):
    done = run('-X', 'importtime', str(path), '--help')
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith('usage:')
    assert f'tools/{path.name}' in done.stdout  # an example to copy
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'argparse' in imported
    assert not imported & set(HEAVY)
    # The best of three, since other work may hold the processor.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(str(path), '--help')
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 2:
            break
    assert min(seconds) < 2
