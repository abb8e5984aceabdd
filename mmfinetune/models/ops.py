"""mmcv's ops without a compiler: what Mask R-CNN needs, on torchvision's own kernels.

`import mmfinetune` is enough to make `mmcv.ops` importable where mmcv was installed without
compiled ops; a compiled mmcv is used where there is one. The functions here have the names and
the signatures of `mmcv._ext`, which `mmcv.ops` wraps: users call `mmcv.ops.nms` and the like.
They run on CPU and CUDA, in fp64, fp32, fp16 and bf16.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

import numpy as np
import torch
import torchvision
from torch import Tensor

import mmfinetune
from mmfinetune.utils.errors import UserError

# What torchvision's autograd calls; private, so a test fails where a version has other ones.
_ROI_ALIGN_BACKWARD, _ROI_POOL_BACKWARD = '_roi_align_backward', '_roi_pool_backward'


class MissingOpError(UserError, NotImplementedError):
    """An op was called that only a compiled mmcv has."""


def install() -> str:
    """Make `mmcv.ops` importable and say what its ops run on.

    Calling it is optional: importing `mmfinetune` before `mmcv.ops` does the same.

    Returns:
        'compiled' where mmcv has its own compiled ops, else 'torchvision'.

    Raises:
        ModuleNotFoundError: mmcv is not installed.
        ImportError: mmcv's compiled ops do not load (built for another torch, most often).
    """
    mmfinetune.add_ops_finder()
    ext = importlib.import_module('mmcv._ext')
    return 'torchvision' if getattr(ext, 'nms', None) is nms else 'compiled'


def populate_ext_module(module: ModuleType) -> None:
    """Make `module` a stand-in for `mmcv._ext`.

    Every public name is answered, as mmcv asserts at import that it exists; the ops that are not
    here raise `MissingOpError` when they are called.
    """

    def missing(name: str) -> Callable:
        # Private names are what Python, pickle and inspect probe modules for.
        if name.startswith('_'):
            raise AttributeError(f'module {module.__name__!r} has no attribute {name!r}')
        return functools.partial(_missing, name)

    vars(module).update({op.__name__: op for op in _OPS}, __getattr__=missing)


def _missing(name: str, *_: object, **__: object) -> NoReturn:
    raise MissingOpError('op-missing', op=name, torch=torch.__version__)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    # torchvision lacks bf16 kernels, and lacks fp16 for NMS on the CPU. Where it has fp16, it
    # also computes sample coordinates in fp16, which are off by whole cells on large images.
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(t.to(dtype) for t in tensors)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (N, 4), as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: Boxes that overlap a better one by more than this are dropped.
        offset: 0 or 1; a box is x2 - x1 + offset wide.

    Returns:
        (K,) int64 indices of the boxes kept, best score first.
    """
    boxes, scores = _wide(boxes, scores)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # mmcv compares with a float, torchvision on the CPU with a double: an overlap of exactly
    # 0.6 in fp32 is more than the double 0.6.
    return torch.ops.torchvision.nms(boxes, scores, float(np.float32(iou_threshold)))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int = 0,
) -> Tensor:
    """Soft-NMS, in the order (ties too) of mmcv's CPU implementation.

    Args:
        boxes: (N, 4), as x1, y1, x2, y2.
        scores: (N,).
        dets: (N, 5) CPU tensor, of which the first K rows are filled in place with the boxes
            kept and their new scores.
        iou_threshold: From this overlap on, 'naive' and 'linear' lower a score.
        sigma: Width of the gaussian.
        min_score: A box whose score falls below it is dropped.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: 0 or 1; a box is x2 - x1 + offset wide.

    Returns:
        (K,) int64 indices of the boxes kept, in the order of `dets`.
    """
    rows = torch.cat(_wide(boxes, scores[:, None]), dim=1).detach().cpu().numpy()
    iou_threshold, sigma, min_score = rows.dtype.type([iou_threshold, sigma, min_score])
    inds = np.arange(len(rows))
    n, i = len(rows), 0
    while i < n:
        best = i + _first_max(rows[i:n, 4])
        rows[[i, best]], inds[[i, best]] = rows[[best, i]], inds[[best, i]]

        rest = rows[i + 1 : n]
        overlaps = _ious(rows[i], rest, offset)
        if method == 2:
            rest[:, 4] *= np.exp(-(overlaps * overlaps) / sigma)
        else:
            weights = 1 - overlaps if method == 1 else np.zeros_like(overlaps)
            rest[:, 4] *= np.where(overlaps >= iou_threshold, weights, rows.dtype.type(1))

        # mmcv moves the last box into the place of a dropped one; the order that results
        # decides between equal scores, so it is kept.
        alive = ~(rest[:, 4] < min_score)
        end = i + 1 + int(alive.sum())
        kept = np.flatnonzero(alive) + i + 1
        holes = np.flatnonzero(~alive) + i + 1
        holes = holes[holes < end]
        fillers = kept[kept >= end][::-1]
        rows[holes], inds[holes] = rows[fillers], inds[fillers]
        n, i = end, i + 1
    dets[:n] = torch.from_numpy(rows[:n]).to(dets)
    return torch.from_numpy(inds[:n]).to(boxes.device)


