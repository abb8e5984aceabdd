"""Weights files are read as data only; garbage and code end in a message."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import random
import shutil
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfinetune.utils.errors import UserError
from mmfinetune.weights import read
from mmfinetune.weights.publish import publish
from mmfinetune.weights.read import read_checkpoint, state_dict_of
from mmfinetune.weights.sources import open_source
from tests.builders.errors import refused
from tests.builders.weights import Evil, mmdet_state


def write_legacy(obj, path: Path) -> None:
    torch.save(obj, path, _use_new_zipfile_serialization=False)


def write_pickle(protocol: int, obj, path: Path) -> None:
    path.write_bytes(pickle.dumps(obj, protocol=protocol))


@pytest.mark.parametrize('write', [torch.save, write_legacy, partial(write_pickle, 2)], ids=['zip', 'legacy', 'pickle'])
def test_pickle_that_runs_code_is_refused(tmp_path, write):
    trace, path = tmp_path / 'trace', tmp_path / 'a.pth'
    write({'state_dict': {}, 'x': Evil(os.system, f'touch {trace}')}, path)
    with refused('weights-code', path=path, culprit='posix.system'):
        read_checkpoint(path)
    assert not trace.exists()
    # The file does run its command where nothing holds it back.
    (pickle.loads(path.read_bytes()) if isinstance(write, partial) else torch.load(path, weights_only=False))
    assert trace.exists()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('protocol', [0, 1, 3, 4, 5])
def test_pickle_of_any_protocol_runs_nothing(tmp_path, protocol):
    trace, path = tmp_path / 'trace', tmp_path / 'a.pth'
    write_pickle(protocol, Evil(os.system, f'touch {trace}'), path)
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert caught.value.facts['path'] == path
    assert not trace.exists()


@pytest.mark.parametrize('last', [False, True], ids=['tensor', 'last tensor'])
def test_a_changed_byte_in_a_tensor_is_found(tmp_path, last):
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {'a': torch.full((1000,), 3.0), 'b': torch.full((1000,), 5.0)}}, path)
    data = bytearray(path.read_bytes())
    value = torch.tensor(5.0 if last else 3.0).numpy().tobytes()
    data[data.index(value * 1000) + 2000] ^= 1
    path.write_bytes(data)
    assert torch.load(path)['state_dict']['b' if last else 'a'].unique().numel() > 1  # torch reads it
    with refused('weights-crc', path=path, part=f'a/data/{int(last)}'):
        read_checkpoint(path)


def test_a_file_without_crcs_is_read(tmp_path):
    path = tmp_path / 'a.pth'
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({'state_dict': {'a': torch.ones(1000)}}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path)['state_dict']['a'].sum() == 1000


@pytest.mark.parametrize('write', [torch.save, partial(write_pickle, 2)], ids=['pth', 'pkl'])
def test_settings_of_a_script_are_plain_values(tmp_path, write):
    args = argparse.Namespace(lr=0.02, names=['a'], out=Path('runs/1'), inner=types.SimpleNamespace(amp=True))
    path = tmp_path / ('a.pth' if write is torch.save else 'a.pkl')
    write({'model': {'a': torch.ones(1) if write is torch.save else np.ones(1)}, 'args': args}, path)
    if write is torch.save:
        assert read.load(path)['args'] == {'lr': 0.02, 'names': ['a'], 'out': 'runs/1', 'inner': {'amp': True}}
    assert read.load(path)['model']['a'] == 1


@pytest.mark.parametrize('write', [torch.save, partial(write_pickle, 2)], ids=['pth', 'pkl'])
def test_code_in_settings_does_not_run(tmp_path, write):
    trace = tmp_path / 'trace'
    path = tmp_path / ('a.pth' if write is torch.save else 'a.pkl')
    write({'model': {}, 'args': argparse.Namespace(x=Evil(os.mkdir, str(trace)))}, path)
    with refused('weights-code', culprit='posix.mkdir'):
        read.load(path)
    assert not trace.exists()


def test_truncated_file(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {'a': torch.randn(1000)}}, path)
    data = path.read_bytes()
    for length in (len(data) // 2, len(data) - 1, 10, 1):
        path.write_bytes(data[:length])
        with refused('weights-unreadable', path=path):
            read_checkpoint(path)


@pytest.mark.parametrize(
    'data',
    [b'garbage, no pickle', b'\x00' * 100, b'\x80\x02.', b'PK\x03\x04', b'Not Found\n', bytes(range(255, 0, -1)) * 20],
)
def test_garbage(tmp_path, data):
    (tmp_path / 'a.pth').write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / 'a.pth')
    assert caught.value.facts['path'] == tmp_path / 'a.pth'


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
def test_legacy_file_cut_or_changed_anywhere(tmp_path):
    path = tmp_path / 'a.pth'
    write_legacy({'state_dict': {'a': torch.ones(2)}}, path)
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        changed = bytearray(data[: rng.randrange(len(data) + 1)])
        for _ in range(rng.randrange(3) if changed else 0):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        # Either it is read, or refused in words: no other exception.
        with contextlib.suppress(UserError):
            read_checkpoint(path)


def test_file_of_something_else(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save([torch.ones(1)], path)
    with refused('weights-not-a-dict', type='list'):
        read_checkpoint(path)


def test_own_checkpoint_of_mmengine_is_read(tmp_path):
    from mmengine.logging import HistoryBuffer

    path = tmp_path / 'epoch_1.pth'
    torch.save(
        {
            'state_dict': {'a': torch.ones(2)},
            'optimizer': {'param_groups': []},
            'message_hub': {
                'log_scalars': {'loss': HistoryBuffer([1.0], [1])},
                'runtime_info': {'best': np.float64(0.5)},
            },
        },
        path,
    )
    assert torch.equal(read_checkpoint(path)['state_dict']['a'], torch.ones(2))


class ThroughGetattr:
    """Reaches a module of MMEngine by an attribute of a class that may be in a checkpoint."""

    def __reduce__(self):
        from mmengine.logging import HistoryBuffer

        return (getattr, (HistoryBuffer.__init__, '__globals__'), None, None, iter([('poisoned', 'yes')]))


def test_getattr_reaches_nothing_but_statistics(tmp_path):
    from mmengine.logging import HistoryBuffer

    torch.save({'state_dict': {'a': torch.ones(1)}, 'bad': ThroughGetattr()}, tmp_path / 'a.pth')
    with refused('weights-code', culprit='builtins.getattr'):
        read_checkpoint(tmp_path / 'a.pth')
    assert 'poisoned' not in HistoryBuffer.__init__.__globals__
    torch.save({'state_dict': {'a': torch.ones(1)}, 'log': HistoryBuffer([1.0], [1])}, tmp_path / 'b.pth')
    assert read_checkpoint(tmp_path / 'b.pth')['log'].mean() == 1


@pytest.mark.parametrize(
    'wrap',
    [
        lambda t: t,
        lambda t: {'state_dict': t},
        lambda t: {'model': t, 'epoch': 3},
        lambda t: {'state_dict': {f'module.{k}': v for k, v in t.items()}},
    ],
)
def test_state_dict_of(tmp_path, wrap):
    tensors = {'conv.weight': torch.randn(3), 'bn.num_batches_tracked': torch.tensor(3)}
    found = state_dict_of(wrap(tensors), tmp_path)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)


def test_module_prefix_goes_only_if_all_have_it(tmp_path):
    tensors = {'module.a': torch.ones(1), 'b': torch.ones(1)}
    assert list(state_dict_of(tensors, tmp_path)) == ['module.a', 'b']


@pytest.mark.parametrize('loaded', [{'epoch': 3, 'note': ''}, {'state_dict': None}, {'state_dict': [1]}])
def test_no_weights_in_it(loaded):
    with refused('weights-none-inside', path=Path('a.pth'), keys=', '.join(loaded)):
        state_dict_of(loaded, Path('a.pth'))


@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_pickles_of_any_protocol_and_core(protocol, tmp_path):
    values = {
        'f4': np.arange(6, dtype='f4').reshape(2, 3),
        'f2': np.ones(3, 'f2'),
        'big': np.arange(3, dtype='>f4'),
        'fortran': np.asfortranarray(np.eye(3)[:2]),
        'scalar': np.float32(2.5),
        'name': 'x',
    }
    data = pickle.dumps({'model': values, 'matching_heuristics': True}, protocol=protocol)
    for other in (data, data.replace(b'numpy._core.', b'numpy.core.') if protocol == 2 else data):
        path = tmp_path / 'x.pkl'
        path.write_bytes(other)
        got = read.load_numpy_pickle(path)['model']
        assert got['scalar'] == 2.5
        assert got['name'] == 'x'
        for key in ('f4', 'f2', 'big', 'fortran'):
            assert np.array_equal(got[key].numpy(), values[key])


@pytest.mark.parametrize('suffix', ['.pkl', '.pth'])
def test_file_cut_in_the_middle(suffix, tmp_path):
    path = tmp_path / f'cut{suffix}'
    if suffix == '.pkl':
        path.write_bytes(pickle.dumps({'model': {'w': np.zeros(1000, 'f4')}}, protocol=2))
    else:
        torch.save(mmdet_state(3), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with refused('weights-unreadable', path=path):
        open_source(path)


@pytest.mark.parametrize('suffix', ['.pkl', '.pth'])
@pytest.mark.parametrize('kind', ['system', 'exec', 'numpy', 'import', 'shutil'])
def test_malicious_pickle_leaves_no_trace(kind, suffix, tmp_path):
    trace = tmp_path / 'trace'
    evil, culprit = {
        'system': (Evil(os.system, f'touch {trace}'), f'{os.system.__module__}.system'),
        'exec': (Evil(exec, f'open({str(trace)!r}, "w")'), 'exec'),
        'numpy': (Evil(np.save, str(trace), 1), 'numpy'),
        'import': (Evil(__import__, 'this'), '__import__'),
        'shutil': (Evil(shutil.copy, __file__, trace), 'shutil.copy'),
    }[kind]
    content = {'model': {'backbone.bottom_up.stem.conv1.weight': np.zeros(3, 'f4'), 'x': evil}}
    path = tmp_path / f'evil{suffix}'
    if suffix == '.pkl':
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save({'state_dict': mmdet_state(3), 'x': evil}, path)
    before = sorted(tmp_path.iterdir())
    with refused('weights-code', path=path) as caught:
        open_source(path)
    assert culprit in caught.value.facts['culprit']
    assert sorted(tmp_path.iterdir()) == before
    # The test can tell: the same file read without care does leave one.
    if kind == 'system' and suffix == '.pkl':
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize(
    'array',
    [
        np.array([Path('x')], dtype=object),
        np.array(['a']),
        np.array([(1, 2.0)], 'i4,f4'),
        np.array(['2020-01-01'], 'M8[D]'),
    ],
    ids=['object', 'text', 'record', 'date'],
)
def test_arrays_of_other_things_are_refused(array, tmp_path):
    path = tmp_path / 'x.pkl'
    path.write_bytes(pickle.dumps({'model': {'w': array}}))
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert caught.value.code in ('weights-code', 'weights-unreadable') and caught.value.facts['path'] == path


@pytest.mark.parametrize(
    'data',
    [
        b'\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.',
        b'\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R(K\x03b.',
        b'\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n)X\x01\x00\x00\x00b\x87R'
        b'(K\x01K\x64\x85cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89X\x01\x00\x00\x00atb.',
    ],
    ids=['codec', 'state', 'short data'],
)
def test_crafted_array_pickles_end_in_a_message(data, tmp_path):
    path = tmp_path / 'x.pkl'
    path.write_bytes(data)
    with refused('weights-unreadable', path=path):
        open_source(path)


@pytest.mark.parametrize(
    ('extra', 'code', 'problems'),
    [
        ({5: torch.ones(1)}, 'weights-names', ['5']),
        ({(1, 2): torch.ones(1), None: torch.ones(1)}, 'weights-names', ['(1, 2)', 'None']),
        ({1 << 2000: torch.ones(1)}, 'weights-names', ['an integer of 2001 bits']),
        ({'a\ud800': torch.ones(1)}, 'weights-names', [r"'a\ud800'"]),
        ({'x': torch.empty(1 << 40, device='meta')}, 'weights-not-dense', ['x']),
        (
            {'x': torch.ones(2).to(torch.float8_e4m3fn), 'y': torch.ones(2).to(torch.uint16)},
            'weights-not-dense',
            ['x', 'y'],
        ),
        ({'x': torch.ones(2, dtype=torch.complex64)}, 'weights-not-dense', ['x']),
    ],
)
def test_tensors_that_are_no_weights(extra, code, problems, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {**mmdet_state(3), **extra}}, path)
    for use in (open_source, lambda p: publish(p, tmp_path / 'out')):
        with refused(code, path=path) as caught:
            use(path)
        assert caught.value.problems == problems


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    'classes',
    [nested(100), 5, [1, 2, 3], ['a', 'b', ['c']], ['a', 'b', '\ud800'], {'a': 1}, 'abc', [], [1 << 2000] * 3],
)
@pytest.mark.parametrize(
    'wrap',
    [
        lambda c: {'meta': {'dataset_meta': {'classes': c}}},
        lambda c: {'meta': {'CLASSES': c}},
        lambda c: {'meta': {'dataset_meta': c}},
        lambda c: {'meta': c},
        lambda c: {'classes': c},
    ],
)
def test_what_is_no_list_of_names_is_no_record_of_classes(classes, wrap, tmp_path):
    torch.save({'state_dict': mmdet_state(3), **wrap(classes)}, tmp_path / 'a.pth')
    source = open_source(tmp_path / 'a.pth')
    assert source.classes is None
    assert '\n'.join(source.lines())
    assert read.read_checkpoint(publish(tmp_path / 'a.pth', tmp_path / 'b'))['meta']['dataset_meta']['classes'] == ()


@pytest.mark.parametrize(
    'meta',
    [
        {'mean': 5},
        {'mean': '123'},
        {'std': ['a', 'b', 'c']},
        {'mean': [10**400] * 3},
        {'style': 'x'},
        {'style': ['pytorch']},
        {'rgb': 'yes'},
        {'notes': 5},
        {'notes': [5]},
        {'notes': [('a', 'b', 'c')]},
    ],
)
def test_a_record_of_the_origin_that_is_none(meta, tmp_path):
    torch.save({'state_dict': mmdet_state(3), 'meta': {'origin': 'mmdet', **meta}}, tmp_path / 'a.pth')
    with refused('weights-record', path=tmp_path / 'a.pth'):
        open_source(tmp_path / 'a.pth')


@pytest.mark.parametrize('origin', [['mmdet'], 5, {}, 'nobody'])
def test_an_origin_that_is_none(origin, tmp_path):
    torch.save({'state_dict': mmdet_state(3), 'meta': {'origin': origin}}, tmp_path / 'a.pth')
    assert open_source(tmp_path / 'a.pth').origin == 'mmdet'


@pytest.mark.parametrize('classes', ['[' * 100_000, '["\\ud800"]', '5', '{', 'null'])
def test_classes_of_safetensors_that_are_none(classes, tmp_path):
    from safetensors.torch import save_file

    save_file(mmdet_state(3), tmp_path / 'a.safetensors', {'classes': classes})
    assert open_source(tmp_path / 'a.safetensors').classes is None


@pytest.mark.parametrize(
    'content',
    [
        (1 << 62).to_bytes(8, 'little') + b'{',
        (8).to_bytes(8, 'little') + b'{"a": 1}',
        (60).to_bytes(8, 'little') + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
        (100_008).to_bytes(8, 'little') + b'{"a":' + b'[' * 100_003,
    ],
)
def test_crafted_safetensors(content, tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(content)
    with refused('weights-unreadable', path=tmp_path / 'a.safetensors'):
        open_source(tmp_path / 'a.safetensors')
