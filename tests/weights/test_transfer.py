"""Every tensor of the model and of the file has one fate, and the initial state follows from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfinetune.weights.transfer import initial_state, plan_transfer
from tests.builders.errors import codes, refused
from tests.builders.weights import HEADS, plan_of, source_of, transfer


def shapes(**sizes) -> dict[str, torch.Tensor]:
    return {k.replace('__', '.'): torch.zeros(v) for k, v in sizes.items()}


def facts_of(problems) -> list[tuple]:
    return [(p.code, *p.facts.values()) for p in problems]


def reinit(*modules: str, std: float = 0.01) -> dict:
    return {module: {'std': std} for module in modules}


def test_plan_when_everything_fits():
    target = shapes(backbone__w=(3, 3), head__w=(2,))
    plan = plan_of(target, shapes(backbone__w=(3, 3), head__w=(2,)))
    assert plan.fates == {'backbone.w': 'loaded', 'head.w': 'loaded'}
    assert not (plan.dropped or plan.ignored or plan.unexpected or plan.problems)


@pytest.mark.parametrize(
    ('target', 'tensors', 'options', 'problem'),
    [
        ({'head__w': (21, 4)}, {'head__w': (81, 4)}, {}, ('weights-shape', 'head.w', (21, 4), (81, 4))),
        ({'a__w': (1,), 'b__w': (1,)}, {'a__w': (1,)}, {}, ('weights-key-missing', 'b.w')),
        ({'a__w': (1,)}, {'a__w': (1,), 'b__w': (1,)}, {}, ('weights-key-unexpected', 'b.w')),
        ({'head__w': (1,)}, {'head__w': (1,)}, {'reinit': reinit('haed')}, ('weights-reinit-unknown', 'haed')),
        # `head` is a module, not the beginning of a name.
        (
            {'head__w': (1,), 'head2__w': (2,)},
            {'head2__w': (3,)},
            {'reinit': reinit('head')},
            ('weights-shape', 'head2.w', (2,), (3,)),
        ),
        ({'backbone__w': (1,)}, {'w': (2,)}, {'into': 'backbone'}, ('weights-shape', 'backbone.w', (1,), (2,))),
        ({'backbone__w': (1,)}, {'w': (1,), 'fc__w': (1,)}, {'into': 'backbone'}, ('weights-key-unexpected', 'fc.w')),
        (
            {'backbone__w': (1,)},
            {'w': (1,), 'fc2__w': (1,)},
            {'into': 'backbone', 'ignore': ['fc.']},
            ('weights-key-unexpected', 'fc2.w'),
        ),
        (
            {'backbone__w': (1,), 'backbone__v': (1,)},
            {'w': (1,)},
            {'into': 'backbone'},
            ('weights-key-missing', 'backbone.v'),
        ),
    ],
)
def test_plan_with_a_problem(target, tensors, options, problem):
    plan = plan_of(shapes(**target), shapes(**tensors), **options)
    assert facts_of(plan.problems) == [problem]


def test_class_head_of_another_size_is_no_problem_when_it_is_drawn():
    target = shapes(neck__w=(3,), head__fc__weight=(21, 4), head__fc__bias=(21,))
    tensors = shapes(neck__w=(3,), head__fc__weight=(81, 4), head__fc__bias=(81,))
    plan = plan_of(target, tensors, reinit=reinit('head.fc'))
    assert not plan.problems
    assert plan.keys('loaded') == ['neck.w']
    assert plan.keys('reinit') == plan.dropped == ['head.fc.weight', 'head.fc.bias']
    assert plan.stds == {'head.fc.weight': 0.01}


def test_drawn_head_need_not_be_in_the_file():
    plan = plan_of(shapes(a__w=(1,), head__w=(2,)), shapes(a__w=(1,)), reinit=reinit('head'))
    assert (plan.problems, plan.dropped, plan.keys('reinit')) == ([], [], ['head.w'])


def test_innermost_module_says_the_std():
    target = shapes(head__a__weight=(2, 2), head__b__weight=(2, 2))
    plan = plan_of(target, {}, reinit={'head': {'std': 0.5}, 'head.b': {'std': 2}})
    assert plan.stds == {'head.a.weight': 0.5, 'head.b.weight': 2.0}


def test_into_a_part_of_the_model():
    target = shapes(backbone__conv__w=(3,), neck__w=(2,), backbone2__w=(1,))
    tensors = shapes(conv__w=(3,), fc__weight=(5,), fc__bias=(5,))
    plan = plan_of(target, tensors, into='backbone', ignore=['fc.'])
    assert not plan.problems
    assert plan.keys('loaded') == ['backbone.conv.w']
    assert plan.keys('untouched') == ['neck.w', 'backbone2.w']
    assert plan.ignored == ['fc.weight', 'fc.bias']


def test_count_of_batches_may_be_absent_but_nothing_else():
    target = shapes(bn__weight=(2,), bn__running_mean=(2,), bn__num_batches_tracked=())
    plan = plan_of(target, shapes(bn__weight=(2,), bn__running_mean=(2,)))
    assert plan.problems == [] and plan.keys('untouched') == ['bn.num_batches_tracked']
    plan = plan_of(target, shapes(bn__weight=(2,)))
    assert facts_of(plan.problems) == [('weights-key-missing', 'bn.running_mean')]


def test_all_problems_at_once():
    plan = plan_of(shapes(a=(1,), b=(1,), c=(1,)), shapes(a=(2,), c=(1,), d=(1,)), reinit=reinit('x'))
    assert codes(plan.problems) == [
        'weights-reinit-unknown',
        'weights-shape',
        'weights-key-missing',
        'weights-key-unexpected',
    ]


@pytest.mark.parametrize('value', [0.01, {'std': -1}, {'std': float('nan')}, {'std': 'abc'}, {'std': 1, 'mean': 0}, {}])
def test_reinit_without_a_usable_std_is_refused(value):
    with refused('weights-reinit-std') as caught:
        plan_of(shapes(head__w=(1,)), {}, reinit={'head': value})
    assert [problem.facts['module'] for problem in caught.value.problems] == ['head']


# The initial state


class NormedHead(nn.Module):
    """A head with all kinds of normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn, self.gn, self.ln = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        self.fc = nn.Linear(4, 3)
        self.register_buffer('anchors', torch.rand(3, 4))


