from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import random
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import hash_in_name
from mmfinetune.weights import find
from mmfinetune.weights.find import find_weights, verify_file
from mmfinetune.weights.publish import publish
from mmfinetune.weights.read import read_checkpoint, state_dict_of
from mmfinetune.weights.transfer import check_transfer, plan_transfer, transfer
from mmfinetune.weights.work_dir import best_checkpoint, candidates

HEADS = {
    'roi_head.bbox_head.fc_cls': {'std': 0.01},
    'roi_head.bbox_head.fc_reg': {'std': 0.001},
    'roi_head.mask_head.conv_logits': {'std': 0.001},
}
GOOD = b'any bytes will do here' * 40
SHA = hashlib.sha256(GOOD).hexdigest()
NAME = f'weights-{SHA[:8]}.pth'


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """An empty working directory and empty caches."""
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    return tmp_path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a web server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    folder = tmp_path / 'served'
    folder.mkdir()
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=partial(httpd.serve_forever, 0.01), daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{httpd.server_address[1]}', folder
    httpd.shutdown()
    httpd.server_close()


def put(path: Path, data: bytes = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# Names and files


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth', 'd4b0c5d6'),
        ('resnet50-0676ba61.pth', '0676ba61'),
        ('/a/b-12345678/resnet50_0676ba61.pt', '0676ba61'),
        (f'x-{SHA}.pth', SHA),
        ('mask_rcnn_20200205.pth', '20200205'),  # a date looks like a hash to torch hub too
        ('epoch_12.pth', None),
        ('best_coco_segm_mAP_epoch_3.pth', None),
        ('x-d4b0c5d.pth', None),
        ('x-d4b0c5dg.pth', None),
        ('x-d4b0c5d6.pth.part', None),
        ('d4b0c5d6.pth', None),
    ],
)
def test_hash_in_name(name, expected):
    assert hash_in_name(name) == expected
    assert hash_in_name(Path(name)) == expected


def test_good_file_by_its_hash(tmp_path):
    assert verify_file(put(tmp_path / NAME)) == f'SHA-256 begins with {SHA[:8]}, as its name says'


def test_good_file_without_a_hash(tmp_path):
    assert 'no hash' in verify_file(put(tmp_path / 'epoch_1.pth'))


@pytest.mark.parametrize(
    ('data', 'name', 'expected'),
    [
        (b'', NAME, 'is empty'),
        (b'<!DOCTYPE html><html><body>Log in', NAME, 'a web page'),
        (b'\n<html lang="en">', 'a.pth', 'a web page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\n', 'a.pth', 'Git LFS pointer'),
        (GOOD + b'.', NAME, 'is damaged: its SHA-256 begins with'),
        (GOOD[:-1], NAME, f'but its name says {SHA[:8]}'),
    ],
)
def test_bad_file(tmp_path, data, name, expected):
    path = put(tmp_path / name, data)
    with pytest.raises(UserError, match=expected) as caught:
        verify_file(path)
    assert str(path) in caught.value.message
    assert '--weights' in caught.value.cure


def test_no_file(tmp_path):
    with pytest.raises(UserError, match='There is no weights file') as caught:
        verify_file(tmp_path / 'a.pth')
    assert '--weights' in caught.value.cure


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(UserError, match='is a folder'):
        verify_file(tmp_path)


# Finding


def test_own_path_is_best(home):
    mine = put(home / 'mine' / NAME)
    put(home / 'torch/hub/checkpoints' / NAME)
    assert find_weights(mine) == mine
    assert not Path('pretrain').exists()


def test_damaged_own_path_is_an_error_though_a_cache_has_it(home):
    put(Path('pretrain') / NAME, GOOD[:-1])
    put(home / 'torch/hub/checkpoints' / NAME)
    with pytest.raises(UserError, match='damaged'):
        find_weights(Path('pretrain') / NAME)


