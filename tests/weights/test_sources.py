"""Weights of torchvision and Detectron2 give the same function under MMDetection's names."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfinetune.data.classes import COCO_CLASSES
from mmfinetune.utils.errors import UserError
from mmfinetune.utils.files import sha256_of
from mmfinetune.weights import read, sources
from mmfinetune.weights import source as weights_source
from mmfinetune.weights.origins import torchvision
from mmfinetune.weights.origins.torchvision import to_torchvision
from mmfinetune.weights.publish import convert_file, save
from mmfinetune.weights.sources import read_source

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 256, 320
LEVELS = 5
TOLERANCE = 1e-4
# Slots of torchvision in the order of MMDetection's rows, from torchvision's own list of names.
UNUSED = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
SLOTS = [i for i in range(1, 91) if i not in UNUSED]


# --- A torchvision model with random weights, and the same in MMDetection -----------------------


def torchvision_model(num_classes: int = 91):
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    return maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=HEIGHT, max_size=WIDTH
    ).eval()


@pytest.fixture(scope='module')
def theirs():
    """torchvision's model; BN has random statistics, and activations are of order 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = torchvision_model()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        with torch.no_grad():
            for norm in norms:
                norm.momentum = None  # the average of all batches
                norm.train()
                norm.weight.uniform_(0.2, 0.6)
                norm.bias.normal_(std=0.1)
            model.backbone(torch.randn(2, 3, HEIGHT, WIDTH))
            for norm in norms:
                # Near the true statistics, or the activations would grow from layer to layer.
                norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.5))
                norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
                norm.momentum = 0.1
            for name, parameter in model.named_parameters():
                if name.endswith('bias') and 'backbone.body' not in name:
                    parameter.normal_(std=0.1)
            head = model.roi_heads.box_predictor
            # So spread that some classes pass the score threshold; slots that COCO never used
            # have no probability, as in a trained model.
            head.cls_score.weight.normal_(std=0.4)
            head.cls_score.bias[UNUSED] = -60
            head.bbox_pred.weight.normal_(std=0.1)
            model.rpn.head.cls_logits.weight.normal_(std=0.1)
            model.rpn.head.bbox_pred.weight.normal_(std=0.02)
    return model.eval()


@pytest.fixture(scope='module')
def their_file(theirs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('torchvision') / 'random.pth'
    torch.save(theirs.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def source(their_file):
    return read_source(their_file)


@pytest.fixture(scope='module')
def coco_model(voc_cfg):
    """Builds MMDetection's 80-class model; `voc_cfg` has registered all parts."""
    import mmdet
    from mmdet.registry import MODELS
    from mmengine.config import Config

    base = Path(mmdet.__file__).parent / '.mim/configs/_base_/models/mask-rcnn_r50_fpn.py'
    cfg = Config.fromfile(base).model
    cfg.backbone.init_cfg = None
    cfg['_scope_'] = 'mmdet'
    for extractor in ('bbox_roi_extractor', 'mask_roi_extractor'):
        cfg.roi_head[extractor].roi_layer.update(sampling_ratio=2, aligned=False)
    return lambda: MODELS.build(copy.deepcopy(cfg)).eval()


@pytest.fixture(scope='module')
def ours(source, coco_model):
    model = coco_model()
    model.load_state_dict(source.tensors)  # strict: every key of the model, and no other
    return model


@pytest.fixture(scope='module')
def images() -> torch.Tensor:
    """(2, 3, H, W), RGB, uint8: photographs where there are some, else noise in blobs."""
    folder = os.environ.get('MMFINETUNE_REAL_DATA')
    files = sorted(Path(folder).rglob('*.jpg'))[:2] if folder else []
    if len(files) == 2:
        from PIL import Image

        arrays = [np.asarray(Image.open(f).convert('RGB').resize((WIDTH, HEIGHT))) for f in files]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(1)
    blobs = torch.rand(2, 3, HEIGHT // 16, WIDTH // 16, generator=generator)
    fine = torch.rand(2, 3, HEIGHT, WIDTH, generator=generator)
    coarse = torch.nn.functional.interpolate(blobs, size=(HEIGHT, WIDTH), mode='bilinear')
    return ((0.7 * coarse + 0.3 * fine) * 255).to(torch.uint8)


@pytest.fixture(scope='module')
def inputs(theirs, ours, images):
    """The images as each of the two models normalises them: (theirs, ours, our data samples)."""
    from mmdet.structures import DetDataSample

    normalised, _ = theirs.transform([i / 255 for i in images])
    samples = [
        DetDataSample(metainfo=dict(img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH), scale_factor=(1.0, 1.0)))
        for _ in images
    ]
    # MMDetection reads BGR and turns it to RGB itself.
    data = ours.data_preprocessor({'inputs': list(images.flip(1)), 'data_samples': samples})
    return normalised.tensors, data['inputs'], data['data_samples']


@pytest.fixture(scope='module')
def features(theirs, ours, inputs):
    # Both from one tensor, since rounding in the normalisation grows a hundredfold on the way
    # through a random network; `test_inputs_are_equal` compares the normalisation itself.
    with torch.no_grad():
        return list(theirs.backbone(inputs[0]).values()), list(ours.extract_feat(inputs[0]))


@pytest.fixture(scope='module')
def rois() -> torch.Tensor:
    """Boxes of all sizes in the image; (R, 4)."""
    generator = torch.Generator().manual_seed(5)
    corner = torch.rand(40, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT]) * 0.7
    size = 8 * 2 ** (torch.rand(40, 2, generator=generator) * 5)
    boxes = torch.cat([corner, corner + size], 1)
    boxes[:, 0::2].clamp_(0, WIDTH)
    boxes[:, 1::2].clamp_(0, HEIGHT)
    return boxes


def close(left: torch.Tensor, right: torch.Tensor, what: str) -> None:
    """Equal within `TOLERANCE`, for numbers that are of order 1."""
    assert left.shape == right.shape, what
    scale = float(left.abs().max())
    difference = float((left - right).abs().max())
    print(f'{what}: max |x| {scale:.3g}, std {left.std():.3g}, max difference {difference:.2g}')
    assert 0.05 < scale < 50, f'{what}: of scale {scale}, which shows nothing'
    assert difference <= TOLERANCE, what


def test_inputs_are_equal(inputs):
    close(*inputs[:2], 'normalised images')


def test_features_are_equal(features):
    for level, (left, right) in enumerate(zip(*features, strict=True)):
        close(left, right, f'FPN level {level}')


def test_proposals_of_every_place_are_equal(theirs, ours, features):
    with torch.no_grad():
        left = theirs.rpn.head(features[0])
        right = ours.rpn_head(features[1])
    for kind, a, b in zip(('logits', 'deltas'), left, right, strict=True):
        assert len(a) == len(b) == LEVELS
        for level in range(LEVELS):
            close(a[level], b[level], f'RPN {kind} of level {level}')


def test_heads_are_equal_on_given_rois(theirs, ours, features, rois):
    sizes = [(HEIGHT, WIDTH)] * 2
    with torch.no_grad():
        pyramid = dict(zip(['0', '1', '2', '3', 'pool'], features[0], strict=True))
        heads = theirs.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(pyramid, [rois, rois], sizes)))
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(pyramid, [rois, rois], sizes)))
        numbered = torch.cat([torch.cat([torch.full((len(rois), 1), float(i)), rois], 1) for i in range(2)])
        mine = ours.roi_head._bbox_forward(features[1], numbered)
        my_masks = ours.roi_head._mask_forward(features[1], numbered)['mask_preds']
    close(logits[:, [*SLOTS, 0]], mine['cls_score'], 'box logits')
    close(deltas.unflatten(1, (91, 4))[:, SLOTS].flatten(1), mine['bbox_pred'], 'box deltas')
    close(masks[:, SLOTS], my_masks, 'mask logits')
    # Not equal by being the same everywhere: the classes differ from each other.
    assert mine['cls_score'].std(1).min() > 0.1