def _first_max(scores: np.ndarray) -> int:
    # The comparisons of mmcv's loop are false for NaN: it stays where it is first, else waits.
    if np.isnan(scores[0]):
        return 0
    return int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))


def _ious(box: np.ndarray, others: np.ndarray, offset: int) -> np.ndarray:
    x1, y1, x2, y2 = others[:, :4].T
    offset = box.dtype.type(offset)
    widths = np.maximum(np.minimum(box[2], x2) - np.maximum(box[0], x1) + offset, 0)
    heights = np.maximum(np.minimum(box[3], y2) - np.maximum(box[1], y1) + offset, 0)
    inter = widths * heights
    area = (box[2] - box[0] + offset) * (box[3] - box[1] + offset)
    # Boxes without area give 0 / 0, which compares false, as in mmcv.
    with np.errstate(invalid='ignore', divide='ignore'):
        return inter / (area + (x2 - x1 + offset) * (y2 - y1 + offset) - inter)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Greedy NMS that also says which boxes each kept one stands for.

    Args:
        dets: (N, 5), as x1, y1, x2, y2, score.
        iou_threshold: From this overlap on, a box joins the group of a better one.

    Returns:
        One group of indices for each kept box: itself first, then the others by score.
    """
    rows = _wide(dets)[0].detach().cpu().numpy()
    iou_threshold = rows.dtype.type(iou_threshold)
    order = np.argsort(-rows[:, 4], kind='stable')
    groups = []
    while len(order):
        best, order = order[0], order[1:]
        joins = _ious(rows[best], rows[order], 0) >= iou_threshold
        groups.append([int(best), *order[joins].tolist()])
        order = order[~joins]
    return groups


def _average_only(pool_mode: int) -> None:
    if pool_mode != 1:
        _missing('roi_align with max pooling')


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign with average pooling.

    Args:
        input: (B, C, H, W).
        rois: (K, 5), as batch index, x1, y1, x2, y2.
        output: (K, C, aligned_height, aligned_width), filled in place.
        argmax_y, argmax_x: Unused: only max pooling needs them.
        aligned_height, aligned_width: Rows and columns of a pooled region.
        spatial_scale: From the coordinates of `rois` to those of `input`.
        sampling_ratio: Samples a bin has in each direction; 0 for as many as it covers cells.
        pool_mode: 1 for average.
        aligned: Whether coordinates are shifted by half a cell.

    Raises:
        MissingOpError: `pool_mode` is 0 (max), which torchvision does not have.
    """
    _average_only(pool_mode)
    input, rois = _wide(input, rois)
    output.copy_(
        torch.ops.torchvision.roi_align(
            input, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward`, from `grad_output` (K, C, aligned_height, aligned_width).

    Args:
        grad_input: (B, C, H, W), filled in place.

    Raises:
        MissingOpError: `pool_mode` is 0 (max), which torchvision does not have.
    """
    _average_only(pool_mode)
    grad_output, rois = _wide(grad_output, rois)
    grad_input.copy_(
        getattr(torch.ops.torchvision, _ROI_ALIGN_BACKWARD)(
            grad_output, rois, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
        )
    )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool, with the bins of mmcv.

    Args:
        input: (B, C, H, W).
        rois: (K, 5), as batch index, x1, y1, x2, y2.
        output: (K, C, pooled_height, pooled_width), filled in place; 0 for a bin without cells.
        argmax: int32 of the shape of `output`, filled in place with row * W + column of the
            maximum; -1 for a bin without cells.
        pooled_height, pooled_width: Rows and columns of a pooled region.
        spatial_scale: From the coordinates of `rois` to those of `input`.
    """
    input, rois = _wide(input, rois)
    x_starts, x_ends = _bins(rois[:, 1], rois[:, 3], spatial_scale, pooled_width, input.size(3))
    y_starts, y_ends = _bins(rois[:, 2], rois[:, 4], spatial_scale, pooled_height, input.size(2))

    # torchvision rounds the corners of a region, mmcv does not; so each bin of mmcv is handed
    # to torchvision as a region of whole cells with a single bin.
    x_starts, x_ends, y_starts, y_ends = x_starts[:, None], x_ends[:, None], y_starts[..., None], y_ends[..., None]
    corners = (rois[:, 0, None, None], x_starts, y_starts, x_ends - 1, y_ends - 1)
    cells = torch.stack(torch.broadcast_tensors(*corners), dim=-1)
    empty = (cells[..., 3] < cells[..., 1]) | (cells[..., 4] < cells[..., 2])
    values, places = torch.ops.torchvision.roi_pool(input, cells.reshape(-1, 5), 1.0, 1, 1)
    for target, source, nothing in (output, values, 0), (argmax, places, -1):
        source = source.reshape(*empty.shape, input.size(1)).permute(0, 3, 1, 2)
        target.copy_(source.masked_fill(empty[:, None], nothing))


def _bins(starts: Tensor, ends: Tensor, scale: float, bins: int, size: int) -> tuple[Tensor, Tensor]:
    starts, ends = starts[:, None] * scale, (ends[:, None] + 1) * scale
    width = (ends - starts) / bins
    edges = torch.arange(bins + 1, dtype=starts.dtype, device=starts.device)
    first = (edges[:-1] * width + starts).floor().clamp(0, size)
    last = (edges[1:] * width + starts).ceil().clamp(0, size)
    # A region turned inside out has no cells at all, though rounding could give its bins some.
    return first, torch.where(width > 0, last, first)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of `roi_pool_forward`, from `grad_output` (K, C, pooled_height, pooled_width).

    Args:
        grad_input: (B, C, H, W), filled in place.
    """
    grad_output, rois = _wide(grad_output, rois)
    grad_input.copy_(
        getattr(torch.ops.torchvision, _ROI_POOL_BACKWARD)(
            grad_output, rois, argmax, spatial_scale, pooled_height, pooled_width, *grad_input.shape
        )
    )


def get_compiler_version() -> str:
    """What `mmcv.utils.collect_env` shows as the compiler of the ops."""
    return f'n/a (torchvision {torchvision.__version__})'


def get_compiling_cuda_version() -> str:
    """What `mmcv.utils.collect_env` shows as the CUDA of the ops."""
    return 'n/a' if torch.version.cuda is None else f'n/a (torch built for {torch.version.cuda})'


_OPS = (
    nms,
    softnms,
    nms_match,
    roi_align_forward,
    roi_align_backward,
    roi_pool_forward,
    roi_pool_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)