@pytest.mark.parametrize('place', ['torch/hub/checkpoints', 'cache/mim', 'work'])
def test_copy_into_pretrain(home, place):
    source = put(home / place / NAME)
    found = find_weights(f'pretrain/{NAME}')
    assert found == Path('pretrain') / NAME
    assert found.read_bytes() == GOOD
    assert source.is_file()
    assert names_in(Path('pretrain')) == [NAME]


def test_caches_without_their_variables(home, monkeypatch):
    monkeypatch.delenv('TORCH_HOME')
    put(home / 'cache/torch/hub/checkpoints' / NAME)
    assert find_weights(f'pretrain/{NAME}').read_bytes() == GOOD
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(home / 'me'))
    assert home / 'me/.cache/torch/hub/checkpoints' in find.search_places()


def test_pretrain_comes_before_the_caches(home):
    # Another path of the same name: pretrain/ is searched by file name.
    put(Path('pretrain') / 'a.pth', b'from pretrain')
    put(home / 'torch/hub/checkpoints' / 'a.pth', b'from torch')
    put(home / 'cache/mim' / 'a.pth', b'from mim')
    assert find_weights('elsewhere/a.pth').read_bytes() == b'from pretrain'


def test_order_of_the_caches(home):
    put(home / 'torch/hub/checkpoints' / 'a.pth', b'from torch')
    put(home / 'cache/mim' / 'a.pth', b'from mim')
    put(home / 'work' / 'a.pth', b'from here')
    assert find_weights('pretrain/a.pth').read_bytes() == b'from torch'


def test_damaged_file_in_a_cache_is_passed_over(home):
    put(home / 'torch/hub/checkpoints' / NAME, GOOD[:-1])
    put(home / 'cache/mim' / NAME)
    assert find_weights(f'pretrain/{NAME}').read_bytes() == GOOD


def test_copy_goes_where_the_config_says_if_the_folder_is_there(home):
    put(home / 'cache/mim' / NAME)
    (home / 'shared').mkdir()
    assert find_weights(home / 'shared' / NAME) == home / 'shared' / NAME
    assert not Path('pretrain').exists()


def test_download(home, server):
    url, folder = server
    put(folder / NAME)
    found = find_weights(f'pretrain/{NAME}', f'{url}/{NAME}')
    assert found == Path('pretrain') / NAME
    assert found.read_bytes() == GOOD
    assert names_in(Path('pretrain')) == [NAME]


def test_download_is_not_repeated(home, server):
    url, folder = server
    put(folder / NAME)
    find_weights(f'pretrain/{NAME}', f'{url}/{NAME}')
    (folder / NAME).unlink()
    assert find_weights(f'pretrain/{NAME}', f'{url}/{NAME}').read_bytes() == GOOD


@pytest.mark.parametrize('data', [GOOD[:-1], b'<html>Log in</html>'])
def test_download_of_something_else(home, server, data):
    url, folder = server
    put(folder / NAME, data)
    with pytest.raises(UserError, match='not the expected file'):
        find_weights(f'pretrain/{NAME}', f'{url}/{NAME}')
    assert not (Path('pretrain') / NAME).exists()


def test_download_that_is_not_there(home, server):
    with pytest.raises(UserError, match='HTTP 404'):
        find_weights(f'pretrain/{NAME}', f'{server[0]}/{NAME}')


def test_nowhere_and_no_address(home):
    put(home / 'cache/mim' / NAME, GOOD[:-1])
    with pytest.raises(UserError, match=f'There is no weights file pretrain/{NAME}') as caught:
        find_weights(f'pretrain/{NAME}')
    problems = caught.value.problems
    for place in ('pretrain', home / 'torch/hub/checkpoints', home / 'cache/mim', home / 'work'):
        assert str(Path(place) / NAME) in problems
    assert any('is damaged' in line for line in problems)


# Reading


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f'touch {self.trace}',)


def write_legacy(obj, path: Path) -> None:
    torch.save(obj, path, _use_new_zipfile_serialization=False)


def write_pickle(protocol: int, obj, path: Path) -> None:
    path.write_bytes(pickle.dumps(obj, protocol=protocol))