def test_detections_are_equal_with_torchvisions_anchors(theirs, ours, inputs, images):
    """The whole list: proposals, boxes, scores, classes, masks.

    What remains different between the libraries:

    - torchvision rounds its base anchors to whole pixels, MMDetection does not. Here they are set
      equal; `test_rounded_anchors_are_what_differs` shows the size of it.
    - Resizing: both would resize on their own (torchvision in floats without antialias,
      MMDetection on uint8 with OpenCV). Here the images have their final size.
    - Both take scores over 0.05, NMS at 0.5 in each class and the best 100. Equal scores could
      come in another order; there are none here, so the lists are compared place by place.
    - torchvision's softmax has 10 slots more; in a trained model, and here, they are empty.
    - Masks are compared as the 28x28 probabilities of each detection. Pasting them into the image
      differs: see `test_pasting_differs_at_edges_only`.
    """
    model = copy.deepcopy(ours)
    cells = theirs.rpn.anchor_generator.cell_anchors
    model.rpn_head.prior_generator.base_anchors = [c.float() for c in cells]
    grids = []
    hook = theirs.roi_heads.register_forward_hook(
        lambda _, args, output: grids.extend(found['masks'][:, 0] for found in output[0])
    )
    with torch.no_grad():
        left = theirs([i / 255 for i in images])
        hook.remove()
        right = model.predict(inputs[0], copy.deepcopy(inputs[2]), rescale=False)
        features = model.extract_feat(inputs[0])
    slot_to_row = {slot: row for row, slot in enumerate(SLOTS)}
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        b = b.pred_instances
        labels = torch.tensor([slot_to_row[int(x)] for x in a['labels']])
        assert len(labels) == len(b.labels) > 20
        print(f'{len(labels)} detections of {len(set(labels.tolist()))} classes')
        close(a['scores'], b.scores, 'scores')
        assert torch.equal(labels, b.labels)
        # In widths of the image, since numbers of order 1 are compared; 1e-4 is 0.03 pixels.
        close(a['boxes'] / WIDTH, b.bboxes / WIDTH, 'boxes')
        numbered = torch.cat([torch.full((len(labels), 1), float(number)), b.bboxes], 1)
        with torch.no_grad():
            grid = model.roi_head._mask_forward(features, numbered)['mask_preds']
        close(grids[number], grid[torch.arange(len(labels)), labels].sigmoid(), 'masks')
        assert b.masks.any()