def test_normalisation_and_buffers_in_a_drawn_module_start_as_the_models_own():
    model = nn.ModuleDict({'head': NormedHead()})
    with torch.no_grad():
        model['head'].gn.bias.fill_(0.5)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    damaged = {k: torch.full_like(v, 7) for k, v in fresh.items()}
    plan = transfer(model, source_of(damaged), reinit=reinit('head'))
    assert list(plan.stds) == ['head.conv.weight', 'head.fc.weight']
    state = model.state_dict()
    for key, tensor in state.items():
        if key in plan.stds:
            assert 0 < tensor.abs().max() < 0.1
        elif key in ('head.conv.bias', 'head.fc.bias'):
            assert not tensor.any()
        else:
            assert torch.equal(tensor, fresh[key]), key
    assert set(plan.fates.values()) == {'reinit'}
    model.eval()
    with torch.no_grad():
        assert model['head'].bn(model['head'].conv(torch.randn(2, 2, 5, 5))).isfinite().all()


def test_rows_are_remapped_next_to_a_normalisation():
    model = nn.ModuleDict({'head': nn.ModuleDict({'bn': nn.BatchNorm1d(4), 'fc_cls': nn.Linear(4, 3)})})
    theirs = {k: torch.full_like(v, 7) for k, v in model.state_dict().items()}
    source = source_of(theirs, classes=('dog', 'cat'))
    plan = transfer(model, source, ('cat', 'dog'), reinit=reinit('head'), head_init='remap')
    assert [k for k, fate in plan.fates.items() if fate == 'remapped'] == ['head.fc_cls.weight', 'head.fc_cls.bias']
    assert (model['head']['fc_cls'].weight == 7).all() and (model['head']['bn'].weight == 1).all()


# Heads that are kept


def heads(rows: int, value: float = 7) -> dict[str, torch.Tensor]:
    return {'a.weight': torch.full((2, 2), value), 'head.weight': torch.full((rows, 2), value)}


