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
LAYERS = (
    ('__init__', 'errors', 'files', 'ops', 'classes'),
    ('devkit', 'voc', 'coco', 'demo', 'data', 'checkpoint', 'heads', 'weight_files',
     'torchvision_weights', 'convert', 'transfer', 'weights',
     'compare', 'config', 'lr', 'ranks', 'options', 'launch', 'batch_size', 'runs', 'pool',
     # what a run writes
     'results', 'plots', 'board', 'drawing', 'media',
     # evaluation
     'analysis', 'confusion', 'detections', 'error_plots', 'report',
     # data of one's own
     'records', 'layouts', 'prepare', 'prepare_read', 'dataset_writer', 'source_coco',
     'source_voc', 'source_cityscapes', 'source_labelme', 'source_yolo', 'source_masks',
     'json_index', 'coco_index', 'dataset_check', 'findings', 'finding_kinds', 'check_cache',
     'check_fix', 'check_images', 'check_masks', 'check_repair', 'check_report', 'check_rle',
     'check_table', 'split', 'stratify', 'new_config', 'sizing'),
    ('hooks', 'picture_hooks', 'result_hooks', 'guards', 'backends', 'datasets', 'loops',
     'train_loop', 'saving', 'metrics', 'optim', 'transforms', 'register'),
    ('train', 'inference', 'predictions', 'evaluation', 'cli'),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}
# Loading a config registers the parts that the config names.
EXCEPTIONS = {('config', 'register')}
# Layers that a tool may import; the parts of layer 2 are reached by the config only.
FOR_TOOLS = {0, 1, 3}
HEAVY = ('torch', 'torchvision', 'mmengine', 'mmdet', 'mmcv')
MODULES = sorted((ROOT / 'mmfinetune').rglob('*.py'))
TOOLS = sorted((ROOT / 'tools').glob('*.py'))
# Runs on any Python 3 before anything is installed, and takes no options.
NO_HELP = ('check_platform.py',)


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
                deep or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from imports(node, deep)


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


def siblings(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or in a function."""
    found = set()
    for name in imports(read(path), deep=True):
        parts = name.split('.')
        if parts[0] == 'mmfinetune':
            found.add(parts[1] if len(parts) > 1 else '__init__')
    return found


def test_what_counts_as_an_import():
    tree = ast.parse('''
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
''')
    assert list(imports(tree, deep=False)) == ['a.b', 'c', 'd.e.f', 'h', 'i']
    assert list(imports(tree, deep=True)) == ['a.b', 'c', 'd.e.f', 'h', 'i', 'm.n']


def test_every_module_has_one_layer():
    names = [name for layer in LAYERS for name in layer]
    assert len(set(names)) == len(names)
    # One file per kind: no folders in the package.
    assert sorted(p.relative_to(ROOT / 'mmfinetune').with_suffix('').as_posix()
                  for p in MODULES) == sorted(names)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
def test_module_imports_no_higher_layer(path):
    layer = LAYER_OF[path.stem]
    higher = {name for name in siblings(path)
              if LAYER_OF[name] > layer and (path.stem, name) not in EXCEPTIONS}
    assert not higher


def test_exceptions_are_still_needed():
    for module, imported in EXCEPTIONS:
        assert imported in siblings(ROOT / 'mmfinetune' / f'{module}.py')


@pytest.mark.parametrize('path', [p for p in MODULES if LAYER_OF[p.stem] <= 1 and p.stem != 'ops'],
                         ids=lambda p: p.stem)
def test_low_layers_import_nothing_heavy_at_their_top(path):
    found = {name.split('.')[0] for name in imports(read(path), deep=False)}
    assert not found & set(HEAVY)


@pytest.mark.parametrize('path', TOOLS, ids=lambda p: p.name)
def test_tool_imports_no_registered_part(path):
    assert {name for name in siblings(path) if LAYER_OF[name] not in FOR_TOOLS} == set()


@pytest.mark.parametrize('path', TOOLS, ids=lambda p: p.name)
def test_tool_is_short(path):
    assert len(path.read_text().splitlines()) <= 130


def test_nobody_imports_tools_or_configs():
    files = [*MODULES, *TOOLS, *(ROOT / 'tests').glob('*.py'), *(ROOT / 'configs').rglob('*.py')]
    assert len(files) > 30
    for path in files:
        # A tool is found by its bare name too, when it lies beside the one that runs.
        wrong = {'tools', 'configs'} | ({t.stem for t in TOOLS} if path in TOOLS else set())
        assert not {n.split('.')[0] for n in imports(read(path), deep=True)} & wrong, path


def run(*args: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT,
                          timeout=60, **options)


@pytest.mark.parametrize('name', ['mmfinetune', *(f'mmfinetune.{m}' for m in (
    'errors', 'files', 'classes', 'cli', 'lr', 'coco', 'config', 'checkpoint', 'voc', 'train'))])
def test_import_brings_nothing_heavy(name):
    done = run('-c', f'import {name}, sys; print([m for m in {HEAVY} if m in sys.modules])')
    assert (done.returncode, done.stdout.strip()) == (0, '[]'), done.stderr


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