def test_pasting_differs_at_edges_only():
    """Why whole masks are not equal, shown on a disc in boxes at fractions of pixels.

    torchvision resizes the 28x28 probabilities into the box rounded to whole pixels, MMDetection
    samples them at the centres of the pixels in the box as it is: edges lie up to a pixel apart.
    """
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 28)] * 2, indexing='ij')
    disc = torch.sigmoid(20 * (0.8 - (x**2 + y**2).sqrt()))
    boxes = torch.tensor([[20.3, 30.6, 120.7, 90.2], [5.5, 6.5, 250.4, 200.5], [100.1, 100.9, 160.5, 180.2]])
    masks = disc[None, None].repeat(3, 1, 1, 1)
    left = paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH))[:, 0] > 0.5
    right = _do_paste_mask(masks, boxes, HEIGHT, WIDTH, skip_empty=False)[0] > 0.5
    differ = left != right
    assert differ.any()
    # Within a pixel of the edge: gone where the larger of the two is shrunk by a pixel all round.
    inner = -torch.nn.functional.max_pool2d(-(left | right).float()[:, None], 3, 1, 1)[:, 0]
    inner = -torch.nn.functional.max_pool2d(-inner[:, None], 3, 1, 1)[:, 0]
    assert not (differ & inner.bool()).any()
    union = (left | right).sum((1, 2))
    assert ((left & right).sum((1, 2)) / union).min() > 0.9


def test_rounded_anchors_are_what_differs(theirs, ours):
    rounded = theirs.rpn.anchor_generator.cell_anchors
    exact = ours.rpn_head.prior_generator.base_anchors
    for a, b in zip(rounded, exact, strict=True):
        assert torch.equal(a.float(), b.round())
    assert max(float((a - b).abs().max()) for a, b in zip(rounded, exact, strict=True)) <= 0.5


# --- There and back ----------------------------------------------------------------------------