@pytest.mark.parametrize('write', [torch.save, write_legacy, partial(write_pickle, 2)], ids=['zip', 'legacy', 'pickle'])
def test_pickle_that_runs_code_is_refused(tmp_path, write):
    trace, path = tmp_path / 'trace', tmp_path / 'a.pth'
    write({'state_dict': {}, 'x': Evil(trace)}, path)
    with pytest.raises(UserError, match=r'is refused: .* would run posix\.system') as caught:
        read_checkpoint(path)
    assert str(path) in caught.value.message
    assert 'trust' in caught.value.cure
    assert not trace.exists()
    # The file does run its command where nothing holds it back.
    (pickle.loads(path.read_bytes()) if isinstance(write, partial) else torch.load(path, weights_only=False))
    assert trace.exists()


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('protocol', [0, 1, 3, 4, 5])
def test_pickle_of_any_protocol_runs_nothing(tmp_path, protocol):
    trace, path = tmp_path / 'trace', tmp_path / 'a.pth'
    write_pickle(protocol, Evil(trace), path)
    with pytest.raises(UserError, match=r'a\.pth'):
        read_checkpoint(path)
    assert not trace.exists()


def test_truncated_file(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': {'a': torch.randn(1000)}}, path)
    data = path.read_bytes()
    for length in (len(data) // 2, len(data) - 1, 10, 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r'a\.pth (cannot be read|is not a weights file)'):
            read_checkpoint(path)


@pytest.mark.parametrize(
    'data',
    [b'garbage, no pickle', b'\x00' * 100, b'\x80\x02.', b'PK\x03\x04', b'Not Found\n', bytes(range(255, 0, -1)) * 20],
)
def test_garbage(tmp_path, data):
    with pytest.raises(UserError, match=r'a\.pth'):
        read_checkpoint(put(tmp_path / 'a.pth', data))


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
    with pytest.raises(UserError, match='holds a list, not weights'):
        read_checkpoint(path)


def test_own_checkpoint_of_mmengine_is_read(tmp_path):
    import numpy as np
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
    with pytest.raises(UserError, match='refused.*builtins.getattr'):
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


@pytest.mark.parametrize(
    'loaded',
    [{}, {'optimizer': {'state': {}}, 'epoch': 3}, {'state_dict': {}}, {'state_dict': None}, {'state_dict': [1]}],
)
def test_no_weights_in_it(loaded):
    with pytest.raises(UserError, match=r'a\.pth holds no weights; its keys are') as caught:
        state_dict_of(loaded, Path('a.pth'))
    assert all(key in caught.value.message for key in loaded)


# Planning


def shapes(**sizes) -> dict[str, torch.Tensor]:
    return {k.replace('__', '.'): torch.zeros(v) for k, v in sizes.items()}


def test_plan_when_everything_fits():
    target = shapes(backbone__w=(3, 3), head__w=(2,))
    report = plan_transfer(target, shapes(backbone__w=(3, 3), head__w=(2,)))
    assert report.loaded == ['backbone.w', 'head.w']
    assert not (report.reinit or report.kept or report.dropped or report.ignored or report.problems)
    check_transfer(report, Path('a.pth'))


@pytest.mark.parametrize(
    ('target', 'source', 'options', 'problem'),
    [
        ({'head__w': (21, 4)}, {'head__w': (81, 4)}, {}, 'head.w: the model has (21, 4), the file (81, 4)'),
        ({'a__w': (1,), 'b__w': (1,)}, {'a__w': (1,)}, {}, 'b.w: not in the file'),
        ({'a__w': (1,)}, {'a__w': (1,), 'b__w': (1,)}, {}, 'b.w: in the file, but the model has no such tensor'),
        (
            {'head__w': (1,)},
            {'head__w': (1,)},
            {'reinit': ['haed']},
            'weights.reinit names haed, which the model does not have',
        ),
        # `head` is a module, not the beginning of a name.
        ({'head2__w': (2,)}, {'head2__w': (3,)}, {'reinit': ['head']}, 'head2.w: the model has (2,), the file (3,)'),
        ({'backbone__w': (1,)}, {'w': (2,)}, {'into': 'backbone'}, 'backbone.w: the model has (1,), the file (2,)'),
        (
            {'backbone__w': (1,)},
            {'w': (1,), 'fc__w': (1,)},
            {'into': 'backbone'},
            'in the file, but the model has no such tensor',
        ),
        (
            {'backbone__w': (1,)},
            {'w': (1,), 'fc2__w': (1,)},
            {'into': 'backbone', 'ignore': ['fc.']},
            'fc2.w: in the file, but the model has no such tensor',
        ),
        ({'backbone__w': (1,), 'backbone__v': (1,)}, {'w': (1,)}, {'into': 'backbone'}, 'backbone.v: not in the file'),
    ],
)
def test_plan_with_a_problem(target, source, options, problem):
    report = plan_transfer(shapes(**target), shapes(**source), **options)
    assert any(problem in line for line in report.problems), report.problems
    with pytest.raises(UserError, match=r'a\.pth does not fit the model') as caught:
        check_transfer(report, Path('a.pth'))
    assert caught.value.problems == report.problems


def test_class_head_of_another_size_is_no_problem_when_drawn_anew():
    target = shapes(neck__w=(3,), head__fc__weight=(21, 4), head__fc__bias=(21,))
    source = shapes(neck__w=(3,), head__fc__weight=(81, 4), head__fc__bias=(81,))
    report = plan_transfer(target, source, ['head.fc'])
    assert not report.problems
    assert report.loaded == ['neck.w']
    assert report.reinit == report.dropped == ['head.fc.weight', 'head.fc.bias']


def test_head_drawn_anew_need_not_be_in_the_file():
    report = plan_transfer(shapes(a__w=(1,), head__w=(2,)), shapes(a__w=(1,)), ['head'])
    assert (report.problems, report.dropped, report.reinit) == ([], [], ['head.w'])


def test_into_a_part_of_the_model():
    target = shapes(backbone__conv__w=(3,), neck__w=(2,), backbone2__w=(1,))
    report = plan_transfer(
        target, shapes(conv__w=(3,), fc__weight=(5,), fc__bias=(5,)), into='backbone', ignore=['fc.']
    )
    assert not report.problems
    assert report.loaded == ['backbone.conv.w']
    assert report.kept == ['neck.w', 'backbone2.w']
    assert report.ignored == ['fc.weight', 'fc.bias']


def test_count_of_batches_may_be_absent_but_nothing_else():
    target = shapes(bn__weight=(2,), bn__running_mean=(2,), bn__num_batches_tracked=())
    full = shapes(bn__weight=(2,), bn__running_mean=(2,))
    assert plan_transfer(target, full).problems == []
    assert plan_transfer(target, full).kept == ['bn.num_batches_tracked']
    assert plan_transfer(target, shapes(bn__weight=(2,))).problems == ['bn.running_mean: not in the file']


def test_all_problems_at_once():
    report = plan_transfer(shapes(a=(1,), b=(1,), c=(1,)), shapes(a=(2,), c=(1,), d=(1,)), ['x'])
    assert len(report.problems) == 4


# The real model


@pytest.fixture(scope='module')
def moved(build_model, official_like):
    """Model, report and file content of a transfer as the main config asks for it."""
    model = build_model()
    report = transfer(model, official_like, HEADS, seed=0)
    return model.state_dict(), report, torch.load(official_like, weights_only=True)['state_dict']


def test_config_and_test_agree_on_the_heads(voc_cfg):
    assert voc_cfg.weights.reinit == HEADS


def test_everything_but_the_heads_comes_from_the_file(moved):
    state, report, file = moved
    rest = [k for k in state if not k.startswith(tuple(f'{h}.' for h in HEADS))]
    assert len(state) - len(rest) == 6
    assert report.loaded == rest
    assert [k for k in rest if not torch.equal(state[k], file[k])] == []
    assert sorted(report.reinit) == sorted(report.dropped)
    assert len(report.reinit) == 6
    assert report.kept == report.ignored == report.problems == []


@pytest.mark.parametrize(
    ('name', 'shape', 'std'),
    [
        ('roi_head.bbox_head.fc_cls', (21, 1024), 0.01),
        ('roi_head.bbox_head.fc_reg', (80, 1024), 0.001),
        ('roi_head.mask_head.conv_logits', (20, 256, 1, 1), 0.001),
    ],
)
def test_heads_are_drawn_as_asked(moved, name, shape, std):
    weight, bias = (moved[0][f'{name}.{k}'] for k in ('weight', 'bias'))
    assert weight.shape == shape
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    # Five standard errors of the mean.
    assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5
    assert weight.unique().numel() > 0.99 * weight.numel()
    assert torch.count_nonzero(bias) == 0


def test_draw_depends_on_the_seed_only(build_model, official_like, moved):
    model = build_model()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    transfer(model, official_like, HEADS, seed=0)
    # The run's own random numbers go on as if nothing had been drawn.
    assert torch.equal(torch.get_rng_state(), before)
    same = model.state_dict()
    assert all(torch.equal(same[k], moved[0][k]) for k in same)
    transfer(model, official_like, HEADS, seed=1)
    other = model.state_dict()
    differing = {k for k in other if not torch.equal(other[k], moved[0][k])}
    assert differing == {f'{name}.weight' for name in HEADS}


@pytest.mark.parametrize(
    ('reinit', 'expected'),
    [({}, 6), ({k: HEADS[k] for k in list(HEADS)[:2]}, 2), ({**HEADS, 'roi_head.no': {'std': 1}}, 1)],
)
def test_model_is_untouched_when_something_does_not_fit(build_model, official_like, reinit, expected):
    model = build_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match='does not fit the model') as caught:
        transfer(model, official_like, reinit)
    assert len(caught.value.problems) == expected
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_backbone_of_torchvision(build_model, tmp_path):
    from torchvision.models import resnet50

    source = resnet50(weights=None).state_dict()
    path = tmp_path / 'resnet50.pth'
    torch.save(source, path)
    model = build_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = transfer(model, path, into='backbone', ignore=['fc.'])
    after = model.state_dict()
    assert sorted(report.ignored) == ['fc.bias', 'fc.weight']
    assert len(report.loaded) == len(source) - 2
    for key, tensor in after.items():
        if key.startswith('backbone.'):
            assert torch.equal(tensor, source[key.removeprefix('backbone.')]), key
        else:
            assert torch.equal(tensor, before[key]), key


# Small models


def test_half_precision_file(tmp_path):
    model = nn.Linear(4, 2)
    torch.save({k: torch.full_like(v, 0.5).half() for k, v in model.state_dict().items()}, tmp_path / 'a.pth')
    transfer(model, tmp_path / 'a.pth')
    assert model.weight.dtype == torch.float32
    assert (model.weight == 0.5).all()


def test_transfer_keeps_the_parameters(tmp_path):
    # An optimizer built before must go on with the same tensors.
    model = nn.Linear(4, 2)
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / 'a.pth')
    parameters = [id(p) for p in model.parameters()]
    transfer(model, tmp_path / 'a.pth')
    assert [id(p) for p in model.parameters()] == parameters
    assert all(p.requires_grad for p in model.parameters())