@pytest.mark.parametrize(('head_init', 'rows'), [('keep', 3), ('auto', 3), ('auto', 81)])
@pytest.mark.parametrize('names', [('cat', 'dog'), None, ('dog', 'cat')], ids=['same', 'none', 'other order'])
def test_heads_of_the_same_classes_are_kept(head_init, rows, names):
    fits = rows == 3 and names != ('dog', 'cat')
    cfg = {'reinit': reinit('head'), 'head_init': head_init}
    plan = plan_transfer(heads(3), source_of(heads(rows), classes=names), cfg, ('cat', 'dog'))
    assert plan.kept == (fits or head_init == 'keep')
    assert plan.fates['head.weight'] == ('loaded' if plan.kept else 'reinit')
    assert facts_of(plan.problems) == (
        [] if fits or not plan.kept else [('weights-label', 0, 'cat', 'dog'), ('weights-label', 1, 'dog', 'cat')]
    )


def test_heads_of_another_number_of_classes_cannot_be_kept():
    cfg = {'reinit': reinit('head'), 'head_init': 'keep'}
    plan = plan_transfer(heads(3), source_of(heads(81)), cfg, ('cat', 'dog'))
    assert facts_of(plan.problems) == [('weights-shape', 'head.weight', (3, 2), (81, 2))]


def test_classes_that_were_only_assumed_do_not_contradict():
    source = source_of(heads(3), classes=('person', 'bicycle'))
    source.note('weights-coco-assumed')
    cfg = {'reinit': reinit('head'), 'head_init': 'keep'}
    assert not plan_transfer(heads(3), source, cfg, ('cat', 'dog')).problems
    assert not plan_transfer(heads(3), source, {**cfg, 'head_init': 'auto'}, ('cat', 'dog')).kept


def test_initial_state_changes_nothing():
    target = {'a.weight': torch.zeros(2, 2), 'head.weight': torch.zeros(2, 2)}
    source = source_of({'a.weight': torch.ones(2, 2)})
    plan = plan_transfer(target, source, {'reinit': reinit('head')})
    state = initial_state(plan, target, source, seed=1)
    assert torch.equal(state['a.weight'], torch.ones(2, 2)) and state['head.weight'].all()
    assert not target['a.weight'].any() and not target['head.weight'].any()


# The real model


@pytest.fixture(scope='module')
def moved(build_model, official_like):
    """Model, plan and file content of a transfer as the main config asks for it."""
    model = build_model()
    plan = transfer(model, official_like, reinit=HEADS, seed=0)
    return model.state_dict(), plan, torch.load(official_like, weights_only=True)['state_dict']


def test_config_and_test_agree_on_the_heads(voc_cfg):
    assert voc_cfg.weights.reinit == HEADS


def test_everything_but_the_heads_comes_from_the_file(moved):
    state, plan, file = moved
    rest = [k for k in state if not k.startswith(tuple(f'{h}.' for h in HEADS))]
    assert len(state) - len(rest) == 6
    assert plan.keys('loaded') == rest
    assert [k for k in rest if not torch.equal(state[k], file[k])] == []
    assert sorted(plan.keys('reinit')) == sorted(plan.dropped)
    assert len(plan.dropped) == 6
    assert plan.keys('untouched') == plan.ignored == plan.problems == []


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
    transfer(model, official_like, reinit=HEADS, seed=0)
    # The run's own random numbers go on as if nothing had been drawn.
    assert torch.equal(torch.get_rng_state(), before)
    same = model.state_dict()
    assert all(torch.equal(same[k], moved[0][k]) for k in same)
    transfer(model, official_like, reinit=HEADS, seed=1)
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
    with refused('weights-do-not-fit', path=official_like, count=expected):
        transfer(model, official_like, reinit=reinit)
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_backbone_of_torchvision(build_model, tmp_path):
    from torchvision.models import resnet50

    source = resnet50(weights=None).state_dict()
    path = tmp_path / 'resnet50.pth'
    torch.save(source, path)
    model = build_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = transfer(model, path, into='backbone', ignore=['fc.'])
    after = model.state_dict()
    assert sorted(plan.ignored) == ['fc.bias', 'fc.weight']
    assert len(plan.keys('loaded')) == len(source) - 2
    for key, tensor in after.items():
        if key.startswith('backbone.'):
            assert torch.equal(tensor, source[key.removeprefix('backbone.')]), key
        else:
            assert torch.equal(tensor, before[key]), key


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