def same(left: dict, right: dict) -> None:
    """Bit for bit."""
    assert set(left) == set(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def same_source(left: weights_source.Source, right: weights_source.Source) -> None:
    same(left.tensors, right.tensors)
    same(left.extra, right.extra)
    for name in ('kind', 'classes', 'style', 'mean', 'std', 'rgb', 'notes'):
        assert getattr(left, name) == getattr(right, name), name


def test_source_of_torchvision(source):
    assert source.kind == 'torchvision'
    assert source.classes == COCO_CLASSES
    assert (source.style, source.rgb) == ('pytorch', True)
    assert source.mean == tuple(round(255 * x, 3) for x in (0.485, 0.456, 0.406))
    assert source.std == tuple(round(255 * x, 3) for x in (0.229, 0.224, 0.225))
    assert any('conv1 is unchanged' in note for note in source.notes)


def test_rows_follow_the_names_of_torchvision(theirs, source):
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta['categories']
    predictor = theirs.roi_heads.box_predictor
    fc_cls = source.tensors['roi_head.bbox_head.fc_cls.weight']
    fc_reg = source.tensors['roi_head.bbox_head.fc_reg.bias']
    logits = source.tensors['roi_head.mask_head.conv_logits.weight']
    for row, name in enumerate(COCO_CLASSES):
        slot = names.index(name)
        assert torch.equal(fc_cls[row], predictor.cls_score.weight[slot])
        assert torch.equal(fc_reg[4 * row : 4 * row + 4], predictor.bbox_pred.bias[4 * slot : 4 * slot + 4])
        assert torch.equal(logits[row], theirs.roi_heads.mask_predictor.mask_fcn_logits.weight[slot])
    assert torch.equal(fc_cls[80], predictor.cls_score.weight[0])


def test_back_is_exact_and_loads(theirs, source, tmp_path):
    back = to_torchvision(source.tensors, source.extra)
    same(back, dict(theirs.state_dict()))
    saved = read_source(save(source, tmp_path / 'ours.pth'))
    same_source(saved, source)
    same(to_torchvision(saved.tensors, saved.extra), back)
    torchvision_model().load_state_dict(back)  # strict


def test_back_without_extra_gives_the_same_probabilities(theirs, source):
    back = to_torchvision(source.tensors)
    model = torchvision_model()
    model.load_state_dict(back)
    x = torch.randn(5, 1024, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        left = theirs.roi_heads.box_predictor(x)[0].softmax(1)
        right = model.roi_heads.box_predictor(x)[0].softmax(1)
    torch.testing.assert_close(left[:, [0, *SLOTS]], right[:, [0, *SLOTS]], rtol=0, atol=1e-6)
    assert right[:, UNUSED].max() == 0


def old_names(state: dict) -> dict:
    """As torchvision named them before 0.13, and without BN's counts, like the released file."""
    pairs = [(f'mask_head.{i}.0.', f'mask_head.mask_fcn{i + 1}.') for i in range(4)]
    pairs += [(f'_blocks.{i}.0.', f'_blocks.{i}.') for i in range(4)]
    pairs += [('rpn.head.conv.0.0.', 'rpn.head.conv.')]
    renamed = {}
    for key, value in state.items():
        if key.endswith('num_batches_tracked'):
            continue
        for new, old in pairs:
            key = key.replace(new, old)
        renamed[key] = value
    return renamed


def test_old_names_give_the_same(theirs, source, tmp_path):
    state = old_names(theirs.state_dict())
    assert {
        'rpn.head.conv.weight',
        'backbone.fpn.inner_blocks.0.weight',
        'roi_heads.mask_head.mask_fcn1.weight',
    } <= set(state)
    torch.save(state, tmp_path / 'old.pth')
    old = read_source(tmp_path / 'old.pth')
    assert any('--bn-eps 0' in note for note in old.notes)
    same(old.tensors, {k: v for k, v in source.tensors.items() if not k.endswith('num_batches_tracked')})


@pytest.mark.parametrize('slots', [2, 21, 81])
def test_fine_tuned_models_have_no_holes(slots, tmp_path, source):
    tensors = dict(torchvision_state(slots))
    torch.save({'model': tensors, 'epoch': 3}, tmp_path / 'own.pth')
    own = read_source(tmp_path / 'own.pth')
    head = tensors['roi_heads.box_predictor.cls_score.weight']
    assert torch.equal(own.tensors['roi_head.bbox_head.fc_cls.weight'], torch.cat([head[1:], head[:1]]))
    assert own.classes == (COCO_CLASSES if slots == 81 else None)
    assert any('taken to be' in n for n in own.notes) == (slots == 81)
    same(to_torchvision(own.tensors, own.extra), tensors)


def torchvision_state(slots: int) -> dict:
    """A small model under torchvision's names; conversion looks at names and rows only."""
    generator = torch.Generator().manual_seed(slots)
    state = {}
    for module, shape in (
        ('backbone.body.conv1', (4, 3, 7, 7)),
        ('backbone.fpn.inner_blocks.0.0', (4, 4, 1, 1)),
        ('rpn.head.conv.0.0', (4, 4, 3, 3)),
        ('roi_heads.box_head.fc6', (4, 4)),
        ('roi_heads.box_predictor.cls_score', (slots, 4)),
        ('roi_heads.box_predictor.bbox_pred', (4 * slots, 4)),
        ('roi_heads.mask_predictor.mask_fcn_logits', (slots, 4, 1, 1)),
    ):
        state[f'{module}.weight'] = torch.randn(shape, generator=generator)
        if 'body' not in module:
            state[f'{module}.bias'] = torch.randn(shape[0], generator=generator)
    for name in ('weight', 'bias', 'running_mean'):
        state[f'backbone.body.bn1.{name}'] = torch.randn(4, generator=generator)
    state['backbone.body.bn1.running_var'] = torch.rand(4, generator=generator) + 0.1
    return state


# --- BN's eps ----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def released(theirs, tmp_path_factory) -> Path:
    """As torchvision's released file: old names, frozen BN, some variances almost nothing."""
    state = old_names(theirs.state_dict())
    generator = torch.Generator().manual_seed(7)
    for key in [k for k in state if k.endswith('running_var')]:
        size = state[key].shape
        tiny = 10 ** (torch.rand(size, generator=generator) * 8 - 11)  # 1e-11 .. 1e-3
        chosen = torch.rand(size, generator=generator) < 0.1
        # The weight is as small, as in a channel that has died in training.
        gain = torch.where(chosen, (tiny / state[key]).sqrt(), 1.0)
        weight = key.replace('running_var', 'weight')
        state[weight] = state[weight] * gain
        mean = key.replace('running_var', 'running_mean')
        state[mean] = state[mean] * gain
        state[key] = torch.where(chosen, tiny, state[key])
        conv = weight.replace('.bn', '.conv').replace('downsample.1', 'downsample.0')
        state[conv] = state[conv] * gain.reshape(-1, 1, 1, 1)
        # With the convolution as small as the deviation the output is of order 1 again.
        state[weight] = state[weight] / gain
    folder = tmp_path_factory.mktemp('released')
    torch.save(state, folder / 'new.pth')
    path = folder / f'maskrcnn_resnet50_fpn_coco-{sha256_of(folder / "new.pth")[:8]}.pth'
    (folder / 'new.pth').rename(path)
    return path


def test_eps_of_the_released_file(released, theirs, coco_model, inputs, monkeypatch, tmp_path):
    from torchvision.models.detection._utils import overwrite_eps
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    digest = sha256_of(released)[:8]
    monkeypatch.setattr(torchvision, 'RELEASED_EPS', {digest: 0.0})
    source = read_source(released)
    assert any('eps 0' in n and 'very little variance' in n for n in source.notes)
    frozen = resnet_fpn_backbone(backbone_name='resnet50', weights=None)
    state = torch.load(released, weights_only=True)
    prefix = 'backbone.'
    frozen.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    overwrite_eps(frozen, 0.0)  # what torchvision does after loading its file
    # In fp64, so that what is left is the rounding of the folded numbers alone.
    frozen.eval().double()
    model = coco_model().double()
    x = inputs[0].double()
    with torch.no_grad():
        left = list(frozen(x).values())
        model.load_state_dict(source.tensors, strict=False)
        right = model.extract_feat(x)
        # The same file taken to have eps 1e-5 is another function: the test can tell.
        plain = read_source(released, bn_eps=1e-5)
        model.load_state_dict(plain.tensors, strict=False)
        wrong = model.extract_feat(x)
    for level, (a, b, c) in enumerate(zip(left, right, wrong, strict=True)):
        close(a, b, f'FPN level {level} with eps 0')
        assert float((a - c).abs().max()) > 100 * TOLERANCE
    # A copy under another name is known by its content.
    renamed = tmp_path / 'renamed.pth'
    renamed.write_bytes(released.read_bytes())
    same(read_source(renamed).tensors, source.tensors)
    # Back, bit for bit, through a file.
    saved = read_source(save(source, tmp_path / 'ours.pth'))
    same_source(saved, source)
    back = to_torchvision(saved.tensors, saved.extra)
    same(old_names(back), state)


def test_folded_bn_is_the_same_function_and_comes_back_after_changes():
    source = weights_source.Source(
        Path('x'),
        'torchvision',
        {
            'backbone.bn1.weight': torch.tensor([1.0, 0.5, 2.0, 0.3, 0.1]),
            'backbone.bn1.running_var': torch.tensor([1.0, 1e-3, 1.5e-5, 1e-6, 1e-10]),
        },
    )
    before = {k: v.double() for k, v in source.tensors.items()}
    torchvision.fold_all(source, 0.0)
    after = {k: v.double() for k, v in source.tensors.items()}
    assert (after['backbone.bn1.running_var'] >= 0).all()

    def gain(t: dict, eps: float) -> torch.Tensor:
        return t['backbone.bn1.weight'] / (t['backbone.bn1.running_var'] + eps).sqrt()

    torch.testing.assert_close(gain(after, 1e-5), gain(before, 0.0), rtol=2e-7, atol=0)
    # Fine-tuning has changed two channels since: they are turned back by arithmetic.
    source.tensors['backbone.bn1.weight'][[0, 4]] *= 2
    renamed = {}
    torchvision.unfold_all(renamed, source.tensors, source.extra)
    back = {k.replace('backbone.body', 'backbone'): v.double() for k, v in renamed.items()}
    factor = torch.tensor([2.0, 1, 1, 1, 2], dtype=torch.float64)
    torch.testing.assert_close(gain(back, 0.0), gain(before, 0.0) * factor, rtol=2e-7, atol=0)
    assert torch.equal(back['backbone.bn1.running_var'][1:4], before['backbone.bn1.running_var'][1:4])


def test_eps_is_for_torchvision_only(official_like):
    with pytest.raises(UserError, match='bn_eps is for weights of torchvision'):
        read_source(official_like, bn_eps=0.0)
    with pytest.raises(UserError, match='no small number'):
        read_source(official_like, bn_eps=-1.0)


# --- Detectron2 --------------------------------------------------------------------------------


def detectron2_state() -> dict[str, np.ndarray]:
    """Names and shapes of Detectron2's mask_rcnn_R_50_FPN, written without our table."""
    rng = np.random.default_rng(4)
    state = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        state[f'{name}.weight'] = rng.standard_normal(shape, np.float32)
        if bias:
            state[f'{name}.bias'] = rng.standard_normal(shape[1 if 'deconv' in name else 0], np.float32)

    def conv_bn(name: str, *shape: int) -> None:
        add(name, *shape, bias=False)
        for part in ('weight', 'bias', 'running_mean', 'running_var'):
            state[f'{name}.norm.{part}'] = rng.random(shape[0], np.float32) + 0.1

    up = 'backbone.bottom_up'
    conv_bn(f'{up}.stem.conv1', 64, 3, 7, 7)
    before = 64
    for stage, blocks, width in ((2, 3, 64), (3, 4, 128), (4, 6, 256), (5, 3, 512)):
        for block in range(blocks):
            name = f'{up}.res{stage}.{block}'
            if block == 0:
                conv_bn(f'{name}.shortcut', 4 * width, before, 1, 1)
            conv_bn(f'{name}.conv1', width, before, 1, 1)
            conv_bn(f'{name}.conv2', width, width, 3, 3)
            conv_bn(f'{name}.conv3', 4 * width, width, 1, 1)
            before = 4 * width
        add(f'backbone.fpn_lateral{stage}', 256, before, 1, 1)
        add(f'backbone.fpn_output{stage}', 256, 256, 3, 3)
    add('proposal_generator.rpn_head.conv', 256, 256, 3, 3)
    add('proposal_generator.rpn_head.objectness_logits', 3, 256, 1, 1)
    add('proposal_generator.rpn_head.anchor_deltas', 12, 256, 1, 1)
    for level in range(5):
        state[f'proposal_generator.anchor_generator.cell_anchors.{level}'] = np.zeros((3, 4), np.float32)
    add('roi_heads.box_head.fc1', 1024, 12544)
    add('roi_heads.box_head.fc2', 1024, 1024)
    add('roi_heads.box_predictor.cls_score', 81, 1024)
    add('roi_heads.box_predictor.bbox_pred', 320, 1024)
    for i in range(4):
        add(f'roi_heads.mask_head.mask_fcn{i + 1}', 256, 256, 3, 3)
    add('roi_heads.mask_head.deconv', 256, 256, 2, 2)
    add('roi_heads.mask_head.predictor', 80, 256, 1, 1)
    return state


@pytest.fixture(scope='module')
def arrays() -> dict[str, np.ndarray]:
    return detectron2_state()


@pytest.fixture(scope='module')
def model_final(arrays, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('detectron2') / 'model_final_f10217.pkl'
    path.write_bytes(pickle.dumps({'model': arrays, '__author__': 'Detectron2 Model Zoo'}, protocol=2))
    return path


def test_detectron2_fills_every_tensor(model_final, arrays, coco_model):
    source = read_source(model_final)
    target = {k: v for k, v in coco_model().state_dict().items() if not k.endswith('num_batches_tracked')}
    assert {k: v.shape for k, v in source.tensors.items()} == {k: v.shape for k, v in target.items()}
    assert source.kind == 'detectron2'
    assert source.classes == COCO_CLASSES
    assert (source.style, source.rgb, source.std) == ('caffe', False, (1.0, 1.0, 1.0))
    assert source.mean == (103.53, 116.28, 123.675)
    for ours, theirs in (
        ('backbone.bn1.running_var', 'backbone.bottom_up.stem.conv1.norm.running_var'),
        ('backbone.layer3.5.conv2.weight', 'backbone.bottom_up.res4.5.conv2.weight'),
        ('backbone.layer1.0.downsample.1.bias', 'backbone.bottom_up.res2.0.shortcut.norm.bias'),
        ('neck.lateral_convs.3.conv.weight', 'backbone.fpn_lateral5.weight'),
        ('neck.fpn_convs.0.conv.bias', 'backbone.fpn_output2.bias'),
        ('rpn_head.rpn_reg.weight', 'proposal_generator.rpn_head.anchor_deltas.weight'),
        ('roi_head.bbox_head.shared_fcs.1.bias', 'roi_heads.box_head.fc2.bias'),
        ('roi_head.bbox_head.fc_cls.weight', 'roi_heads.box_predictor.cls_score.weight'),
        ('roi_head.mask_head.convs.3.conv.bias', 'roi_heads.mask_head.mask_fcn4.bias'),
    ):
        assert torch.equal(source.tensors[ours], torch.from_numpy(arrays[theirs])), ours


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


def small(state: dict, width: int = 2) -> dict:
    """The same names with small tensors; rows by class stay."""
    return {
        k: torch.as_tensor(v)[(slice(None), *[slice(0, width)] * (v.ndim - 1))].clone()
        if 'predictor' in k
        else torch.as_tensor(v).flatten()[:width].clone()
        for k, v in state.items()
    }


def test_detectron2_as_torch_file_and_safetensors(arrays, tmp_path):
    from safetensors.torch import save_file

    state = small(arrays)
    state['pixel_mean'] = torch.tensor([123.675, 116.28, 103.53]).reshape(3, 1, 1)
    state['pixel_std'] = torch.tensor([58.395, 57.12, 57.375]).reshape(3, 1, 1)
    torch.save({'model': state, 'iteration': 1, 'optimizer': {}}, tmp_path / 'model_final.pth')
    save_file(state, tmp_path / 'model.safetensors')
    for name in ('model_final.pth', 'model.safetensors'):
        source = read_source(tmp_path / name)
        # What the file tells comes before the zoo's habits.
        assert (source.style, source.rgb) == ('pytorch', True)
        assert source.mean == (123.675, 116.28, 103.53)
        assert any('pixel_mean' in n for n in source.notes)
        assert not any('anchor' in k or 'pixel' in k for k in source.tensors)


def test_safetensors_of_the_other_names(source, official_like, tmp_path):
    from safetensors.torch import save_file

    official = torch.load(official_like, weights_only=True)['state_dict']
    save_file(torchvision_state(91), tmp_path / 'tv.safetensors')
    save_file(official, tmp_path / 'mmdet.safetensors')
    assert read_source(tmp_path / 'tv.safetensors').kind == 'torchvision'
    mmdet = read_source(tmp_path / 'mmdet.safetensors')
    assert mmdet.kind == 'mmdet'
    same(mmdet.tensors, official)
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'mmdet.safetensors').read_bytes()[:-100])
    with pytest.raises(UserError, match='truncated or no safetensors file'):
        read_source(tmp_path / 'cut.safetensors')


# --- MMDetection's own -------------------------------------------------------------------------


def mmdet_state(classes: int = 80) -> dict:
    converted = {}
    for key, value in torchvision_state(classes + 1).items():
        for theirs, ours in torchvision.NAMES.items():
            if key.startswith(theirs):
                converted[ours + key[len(theirs) :]] = value
                break
    drop = {'roi_head.bbox_head.fc_reg.': 4, 'roi_head.mask_head.conv_logits.': 1}
    for prefix, rows in drop.items():
        for end in ('weight', 'bias'):
            converted[prefix + end] = converted[prefix + end][rows:].clone()
    return converted


CONFIG_2X = """
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(type='MaskRCNN', backbone=dict(type='ResNet', depth=50, style='caffe'))
"""
CONFIG_3X = """
model = dict(
    backbone=dict(depth=50, style='pytorch', type='ResNet'),
    data_preprocessor=dict(bgr_to_rgb=True, mean=[123.675, 116.28, 103.53],
                           std=[58.395, 57.12, 57.375], type='DetDataPreprocessor'))
"""


def test_official_file_passes_unchanged(official_like):
    source = read_source(official_like)
    assert source.kind == 'mmdet'
    same(source.tensors, torch.load(official_like, weights_only=True)['state_dict'])
    # Its meta names two classes, which cannot be those of 80 rows.
    assert source.classes == COCO_CLASSES
    assert any('names 2 classes' in n for n in source.notes)
    assert (source.style, source.mean) == (None, None)


@pytest.mark.parametrize(
    ('key', 'text', 'expected'),
    [
        ('config', CONFIG_2X, ('caffe', (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), False)),
        ('cfg', CONFIG_3X, ('pytorch', sources.RGB_MEAN, sources.RGB_STD, True)),
        ('cfg', 'not ( python', (None, None, None, None)),
        ('cfg', "backbone=dict(depth=50, style=open('x'))", (None, None, None, None)),
    ],
)
def test_config_in_the_file_tells_the_normalisation(key, text, expected, tmp_path):
    path = tmp_path / 'epoch_1.pth'
    torch.save(
        {
            'meta': {key: text, 'dataset_meta': {'classes': ('a', 'b', 'c')}},
            'state_dict': mmdet_state(3),
            'optimizer': {'state': {}},
            'message_hub': {},
        },
        path,
    )
    source = read_source(path)
    assert (source.style, source.mean, source.std, source.rgb) == expected
    assert (source.kind, source.classes) == ('mmdet run', ('a', 'b', 'c'))
    same_source(read_source(save(source, tmp_path / 'again.pth')), source)


def test_caffe_in_the_name(tmp_path):
    path = tmp_path / 'mask_rcnn_r50_caffe_fpn_1x.pth'
    torch.save({'state_dict': mmdet_state()}, path)
    source = read_source(path)
    assert (source.style, source.classes) == ('caffe', COCO_CLASSES)
    with pytest.raises(UserError, match='cannot become a torchvision model'):
        convert_file(path, tmp_path / 'tv.pth', 'torchvision')
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_backbone_passes_unchanged(tmp_path):
    from torchvision.models import resnet18

    path = tmp_path / 'resnet.pth'
    state = resnet18().state_dict()
    torch.save(state, path)
    source = read_source(path)
    assert (source.kind, source.classes, source.style) == ('backbone', None, 'pytorch')
    same(source.tensors, dict(state))
    same_source(read_source(save(source, tmp_path / 'again.pth')), source)


@pytest.mark.parametrize(
    ('dtype', 'note'),
    [
        (torch.float16, 'float16 tensors were widened'),
        (torch.bfloat16, 'bfloat16 tensors were widened'),
        (torch.float64, 'float64 tensors were rounded'),
    ],
)
def test_other_precision_and_wrapper(dtype, note, tmp_path):
    state = mmdet_state(3)
    torch.save({'state_dict': {f'module.{k}': v.to(dtype) for k, v in state.items()}}, tmp_path / 'x.pth')
    source = read_source(tmp_path / 'x.pth')
    assert set(source.tensors) == set(state)
    assert {t.dtype for t in source.tensors.values()} == {torch.float32}
    assert any(note in n for n in source.notes)
    assert any("'module.'" in n for n in source.notes)
    assert source.classes is None


# --- Bad input ---------------------------------------------------------------------------------


def nan_state() -> dict:
    state = mmdet_state(3)
    state['rpn_head.rpn_conv.weight'][0, 0, 0, :2] = float('nan')
    state['roi_head.bbox_head.fc_cls.bias'][1] = float('inf')
    return state


def with_keys(*keys: str) -> dict:
    return mmdet_state(3) | {k: torch.zeros(1) for k in keys}


def only(*keys: str) -> dict:
    return {k: torch.zeros(1) for k in keys}


def without(state: dict, *parts: str) -> dict:
    return {k: v for k, v in state.items() if not any(p in k for p in parts)}


BAD = {
    'empty': ({'state_dict': {}}, 'empty state dict'),
    'empty dict': ({}, 'empty state dict'),
    'optimizer': ({'optimizer': {'state': {}, 'param_groups': []}}, 'state of an optimizer'),
    'optimizer bare': ({'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': []}, 'state of an optimizer'),
    'no tensors': ({'epoch': 3, 'note': 'x'}, 'holds no weights'),
    'nan': (
        nan_state(),
        'NaN or infinite weights in 2 tensors:\n  - rpn_head.rpn_conv.weight: '
        '2 of 144 numbers\n  - roi_head.bbox_head.fc_cls.bias: 1 of 4',
    ),
    'r101': (with_keys('backbone.layer3.22.conv1.weight'), 'ResNet-101'),
    'r101 detectron2': (only('backbone.bottom_up.res4.22.conv1.weight'), 'ResNet-101'),
    'c4': (with_keys('roi_head.shared_head.layer4.0.conv1.weight'), 'C4'),
    'c4 detectron2': (
        only(
            'backbone.res4.0.conv1.weight', 'roi_heads.res5.0.conv1.weight', 'proposal_generator.rpn_head.conv.weight'
        ),
        'C4',
    ),
    'no fpn': (without(mmdet_state(3), 'neck'), 'without an FPN'),
    'no masks': (without(mmdet_state(3), 'mask_head'), 'without masks'),
    'no masks torchvision': (without(torchvision_state(91), 'mask'), 'without masks'),
    'cascade': (with_keys('roi_head.bbox_head.0.fc_cls.weight'), 'Cascade'),
    'v2': (torchvision_state(91) | only('rpn.head.conv.1.0.weight'), r'second version \(v2\)'),
    'retinanet': (only('backbone.conv1.weight', 'neck.x', 'bbox_head.retina_cls.weight'), 'RetinaNet'),
    'retinanet torchvision': (
        only('backbone.body.conv1.weight', 'head.classification_head.cls_logits.weight'),
        'RetinaNet',
    ),
    'detr': (only('transformer.encoder.layers.0.linear1.weight', 'class_embed.weight'), 'DETR-like'),
    'detr mmdet': (
        only('backbone.conv1.weight', 'encoder.layers.0.ffn.weight', 'bbox_head.fc_cls.weight'),
        'DETR-like',
    ),
    'yolo': (only('model.0.conv.weight', 'model.22.cv2.0.0.conv.weight'), 'YOLO-like'),
    'one stage': (only('backbone.conv1.weight', 'bbox_head.conv_cls.weight'), 'one-stage'),
    'mmdet 1.x': (only('backbone.conv1.weight', 'bbox_head.fc_cls.weight'), '1.x'),
    'other': (
        only('embed.weight', 'lm_head.weight'),
        'not a Mask R-CNN: its keys begin with embed.weight, lm_head.weight',
    ),
    'unknown key': (
        torchvision_state(91) | only('backbone.fpn.more.weight'),
        'no plain Mask R-CNN R50-FPN:\n  - backbone.fpn.more.weight',
    ),
    'missing head': (without(torchvision_state(91), 'cls_score.bias'), 'roi_head.bbox_head.fc_cls.bias is not there'),
    'heads disagree': (
        torchvision_state(91) | {'roi_heads.box_predictor.bbox_pred.weight': torch.zeros(8, 4)},
        'do not agree on 91',
    ),
    'sparse': (mmdet_state(3) | {'x': torch.zeros(3).to_sparse()}, 'sparse'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_contents_have_their_own_message(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / 'bad.pth'
    torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        read_source(path)
    assert str(path) in str(caught.value)
    assert caught.value.cure


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('x.pth', b'<!DOCTYPE html><html>login</html>', 'a web page'),
        ('x.pkl', b'version https://git-lfs.github.com/spec/v1\noid', 'a Git LFS pointer'),
        ('x.pth', b'', 'is empty'),
        ('x.pth', b'PK\x03\x04' + bytes(500), 'truncated or no weights file'),
        ('x-0123abcd.pth', b'PK\x03\x04' + bytes(500), 'is damaged'),
        ('x.pkl', b'\x80\x04junk', 'truncated or no pickle of arrays'),
        ('x.pkl', pickle.dumps([1, 2]), 'holds a list'),
        ('x.pkl', pickle.dumps({'model': {}}), 'empty state dict'),
        ('x.pkl', pickle.dumps({'blobs': {'conv1_w': np.zeros(2)}}), 'holds no weights'),
    ],
)
def test_bad_files_have_their_own_message(name, data, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_source(path)


def test_truncated_files(model_final, their_file, tmp_path):
    for whole in (model_final, their_file):
        path = tmp_path / f'cut{whole.suffix}'
        with whole.open('rb') as file:
            path.write_bytes(file.read(whole.stat().st_size // 2))
        with pytest.raises(UserError, match='truncated'):
            read_source(path)


class Evil:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


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
    with pytest.raises(UserError, match='is refused: it is a pickle that would run') as caught:
        read_source(path)
    assert culprit in str(caught.value)
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
    with pytest.raises(UserError, match='would run pathlib|not of numbers'):
        read_source(path)


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
    with pytest.raises(UserError, match='truncated or no pickle of arrays'):
        read_source(path)


# --- Writing and the tool ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('there.pth', 'exists and is not overwritten'),
        ('folder', 'exists'),
        ('x.pkl', 'must end in .pth'),
        ('x-0123abcd.pth', 'ends in a hash'),
    ],
)
def test_targets_that_are_refused(name, message, tmp_path):
    (tmp_path / 'there.pth').write_text('precious')
    (tmp_path / 'folder').mkdir()
    torch.save(mmdet_state(3), tmp_path / 'src.pth')
    with pytest.raises(UserError, match=message):
        convert_file(tmp_path / 'src.pth', tmp_path / name)
    assert (tmp_path / 'there.pth').read_text() == 'precious'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'src.pth', 'there.pth']


def test_to_torchvision_names_what_does_not_fit():
    state = mmdet_state(3)
    with pytest.raises(UserError, match='do not fit a torchvision') as caught:
        to_torchvision(without(state, 'conv_logits.bias') | only('roi_head.mask_iou_head.x'))
    assert caught.value.problems == ['roi_head.mask_iou_head.x', 'roi_head.mask_head.conv_logits.bias is not there']
    with pytest.raises(UserError, match='rows'):
        to_torchvision(state | {'roi_head.bbox_head.fc_reg.weight': torch.zeros(4, 4)})
    with pytest.raises(UserError, match='slots are for 80'):
        to_torchvision(state, coco_slots=True)


def test_own_80_classes_get_no_holes(tmp_path):
    names = tuple(f'class {i}' for i in range(80))
    torch.save({'meta': {'dataset_meta': {'classes': names}}, 'state_dict': mmdet_state()}, tmp_path / 'own.pth')
    convert_file(tmp_path / 'own.pth', tmp_path / 'tv.pth', 'torchvision')
    state = torch.load(tmp_path / 'tv.pth', weights_only=True)
    assert len(state['roi_heads.box_predictor.cls_score.bias']) == 81


def test_tool(tmp_path):
    state = torchvision_state(91)
    torch.save(state, tmp_path / 'tv.pth')

    def tool(*args: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / 'tools/convert_weights.py'), *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    done = tool('tv.pth', 'ours.pth', '--bn-eps', '0')
    assert done.returncode == 0, done.stderr
    for expected in (
        'kind:          torchvision',
        '80: person, bicycle, car, …',
        'pytorch',
        'RGB, mean [123.675',
        'eps 0',
    ):
        assert expected in done.stdout
    assert done.stdout.splitlines()[-1] == 'Written: ours.pth'
    again = tool('tv.pth', 'ours.pth')
    assert again.returncode == 2
    assert again.stderr.startswith('error: ours.pth exists and is not overwritten')
    back = tool('ours.pth', 'back.pth', '--to', 'torchvision')
    assert back.returncode == 0, back.stderr
    assert 'overwrite_eps(model, 0)' in back.stdout
    same(torch.load(tmp_path / 'back.pth', weights_only=True), state)