# Publishing


def train_checkpoint(path: Path, value: float = 1.0) -> Path:
    torch.save(
        {
            'meta': {'dataset_meta': {'classes': ['cat', 'dog']}, 'cfg': 'secret = 1', 'experiment_name': 'x'},
            'state_dict': {'module.w': torch.full((3,), value)},
            'optimizer': {'state': {0: torch.ones(1000)}},
            'message_hub': {},
        },
        path,
    )
    return path


def test_publish(tmp_path):
    source = train_checkpoint(tmp_path / 'epoch_1.pth')
    target = publish(source, tmp_path / 'out' / 'mine')
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert target == tmp_path / 'out' / f'mine-{digest[:8]}.pth'
    assert 'as its name says' in verify_file(target)
    loaded = read_checkpoint(target)
    assert loaded.keys() == {'meta', 'state_dict'}
    assert loaded['meta'] == {'dataset_meta': {'classes': ('cat', 'dog')}}
    assert torch.equal(loaded['state_dict']['w'], torch.ones(3))
    assert names_in(target.parent) == [target.name]
    assert source.is_file()


def test_published_file_holds_no_more_than_its_tensors(tmp_path):
    # A view keeps its whole storage alive, and torch.save writes the storage.
    torch.save({'state_dict': {'w': torch.zeros(1_000_000)[:10]}}, tmp_path / 'a.pth')
    assert publish(tmp_path / 'a.pth', tmp_path / 'b').stat().st_size < 10_000


