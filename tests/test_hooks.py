from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from PIL import Image
from torch import nn

from mmfinetune import hooks
from mmfinetune.errors import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 3)


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)
    return model


@pytest.fixture
def runner(tmp_path: Path) -> SimpleNamespace:
    """What WeightTransferHook reads of a Runner; model full of 1, file full of 2."""
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': fill(Net(), 2.0).state_dict()}, path)
    weights = {'checkpoint': str(path), 'url': None, 'reinit': {'head': {'std': 0.01}}}
    return SimpleNamespace(cfg={'weights': weights}, model=fill(Net(), 1.0), seed=0, _resume=False,
                           _load_from=None)


def is_transferred(model: Net) -> bool:
    return bool((model.body.weight == 2).all())


def is_untouched(model: Net) -> bool:
    return all(bool((p == 1).all()) for p in model.parameters())


@pytest.mark.parametrize('point', ['before_train', 'before_val', 'before_test'])
def test_weights_are_transferred_at_the_first_point(runner, point):
    getattr(hooks.WeightTransferHook(), point)(runner)
    assert is_transferred(runner.model)
    assert torch.count_nonzero(runner.model.head.bias) == 0
    assert 0 < runner.model.head.weight.abs().max() < 0.1


def test_weights_are_transferred_once_only(runner):
    # The validation after an epoch must not bring the start back.
    hook = hooks.WeightTransferHook()
    hook.before_train(runner)
    fill(runner.model, 5.0)
    for point in (hook.before_val, hook.before_test, hook.before_train):
        point(runner)
    assert all((p == 5).all() for p in runner.model.parameters())


@pytest.mark.parametrize(('resume', 'load_from'), [(True, None), (False, 'b.pth'),
                                                   (True, 'b.pth')])
def test_nothing_happens_where_a_checkpoint_is_loaded(runner, resume, load_from):
    runner._resume, runner._load_from = resume, load_from
    hook = hooks.WeightTransferHook()
    for point in (hook.before_train, hook.before_val, hook.before_test):
        point(runner)
    assert is_untouched(runner.model)


@pytest.mark.parametrize('cfg', [{}, {'weights': None}])
def test_nothing_happens_without_weights(runner, cfg):
    runner.cfg = cfg
    hooks.WeightTransferHook().before_train(runner)
    assert is_untouched(runner.model)


def test_config_is_left_as_it_is(runner):
    before = dict(runner.cfg['weights'])
    hooks.WeightTransferHook().before_train(runner)
    assert runner.cfg['weights'] == before


def test_head_depends_on_the_seed_of_the_run(runner):
    heads = []
    for seed in (0, 0, 1):
        runner.seed = seed
        hooks.WeightTransferHook().before_train(runner)
        heads.append(runner.model.head.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_weights_that_do_not_fit_stop_the_run(runner):
    runner.model.body = nn.Linear(3, 2)
    with pytest.raises(UserError, match='does not fit the model'):
        hooks.WeightTransferHook().before_train(runner)


def test_transfer_comes_before_the_other_hooks():
    from mmengine.hooks import CheckpointHook, EMAHook
    from mmengine.runner.priority import get_priority
    # EMA copies the model before training, so it must find the weights there.
    ours = get_priority(hooks.WeightTransferHook.priority)
    assert all(ours < get_priority(hook.priority) for hook in (EMAHook, CheckpointHook))


def test_lr_of_each_group_is_a_scalar():
    params = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{'params': [params[0]], 'lr': 0.1, 'name': 'backbone'},
                                 {'params': [params[1]], 'lr': 0.2, 'name': 'roi_head'},
                                 {'params': [params[2]], 'lr': 0.3}])
    hub = MessageHub('test_lr_of_each_group_is_a_scalar')
    from mmengine.optim import OptimWrapper
    runner = SimpleNamespace(optim_wrapper=OptimWrapper(optimizer), message_hub=hub)
    hook = hooks.GroupLrHook()
    hook.before_train_iter(runner, 0)
    optimizer.param_groups[0]['lr'] = 0.05
    hook.before_train_iter(runner, 1)
    history = {k: v.data[0].tolist() for k, v in hub.log_scalars.items()}
    assert history == {'train/lr/backbone': [0.1, 0.05], 'train/lr/roi_head': [0.2, 0.2],
                       'train/lr/group2': [0.3, 0.3]}


class Drawn(list):
    """A visualizer that notes what it is asked for."""

    def add_datasample(self, name, image, data_sample, pred_score_thr, out_file) -> None:
        self.append((name, image.copy(), pred_score_thr, out_file))


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[SimpleNamespace, list[SimpleNamespace]]:
    samples = []
    for i in range(5):
        path = tmp_path / f'{i}.png'
        Image.new('RGB', (6, 4), (200, 100, i)).save(path)
        samples.append(SimpleNamespace(img_path=str(path)))
    return SimpleNamespace(work_dir=str(tmp_path / 'run'), visualizer=Drawn()), samples


@pytest.mark.parametrize(('num_images', 'expected'), [(0, []), (1, ['0']), (3, ['0', '1', '2']),
                                                      (9, ['0', '1', '2', '3', '4'])])
@pytest.mark.parametrize('batch', [1, 2, 5])
def test_first_pictures_only(pictures, num_images, expected, batch):
    runner, samples = pictures
    hook = hooks.TestPicturesHook(num_images=num_images)
    hook.before_test(runner)
    for start in range(0, len(samples), batch):
        hook.after_test_iter(runner, start // batch, outputs=samples[start:start + batch])
    assert [name for name, *_ in runner.visualizer] == expected


def test_picture_goes_to_figures_in_rgb(pictures):
    runner, samples = pictures
    hook = hooks.TestPicturesHook(num_images=1, score_thr=0.7)
    hook.after_test_iter(runner, 0, outputs=samples)
    name, image, score_thr, out_file = runner.visualizer[0]
    assert (name, score_thr) == ('0', 0.7)
    assert Path(out_file) == Path(runner.work_dir) / 'figures' / '0.png'
    assert np.array_equal(image[0, 0], (200, 100, 0))


def test_each_test_draws_anew(pictures):
    runner, samples = pictures
    hook = hooks.TestPicturesHook(num_images=2)
    for _ in range(2):
        hook.before_test(runner)
        hook.after_test_iter(runner, 0, outputs=samples)
    assert [name for name, *_ in runner.visualizer] == ['0', '1'] * 2


def test_no_outputs_no_pictures(pictures):
    runner, _ = pictures
    hooks.TestPicturesHook().after_test_iter(runner, 0, outputs=None)
    assert runner.visualizer == []


def test_config_uses_these_hooks(voc_cfg):
    assert [h['type'] for h in voc_cfg.custom_hooks] == ['WeightTransferHook', 'GroupLrHook']
    assert voc_cfg.default_hooks.visualization.type == 'TestPicturesHook'
