"""The config's weights: got from several places, held against the model, reported."""

from __future__ import annotations

import copy
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import sha256_of
from mmfinetune.weights import check as weights_check
from mmfinetune.weights import find


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty working directory and empty caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path


@pytest.fixture
def served(tmp_path):
    """A folder served on 127.0.0.1, and its address."""
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    thread.join()


@pytest.fixture
def cfg(voc_cfg, official_like):
    cfg = copy.deepcopy(voc_cfg)
    cfg.weights.update(checkpoint=str(official_like), url=None, fallbacks=[])
    return cfg


def hashed(folder: Path, content: bytes = b'some bytes' * 50) -> Path:
    part = folder / 'part'
    part.write_bytes(content)
    return part.rename(folder / f'model-{sha256_of(part)[:8]}.pth')


def recipe(address: str, name: str, fallback: str) -> dict:
    return {
        'weights': {
            'checkpoint': f'pretrain/{name}',
            'url': f'{address}/{name}',
            'fallbacks': [{'checkpoint': f'pretrain/{fallback}', 'url': f'{address}/{fallback}'}],
        }
    }


def test_the_next_source_is_taken_and_said(home, served, capsys):
    folder, address = served
    good = hashed(folder)
    found = find.find(recipe(address, 'gone-0123abcd.pth', good.name))
    assert found.read_bytes() == good.read_bytes()
    out = capsys.readouterr().out
    assert 'HTTP 404' in out and 'Trying the next source' in out and f'Using {found}' in out


def test_no_source_at_all(home, served):
    _, address = served
    with pytest.raises(UserError, match='No source has the weights') as caught:
        find.find(recipe(address, 'gone-0123abcd.pth', 'gone-too-0123abcd.pth'))
    assert len(caught.value.problems) == 2
    assert not list(home.glob('pretrain/*.pth'))


def test_a_url_is_fetched_and_verified(home, served):
    folder, address = served
    good = hashed(folder)
    assert find.fetch(f'{address}/{good.name}').read_bytes() == good.read_bytes()
    with pytest.raises(UserError, match='HTTP 404'):
        find.fetch(f'{address}/none-0123abcd.pth')
    good.rename(folder / 'bad-0123abcd.pth')
    with pytest.raises(UserError, match='sha256|SHA-256|not the expected file'):
        find.fetch(f'{address}/bad-0123abcd.pth')
    assert [p.name for p in (home / 'pretrain').glob('*.pth')] == [good.name]


def test_a_path_is_left_as_it_is():
    assert find.fetch('some/file.pth') == Path('some/file.pth')


@pytest.mark.parametrize('head_init', ['reinit', 'remap'])
def test_every_tensor_is_accounted_for(cfg, head_init):
    cfg.weights.head_init = head_init
    check = weights_check.check(cfg)
    # The fixture's file names two classes only, as a broken one might; COCO's names are taken.
    rows = check.rows()
    assert not check.problems
    for row in rows:
        assert row['tensors'] == row['loaded'] + row['remapped'] + row['re-init'] + row['kept']
    assert sum(r['tensors'] for r in rows) == len(check.target)
    kind = 'remapped' if head_init == 'remap' else 're-init'
    assert sum(r[kind] for r in rows) == 6
    assert ('aeroplane <- airplane' in check.text()) == (head_init == 'remap')


def test_report_for_machines(cfg):
    report = json.loads(json.dumps(weights_check.check(cfg).as_dict(), allow_nan=False))
    assert report['good_to_train'] and report['problems'] == []
    assert report['origin'] == 'mmdet' and len(report['reinit']) == 6
    assert {'module', 'tensors', 'loaded', 'max_abs'} <= set(report['modules'][0])


def test_style_and_normalisation_are_compared(cfg, official_like, tmp_path):
    """What the shapes do not show."""
    from mmfinetune.weights import publish, sources

    source = sources.read_source(official_like)
    source.style, source.rgb = 'caffe', False
    source.mean, source.std = (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)
    check = weights_check.check(cfg, publish.save(source, tmp_path / 'caffe.pth'))
    assert len(check.problems) == 4
    with pytest.raises(UserError, match='caffe-style') as caught:
        check.require_good()
    assert 'bgr_to_rgb' in str(caught.value)


def test_a_backbone_file_is_reported(voc_cfg, tmp_path):
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / 'r50.pth')
    cfg = copy.deepcopy(voc_cfg)
    recipe = {'into': 'backbone', 'ignore': ['fc.']}
    check = weights_check.check(cfg, tmp_path / 'r50.pth', recipe)
    assert not check.problems and check.plan.ignored == ['fc.weight', 'fc.bias']
    rows = {row['module']: row for row in check.rows()}
    assert rows['backbone']['loaded'] == rows['backbone']['tensors'] == 318
    assert rows['backbone']['max_abs'] > 0
    assert rows['neck']['kept'] == 16


def test_what_does_not_fit_is_listed(cfg, official_like, tmp_path):
    file = torch.load(official_like, weights_only=True)
    del file['state_dict']['neck.fpn_convs.0.conv.bias']
    file['state_dict']['neck.extra.weight'] = torch.zeros(1)
    torch.save(file, tmp_path / 'a.pth')
    check = weights_check.check(cfg, tmp_path / 'a.pth')
    assert check.plan.missing == ['neck.fpn_convs.0.conv.bias']
    assert check.plan.unexpected == ['neck.extra.weight']
    neck = next(row for row in check.rows() if row['module'] == 'neck')
    assert (neck['missing'], neck['unexpected']) == (1, 1)
    assert not check.as_dict()['good_to_train']