def test_publish_takes_the_best_of_a_work_dir(tmp_path):
    train_checkpoint(tmp_path / 'epoch_2.pth', 2.0)
    train_checkpoint(tmp_path / 'best_coco_segm_mAP_epoch_1.pth', 1.0)
    target = publish(tmp_path, tmp_path / 'out' / 'mine')
    assert torch.equal(read_checkpoint(target)['state_dict']['w'], torch.ones(3))


def test_publish_of_nothing(tmp_path):
    with pytest.raises(UserError, match='There is no checkpoint in'):
        publish(tmp_path, tmp_path / 'mine')
    with pytest.raises(UserError, match='There is no weights file'):
        publish(tmp_path / 'epoch_1.pth', tmp_path / 'mine')


def test_best_checkpoint_is_the_newest_best(tmp_path):
    for age, name in (
        (20, 'best_coco_segm_mAP_epoch_9.pth'),
        (10, 'best_coco_segm_mAP_epoch_10.pth'),
        (0, 'epoch_12.pth'),
    ):
        put(tmp_path / name)
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_12.pth'))
    assert best_checkpoint(tmp_path).name == 'best_coco_segm_mAP_epoch_10.pth'


def test_last_checkpoint_where_there_is_no_best(tmp_path):
    put(tmp_path / 'epoch_3.pth')
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/on/another/machine/epoch_3.pth\n')
    assert best_checkpoint(tmp_path) == tmp_path / 'epoch_3.pth'


