"""The torchvision-backed ops against brute force, and how they become `mmcv._ext`."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import mmfinetune
from mmfinetune.models import ops
from mmfinetune.utils.errors import UserError
from tests.builders.errors import refused

pytestmark = pytest.mark.skipif(
    ops.install() == 'compiled', reason='this mmcv has compiled ops; there is nothing to stand in'
)

DEVICES = [
    'cpu',
    pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')),
]
HALVES = [torch.float16, torch.bfloat16]


def run_script(tmp_path: Path, code: str) -> str:
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={'PYTHONPATH': str(Path(mmfinetune.__file__).parents[1]), 'OMP_NUM_THREADS': '1', 'HOME': str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def iou(a, b, offset=0):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def random_boxes(n, seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (n, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (n, 2))], axis=1)
    scores = rng.permutation(np.linspace(0.02, 0.99, n))
    return boxes.astype(np.float32), scores.astype(np.float32)


def naive_nms(boxes, scores, threshold, offset):
    keep = []
    for i in np.argsort(-scores):
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in keep):
            keep.append(int(i))
    return keep


def naive_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    left = {i: float(s) for i, s in enumerate(scores)}
    kept = []
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[best].astype(float), boxes[i].astype(float), offset)
            if method == 'gaussian':
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[i] *= 0 if method == 'naive' else 1 - overlap
            if left[i] < min_score:
                del left[i]
    return [i for i, _ in kept], [s for _, s in kept]


def bilinear(plane, y, x):
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = y - y0, x - x0
    return (1 - fy) * ((1 - fx) * plane[y0, x0] + fx * plane[y0, x1]) + fy * (
        (1 - fx) * plane[y1, x0] + fx * plane[y1, x1]
    )


def naive_roi_align(features, rois, size, scale, ratio, aligned):
    out = np.zeros((len(rois), features.shape[1], *size))
    for k, (image, *box) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_h, bin_w = height / size[0], width / size[1]
        rows, cols = (ratio, ratio) if ratio else (math.ceil(bin_h), math.ceil(bin_w))
        for c, i, j in np.ndindex(out.shape[1:]):
            samples = [
                bilinear(
                    features[int(image), c], y1 + (i + (a + 0.5) / rows) * bin_h, x1 + (j + (b + 0.5) / cols) * bin_w
                )
                for a, b in itertools.product(range(rows), range(cols))
            ]
            out[k, c, i, j] = sum(samples) / max(len(samples), 1)
    return out


def naive_roi_pool(features, rois, size, scale):
    limits = features.shape[2:]
    out = np.zeros((len(rois), features.shape[1], *size))
    for k, (image, x1, y1, x2, y2) in enumerate(rois):
        starts, ends = (y1 * scale, x1 * scale), ((y2 + 1) * scale, (x2 + 1) * scale)
        if any(e <= s for s, e in zip(starts, ends, strict=True)):
            continue
        for c, *place in np.ndindex(out.shape[1:]):
            ranges = []
            for axis in (0, 1):
                step = (ends[axis] - starts[axis]) / size[axis]
                first = math.floor(place[axis] * step + starts[axis])
                last = math.ceil((place[axis] + 1) * step + starts[axis])
                ranges.append(slice(*np.clip([first, last], 0, limits[axis])))
            cells = features[int(image), c][tuple(ranges)]
            out[k, c, place[0], place[1]] = cells.max() if cells.size else 0
    return out


FEATURES = np.random.default_rng(1).permutation(2 * 3 * 8 * 10).reshape(2, 3, 8, 10) / 100
ROIS = np.array(
    [
        [0, 2.3, 1.1, 15.7, 9.2],
        [1, 0, 0, 19, 15],
        [1, 4.4, 6.1, 4.9, 6.3],
        [0, -7, -5, 6, 30],
        [1, 13.2, 3.3, 45, 12],
        [0, 60, 60, 90, 90],
    ]
)


# --- NMS ---


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_brute_force(offset, device):
    from mmcv.ops import nms

    boxes, scores = random_boxes(120, seed=0)
    keep = naive_nms(boxes.astype(float), scores, 0.4, offset)
    assert 5 < len(keep) < 100
    dets, inds = nms(torch.tensor(boxes, device=device), torch.tensor(scores, device=device), 0.4, offset=offset)
    assert inds.device.type == device
    assert inds.tolist() == keep
    np.testing.assert_array_equal(dets.cpu(), np.column_stack([boxes, scores])[keep])


@pytest.mark.parametrize('device', DEVICES)
def test_nms_offset_decides(device):
    # 5 x 10 of 15 x 10 overlap: 1/3. With offset 1, 6 x 11 of 16 x 11: 0.375.
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10]], device=device)
    scores = torch.tensor([0.5, 0.9], device=device)
    assert ops.nms(boxes, scores, iou_threshold=0.35, offset=0).tolist() == [1, 0]
    assert ops.nms(boxes, scores, iou_threshold=0.35, offset=1).tolist() == [1]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('tenths', range(1, 10))
def test_nms_keeps_a_box_at_the_threshold(tenths, device):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, tenths, 10]], device=device)
    scores = torch.tensor([0.9, 0.5], device=device)
    assert ops.nms(boxes, scores, tenths / 10, 0).tolist() == [0, 1]
    assert ops.nms(boxes, scores, tenths / 10 - 0.01, 0).tolist() == [0]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [*HALVES, torch.float64])
def test_nms_dtypes(dtype, device):
    boxes = torch.tensor(random_boxes(60, seed=3)[0], device=device).to(dtype)
    # Scores that stay apart in bf16: the order of equal ones is nobody's promise.
    scores = torch.arange(60, device=device).flip(0).to(dtype)
    keep = naive_nms(boxes.double().cpu().numpy(), scores.double().cpu().numpy(), 0.4, 0)
    assert ops.nms(boxes, scores, 0.4, 0).tolist() == keep


def test_nms_nothing_in_nothing_out():
    from mmcv.ops import nms, soft_nms

    for op in nms, soft_nms:
        dets, inds = op(torch.zeros(0, 4), torch.zeros(0), 0.5)
        assert dets.shape == (0, 5)
        assert inds.shape == (0,)
        assert inds.dtype == torch.int64


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_naive_reference(method, offset, device):
    from mmcv.ops import soft_nms

    boxes, scores = random_boxes(80, seed=5)
    inds, new_scores = naive_soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert 3 < len(inds) < 80
    dets, got = soft_nms(
        torch.tensor(boxes, device=device), torch.tensor(scores, device=device), 0.3, 0.5, 0.05, method, offset
    )
    assert got.device.type == device
    assert got.tolist() == inds
    np.testing.assert_array_equal(dets[:, :4].cpu(), boxes[inds])
    np.testing.assert_allclose(dets[:, 4].cpu(), new_scores, rtol=1e-5)


def test_soft_nms_by_hand():
    from mmcv.ops import soft_nms

    # The second box covers 0.6 of the first, the third touches neither.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 6, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.9, 0.8, 0.5])
    for method, second in ('linear', 0.8 * 0.4), ('gaussian', 0.8 * math.exp(-0.36 / 0.5)):
        dets, inds = soft_nms(boxes, scores, 0.3, 0.5, 0.01, method)
        assert inds.tolist() == [0, 2, 1]
        np.testing.assert_allclose(dets[:, 4], [0.9, 0.5, second], rtol=1e-6)
    assert soft_nms(boxes, scores, 0.3, 0.5, 0.01, 'naive')[1].tolist() == [0, 2]
    # At the threshold itself a score is lowered, unlike in plain NMS.
    assert soft_nms(boxes, scores, 0.6, 0.5, 0.01, 'naive')[1].tolist() == [0, 2]
    assert soft_nms(boxes, scores, 0.61, 0.5, 0.01, 'naive')[1].tolist() == [0, 1, 2]
    assert scores.tolist() == pytest.approx([0.9, 0.8, 0.5])


def test_soft_nms_order_of_ties():
    from mmcv.ops import soft_nms

    # Boxes 1 and 2 are dropped: the last box takes the first place free, the one before it the
    # second, so both come before box 3, their equal.
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 8], [20, 0, 29, 9], [40, 0, 49, 9], [60, 0, 69, 9]])
    scores = torch.tensor([0.9, 0.8, 0.8, 0.5, 0.5, 0.5])
    assert soft_nms(boxes, scores, 0.3, method='naive')[1].tolist() == [0, 5, 4, 3]


def test_soft_nms_boxes_without_area():
    from mmcv.ops import soft_nms

    boxes = np.array(
        [[4, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]], dtype=np.float32
    )
    scores = np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], dtype=np.float32)
    dets, inds = soft_nms(boxes, scores, iou_threshold=0.6, sigma=0.5)
    assert inds.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(dets, np.column_stack([boxes, scores])[:5])


@pytest.mark.parametrize('dtype', HALVES)
def test_soft_nms_halves(dtype):
    from mmcv.ops import soft_nms

    boxes, scores = (torch.tensor(a).to(dtype) for a in random_boxes(40, seed=5))
    dets, inds = soft_nms(boxes, scores, 0.3, 0.5, 0.05, 'linear')
    wide, expected = soft_nms(boxes.float(), scores.float(), 0.3, 0.5, 0.05, 'linear')
    assert dets.dtype == dtype
    assert torch.equal(inds, expected)
    assert torch.equal(dets, wide.to(dtype))


def test_nms_match_groups():
    from mmcv.ops import nms_match

    dets = torch.tensor([[0.0, 0, 10, 8, 0.5], [20, 20, 30, 30, 0.6], [0, 0, 10, 10, 0.9], [0, 0, 10, 6, 0.7]])
    groups = [g.tolist() for g in nms_match(dets, 0.6)]
    assert groups == [[2, 3, 0], [1]]


# --- RoIAlign and RoIPool ---


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('aligned', [True, False])
def test_roi_align_brute_force(aligned, ratio, device):
    from mmcv.ops import roi_align

    features = torch.tensor(FEATURES, device=device)
    got = roi_align(features, torch.tensor(ROIS, device=device), (3, 2), 0.5, ratio, 'avg', aligned)
    expected = naive_roi_align(FEATURES, ROIS, (3, 2), 0.5, ratio, aligned)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got.cpu(), expected, atol=1e-9)
    single = roi_align(features.float(), torch.tensor(ROIS, device=device).float(), (3, 2), 0.5, ratio, 'avg', aligned)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
def test_roi_align_gradcheck(aligned, device):
    from mmcv.ops import roi_align

    features = torch.tensor(FEATURES[:, :1, :5, :6], device=device, requires_grad=True)
    rois = torch.tensor(ROIS, device=device)
    assert torch.autograd.gradcheck(lambda f: roi_align(f, rois, (2, 2), 0.5, 2, 'avg', aligned), (features,))


@pytest.mark.parametrize('device', DEVICES)
def test_roi_pool_brute_force(device):
    from mmcv.ops import roi_pool

    # Corners at odd places, empty bins, a region that is all outside, two turned inside out.
    rois = np.concatenate([ROIS, [[1, 9, 9, 3, 12], [1, 9, 9, 7.5, 12]]])
    for scale in 0.5, 1.0:
        got = roi_pool(torch.tensor(FEATURES, device=device), torch.tensor(rois, device=device), (3, 2), scale)
        expected = naive_roi_pool(FEATURES, rois, (3, 2), scale)
        np.testing.assert_array_equal(got.cpu(), expected)
        assert (expected[5:] == 0).all()


@pytest.mark.parametrize('device', DEVICES)
def test_roi_pool_gradcheck(device):
    from mmcv.ops import roi_pool

    features = torch.tensor(FEATURES[:, :2, :5, :6], device=device, requires_grad=True)
    rois = torch.tensor(ROIS, device=device)
    assert torch.autograd.gradcheck(lambda f: roi_pool(f, rois, (2, 3), 0.5), (features,))


def test_roi_pool_argmax():
    features = torch.tensor(FEATURES)
    rois = torch.tensor(ROIS)
    output, argmax = torch.zeros(6, 3, 3, 2).double(), torch.zeros(6, 3, 3, 2, dtype=torch.int32)
    ops.roi_pool_forward(features, rois, output, argmax, 3, 2, 0.5)
    for k, c, i, j in np.ndindex(6, 3, 3, 2):
        place = int(argmax[k, c, i, j])
        expected = 0 if place < 0 else features[int(rois[k, 0]), c].flatten()[place]
        assert output[k, c, i, j] == expected
    assert (argmax[5] == -1).all()
    assert (argmax[1] >= 0).all()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('name', ['roi_align', 'roi_pool'])
def test_roi_halves_close_to_single(name, dtype, device):
    import mmcv.ops

    # Corners and values that the half types hold exactly: what differs is the op's own doing.
    rois = torch.tensor([[0, 2.5, 1, 15.5, 9], [1, 0, 0, 19, 15]], device=device)
    values = torch.tensor(FEATURES, device=device).to(dtype)
    grad = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    results = []
    for kind in dtype, torch.float32:
        features = values.detach().to(kind).requires_grad_()
        extra = (0, 'avg', True) if name == 'roi_align' else ()
        out = getattr(mmcv.ops, name)(features, rois.to(kind), (2, 2), 0.5, *extra)
        out.backward(grad.to(kind))
        assert out.dtype == features.grad.dtype == kind
        results.append((out.detach().float(), features.grad.float()))
    assert results[1][1].abs().sum() > 1
    for half, single in zip(*results, strict=True):
        torch.testing.assert_close(half, single, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize('name', ['RoIAlign', 'RoIPool'])
def test_roi_without_regions(name):
    import mmcv.ops

    features = torch.rand(1, 2, 6, 6, requires_grad=True)
    out = getattr(mmcv.ops, name)((7, 7), 0.5)(features, torch.zeros(0, 5))
    assert out.shape == (0, 2, 7, 7)
    out.sum().backward()
    assert (features.grad == 0).all()


# --- Ops that are not there ---


def test_missing_op_names_itself_and_the_cure():
    from mmcv.ops import deform_conv2d

    with pytest.raises(NotImplementedError) as caught:
        deform_conv2d(torch.rand(1, 2, 5, 5), torch.rand(1, 18, 3, 3), torch.rand(2, 2, 3, 3))
    assert isinstance(caught.value, ops.MissingOpError)
    assert isinstance(caught.value, UserError)
    assert (caught.value.code, caught.value.facts['op']) == ('op-missing', 'deform_conv_forward')
    text = str(caught.value)
    for op in 'nms', 'softnms', 'roi_align', 'roi_pool':
        assert op in text
    assert 'pip install' in text
    assert 'onedl-mmcv' in text
    assert torch.__version__ in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_max_pooling_is_missing():
    from mmcv.ops import roi_align

    with refused('op-missing', op='roi_align with max pooling'):
        roi_align(torch.rand(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 3, 3]]), (2, 2), 1.0, 2, 'max')


def test_private_ops_of_torchvision_are_what_they_were():
    """A new torchvision may rename them, or take other arguments."""
    schemas = {
        ops._ROI_ALIGN_BACKWARD: 'grad rois spatial_scale pooled_height pooled_width batch_size channels height width '
        'sampling_ratio aligned',
        ops._ROI_POOL_BACKWARD: 'grad rois argmax spatial_scale pooled_height pooled_width batch_size channels height '
        'width',
    }
    for name, arguments in schemas.items():
        schema = getattr(torch.ops.torchvision, name).default._schema
        assert [argument.name for argument in schema.arguments] == arguments.split()


def test_stand_in_answers_public_names_only():
    import mmcv._ext

    assert mmcv._ext.nms is ops.nms
    assert callable(mmcv._ext.no_such_op)
    pickle.loads(pickle.dumps(mmcv._ext.no_such_op))
    copy.deepcopy(mmcv._ext.no_such_op)
    for name in '__path__', '__file__', '__wrapped__', '__all__', '_private':
        assert not hasattr(mmcv._ext, name)


def test_collect_env_names_torchvision():
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    assert 'torchvision' in get_compiler_version()
    assert get_compiling_cuda_version().startswith('n/a')


# --- How they become mmcv._ext ---


def test_import_is_cheap_and_idempotent(tmp_path):
    assert run_script(
        tmp_path,
        """
        import importlib, sys
        import mmfinetune
        importlib.reload(mmfinetune)
        del sys.modules['mmfinetune']
        import mmfinetune
        names = [type(f).__name__ for f in sys.meta_path]
        print(names.count('_OpsFinder'), names[-1])
        print(sorted({'torch', 'torchvision', 'mmcv', 'numpy'} & set(sys.modules)))
    """,
    ).splitlines() == ['1 _OpsFinder', '[]']


def test_compiled_module_wins(tmp_path):
    (tmp_path / 'compiled').mkdir()
    (tmp_path / 'compiled' / '_ext.py').write_text(
        'import torch\n'
        'def nms(*args, **kwargs): return torch.tensor([1])\n'
        'def __getattr__(name):\n'
        "    if name.startswith('_'): raise AttributeError(name)\n"
        '    return lambda *args, **kwargs: None\n'
    )
    assert run_script(
        tmp_path,
        """
        import mmfinetune
        import mmcv
        mmcv.__path__.append('compiled')
        import sys, torch
        import mmcv.ops
        print('mmfinetune.models.ops' in sys.modules)
        boxes = torch.tensor([[0., 0, 1, 1], [5, 5, 6, 6]])
        print(mmcv.ops.nms(boxes, torch.tensor([.9, .8]), .5)[1].tolist())
        from mmfinetune.models.ops import install
        print(install())
    """,
    ).splitlines() == ['False', '[1]', 'compiled']


def test_install_says_torchvision():
    assert ops.install() == ops.install() == 'torchvision'


def test_spawned_loader_worker_has_the_ops(tmp_path):
    assert (
        run_script(
            tmp_path,
            """
        import os
        import mmfinetune
        import torch
        from torch.utils.data import DataLoader, Dataset


        class Boxes(Dataset):

            def __len__(self):
                return 2

            def __getitem__(self, index):
                from mmcv.ops import nms
                boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
                kept = nms(boxes, torch.tensor([.7, .9, .8]), .5)[1]
                return torch.cat([kept, torch.tensor([os.getpid()])])


        if __name__ == '__main__':
            loader = DataLoader(Boxes(), 2, num_workers=1, multiprocessing_context='spawn')
            batch = next(iter(loader))
            print(batch[:, :2].tolist(), os.getpid() in batch[:, 2].tolist())
    """,
        )
        == '[[1, 2], [1, 2]] False'
    )
