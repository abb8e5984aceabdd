"""torchvision's weights give the same function under MMDetection's names, and come back bit for bit."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfinetune.utils.files import sha256_of
from mmfinetune.weights.origins import torchvision
from mmfinetune.weights.origins.torchvision import to_torchvision
from mmfinetune.weights.publish import save
from mmfinetune.weights.source import Source
from mmfinetune.weights.sources import open_source
from tests.builders.classes import COCO_CLASSES
from tests.builders.errors import codes, refused
from tests.builders.weights import mmdet_state, only, same, same_source, torchvision_state, without

HEIGHT, WIDTH = 256, 320
LEVELS = 5
TOLERANCE = 1e-4
# Slots of torchvision in the order of MMDetection's rows, from torchvision's own list of names.
UNUSED = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
SLOTS = [i for i in range(1, 91) if i not in UNUSED]


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
    return open_source(their_file)


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


def test_source_of_torchvision(source):
    assert source.origin == 'torchvision'
    assert source.classes == COCO_CLASSES
    assert (source.style, source.rgb) == ('pytorch', True)
    assert source.mean == tuple(round(255 * x, 3) for x in (0.485, 0.456, 0.406))
    assert source.std == tuple(round(255 * x, 3) for x in (0.229, 0.224, 0.225))
    assert codes(source.notes) == ['weights-slots-to-classes', 'weights-same-normalisation', 'weights-roi-align']


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
    saved = open_source(save(source, tmp_path / 'ours.pth'))
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
    old = open_source(tmp_path / 'old.pth')
    assert 'weights-eps-assumed' in codes(old.notes)
    same(old.tensors, {k: v for k, v in source.tensors.items() if not k.endswith('num_batches_tracked')})


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('slots', torch.arange(80)),
        ('slots', torch.ones(80, dtype=torch.int64)),
        ('slots', torch.arange(1.0, 81)),
        ('slots', torch.zeros(0, dtype=torch.int64)),
        ('slots', torch.tensor(5)),
        ('slots', torch.arange(1 << 40, (1 << 40) + 80)),
        ('roi_heads.box_predictor.cls_score.weight', torch.zeros(4)),
    ],
)
def test_what_was_kept_of_other_heads_is_refused(source, name, value):
    assert name in source.extra
    with refused('torchvision-extra', name=name, shape=tuple(value.shape)):
        to_torchvision(source.tensors, {**source.extra, name: value})


def test_what_was_kept_is_tensors(source, tmp_path):
    path = save(source, tmp_path / 'ours.pth')
    file = torch.load(path, weights_only=True)
    file['extra']['slots'] = 5
    torch.save(file, path)
    with refused('weights-record'):
        open_source(path)


@pytest.mark.parametrize('slots', [2, 21, 81])
def test_fine_tuned_models_have_no_holes(slots, tmp_path, source):
    tensors = dict(torchvision_state(slots))
    torch.save({'model': tensors, 'epoch': 3}, tmp_path / 'own.pth')
    own = open_source(tmp_path / 'own.pth')
    head = tensors['roi_heads.box_predictor.cls_score.weight']
    assert torch.equal(own.tensors['roi_head.bbox_head.fc_cls.weight'], torch.cat([head[1:], head[:1]]))
    assert own.classes == (COCO_CLASSES if slots == 81 else None)
    assert ('weights-coco-assumed' in codes(own.notes)) == (slots == 81)
    same(to_torchvision(own.tensors, own.extra), tensors)


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
    source = open_source(released)
    [note] = [n for n in source.notes if n.code == 'weights-eps-folded']
    assert note.facts['eps'] == 0 and note.facts['channels'] > 0
    frozen = resnet_fpn_backbone(backbone_name='resnet50', weights=None)
    state = torch.load(released, weights_only=True)
    prefix = 'backbone.'
    frozen.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    overwrite_eps(frozen, 0.0)  # what torchvision does after loading its file
    # In fp64, so that what is left is the rounding of the folded numbers alone.
    frozen.eval().double()
    model = coco_model().double()
    x = inputs[0][:1, :, :128, :160].double()
    with torch.no_grad():
        left = list(frozen(x).values())
        model.load_state_dict(source.tensors, strict=False)
        right = model.extract_feat(x)
        # The same file taken to have eps 1e-5 is another function: the test can tell.
        plain = open_source(released, bn_eps=1e-5)
        model.load_state_dict(plain.tensors, strict=False)
        wrong = model.extract_feat(x)
    for level, (a, b, c) in enumerate(zip(left, right, wrong, strict=True)):
        close(a, b, f'FPN level {level} with eps 0')
        assert float((a - c).abs().max()) > 100 * TOLERANCE
    # A copy under another name is known by its content.
    renamed = tmp_path / 'renamed.pth'
    renamed.write_bytes(released.read_bytes())
    same(open_source(renamed).tensors, source.tensors)
    # Back, bit for bit, through a file.
    saved = open_source(save(source, tmp_path / 'ours.pth'))
    same_source(saved, source)
    back = to_torchvision(saved.tensors, saved.extra)
    same(old_names(back), state)


def test_folded_bn_is_the_same_function_and_comes_back_after_changes():
    source = Source(
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
    with refused('weights-eps-origin', origin='mmdet'):
        open_source(official_like, bn_eps=0.0)
    with refused('weights-eps', eps=-1.0):
        open_source(official_like, bn_eps=-1.0)


def test_to_torchvision_names_what_does_not_fit():
    state = mmdet_state(3)
    with refused('torchvision-other-model') as caught:
        to_torchvision(without(state, 'conv_logits.bias') | only('roi_head.mask_iou_head.x'))
    found = [(problem.code, problem.facts['key']) for problem in caught.value.problems]
    assert found == [
        ('torchvision-no-place', 'roi_head.mask_iou_head.x'),
        ('torchvision-head-missing', 'roi_head.mask_head.conv_logits.bias'),
    ]
    with refused('torchvision-rows', rows=4, expected=12):
        to_torchvision(state | {'roi_head.bbox_head.fc_reg.weight': torch.zeros(4, 4)})
    with refused('torchvision-slots', classes=3, slots=80):
        to_torchvision(state, coco_slots=True)