@pytest.mark.parametrize('pointer', [None, '/gone/epoch_3.pth'])
def test_no_checkpoint(tmp_path, pointer):
    if pointer:
        (tmp_path / 'last_checkpoint').write_text(pointer)
    with pytest.raises(UserError, match='There is no checkpoint in') as caught:
        best_checkpoint(tmp_path)
    assert '--weights' in caught.value.cure


@pytest.fixture
def saved(tmp_path) -> Path:
    """A work dir: epochs 1 and 2, then 30 steps; the best is none to resume from."""
    for age, name in (
        (30, 'epoch_1.pth'),
        (20, 'epoch_2.pth'),
        (10, 'iter_30.pth'),
        (0, 'best_coco_segm_mAP_epoch_2.pth'),
    ):
        put(tmp_path / name)
        now = (tmp_path / name).stat().st_mtime
        os.utime(tmp_path / name, (now - age, now - age))
    return tmp_path


# Empty: killed as it was written; gone: killed before the file came, or the file was removed.
@pytest.mark.parametrize(
    ('pointer', 'expected'),
    [
        (None, ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        ('', ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        ('runs/iter_40.pth', ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        ('/other/machine/iter_30.pth\n', ['iter_30.pth', 'epoch_2.pth', 'epoch_1.pth']),
        # As in a copy that did not keep the times.
        ('epoch_2.pth', ['epoch_2.pth', 'iter_30.pth', 'epoch_1.pth']),
    ],
)
def test_candidates_to_resume_from(saved, pointer, expected):
    if pointer is not None:
        (saved / 'last_checkpoint').write_text(pointer)
    assert [path.name for path in candidates(saved)] == expected


def test_no_candidates(tmp_path):
    assert candidates(tmp_path / 'nowhere') == candidates(tmp_path) == []
