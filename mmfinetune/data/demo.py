"""The seeded synthetic data of the demo: coloured shapes on noise, in PASCAL VOC's own layout.

A class is one of 10 shapes in one of 8 colours, so 80 in all: one for each COCO class. A VOC class
looks like its COCO twin (``aeroplane`` like ``airplane``), as it does in the real data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from mmfinetune.data.classes import VOC_CLASSES
from mmfinetune.data.layout import Prepared
from mmfinetune.utils import console
from mmfinetune.utils.files import atomic_write_json, atomic_write_text
from mmfinetune.utils.masks import mask_to_rle

SIZE = 224
VOID = 255
# Red, orange, yellow, green, cyan, blue, magenta, white.
_HEX = ('d62d2d', 'f08c1e', 'e6e13c', '3cb446', '46d7dc', '3755dc', 'cd41cd', 'f5f5f5')
COLOURS = np.array([tuple(bytes.fromhex(colour)) for colour in _HEX], np.float32)

# Position of each VOC class in COCO's list, by which it looks like its COCO twin.
VOC_LOOKS = (4, 1, 14, 8, 39, 5, 2, 15, 56, 19, 60, 16, 17, 3, 0, 58, 18, 57, 6, 62)


def _circle(radius: float, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([np.cos(t) * radius + centre[0], np.sin(t) * radius + centre[1]], 1)


def _star() -> np.ndarray:
    t = np.arange(10) * np.pi / 5
    return np.stack([np.cos(t), np.sin(t)], 1) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], 1) / 17


def _poly(*xy: tuple[float, float]) -> np.ndarray:
    return np.array(xy, float)


def _plus() -> np.ndarray:
    near, far = 0.3, 1.0
    arm = [(-near, -far), (near, -far), (near, -near)]
    corners = []
    for _ in range(4):
        corners += arm
        arm = [(-y, x) for x, y in arm]
    return _poly(*corners)


# Each shape: (outline, hole or None) in a unit circle.
SHAPES: tuple[tuple[np.ndarray, np.ndarray | None], ...] = (
    (_circle(0.85), None),
    (_poly((-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)), None),
    (_poly((0, -1), (0.87, 0.5), (-0.87, 0.5)), None),
    (_star(), None),
    (_plus(), None),
    (_circle(0.95), _circle(0.5)),
    (_circle(0.95), _circle(0.8, (0.55, 0.0))),
    (_heart(), None),
    (_poly((1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28), (-1, -0.28), (0.1, -0.28), (0.1, -0.75)), None),
    (_poly((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)), None),
)


def look(coco_index: int) -> tuple[int, int]:
    """Shape and colour index of a COCO class; no two of the 80 share both."""
    shape, turn = coco_index % len(SHAPES), coco_index // len(SHAPES)
    return shape, (3 * turn + shape) % len(COLOURS)


def render_scene(
    rng: np.random.Generator, coco_indices: Sequence[int], size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Draw objects of the given classes on a noise background.

    Args:
        rng: Source of all randomness.
        coco_indices: Class of each object, back to front.
        size: Side of the square image in pixels.

    Returns:
        The RGB image, uint8 (size, size, 3), and the object index of each pixel, uint8
        (size, size): 0 is background, k the k-th object.
    """
    coarse = rng.uniform(40, 190, (5, 5, 3)).astype(np.float32)
    coarse = 0.35 * coarse + 0.65 * coarse.mean(2, keepdims=True)
    image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    image += rng.normal(0, 14, (size, size, 1)).astype(np.float32)
    objects = np.zeros((size, size), np.uint8)
    centres: list[tuple[float, float, float]] = []
    for k, index in enumerate(coco_indices, 1):
        shape, colour = look(index)
        radius = rng.uniform(22, 48) * size / SIZE
        for _ in range(30):
            cx, cy = rng.uniform(0.7 * radius, size - 0.7 * radius, 2)
            if all(np.hypot(cx - x, cy - y) > 0.8 * (radius + r) for x, y, r in centres):
                break
        centres.append((cx, cy, radius))
        angle = rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        scale = radius * np.array([1.0, rng.uniform(0.85, 1.0)])
        mask = np.zeros((size, size), np.uint8)
        for outline, value in zip(SHAPES[shape], (1, 0), strict=True):
            if outline is not None:
                points = (outline * scale) @ turn.T + (cx, cy)
                cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], value, shift=4)
        mask = mask.astype(bool)
        paint = COLOURS[colour] * rng.uniform(0.82, 1.05) + rng.normal(0, 8, 3)
        texture = rng.normal(0, 10, (int(mask.sum()), 1))
        image[mask] = paint + texture
        objects[mask] = k
    return np.clip(image, 0, 255).astype(np.uint8), objects


def _scene(seed: Sequence[int], pool: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """A scene of 2 to 4 objects; a scene in which one is almost hidden is drawn again."""
    rng = np.random.default_rng(list(seed))
    while True:
        picks = [int(i) for i in rng.choice(len(pool), int(rng.integers(2, 5)))]
        image, objects = render_scene(rng, [pool[i] for i in picks])
        if all((objects == k).sum() >= 200 for k in range(1, len(picks) + 1)):
            return image, objects, picks


def _scenes(
    counts: tuple[int, int], seed: tuple[int, int], pool: Sequence[int], title: str, progress: bool
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray, list[int]]]:
    """Split, number, image, object indices and classes of all scenes, `counts` of train and val."""
    with console.bar(total=sum(counts), desc=title, unit='img', wanted=progress) as bar:
        for part, (split, count) in enumerate(zip(('train', 'val'), counts, strict=True)):
            for i in range(count):
                yield split, i, *_scene((*seed, part, i), pool)
                bar.update()


def _borders(objects: np.ndarray) -> np.ndarray:
    """Pixels of either side of an object's outline, which VOC marks as void."""
    edge = np.zeros(objects.shape, bool)
    edge[:-1] |= objects[1:] != objects[:-1]
    edge[:, :-1] |= objects[:, 1:] != objects[:, :-1]
    return edge


def _palette() -> list[int]:
    """VOC's colour map: three bits of the index at a time go to R, G and B, high bits first."""
    return [
        sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def _xml(name: str, objects: np.ndarray, names: Sequence[str]) -> str:
    rows = [
        f'<annotation><folder>VOC2012</folder><filename>{name}.jpg</filename>',
        f'<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>',
        '<segmented>1</segmented>',
    ]
    for k, label in enumerate(names, 1):
        ys, xs = np.nonzero(objects == k)
        x1, y1, x2, y2 = xs.min(), ys.min(), xs.max(), ys.max()
        cut = int(x1 == 0 or y1 == 0 or x2 == SIZE - 1 or y2 == SIZE - 1)
        # VOC counts pixels from 1.
        rows.append(
            f'<object><name>{label}</name><truncated>{cut}</truncated>'
            f'<difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>'
            f'<xmax>{x2 + 1}</xmax><ymax>{y2 + 1}</ymax></bndbox></object>'
        )
    return '\n'.join(rows) + '\n</annotation>\n'


def make_voc(root: Path, num_train: int = 240, num_val: int = 100, seed: int = 0, progress: bool = True) -> Path:
    """Write the demo set in VOC devkit layout with the 20 VOC class names.

    Args:
        root: Folder that gets ``VOCdevkit/VOC2012``.
        num_train: Number of training images.
        num_val: Number of held-out images.
        seed: Same seed, same files.
        progress: Whether to show a progress bar.

    Returns:
        The ``VOC2012`` folder.
    """
    devkit = Path(root) / 'VOCdevkit' / 'VOC2012'
    places = ('JPEGImages', 'SegmentationObject', 'SegmentationClass', 'Annotations', 'ImageSets/Segmentation')
    folders = {place: devkit / place for place in places}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    palette = _palette()
    names: dict[str, list[str]] = {'train': [], 'val': []}
    counts = (num_train, num_val)
    for split, i, image, objects, picks in _scenes(counts, (seed, 20), VOC_LOOKS, 'Drawing the demo images', progress):
        name = f'demo_{split}_{i:04d}'
        void = _borders(objects)
        classes = np.zeros_like(objects)
        for k, pick in enumerate(picks, 1):
            classes[objects == k] = pick + 1
        Image.fromarray(image).save(folders['JPEGImages'] / f'{name}.jpg', quality=92)
        for kind, labels in (('SegmentationObject', objects), ('SegmentationClass', classes)):
            png = Image.fromarray(np.where(void, VOID, labels).astype(np.uint8), 'P')
            png.putpalette(palette)
            png.save(folders[kind] / f'{name}.png')
        xml = _xml(name, objects, [VOC_CLASSES[pick] for pick in picks])
        (folders['Annotations'] / f'{name}.xml').write_text(xml)
        names[split].append(name)
    for split, listed in names.items():
        atomic_write_text(folders['ImageSets/Segmentation'] / f'{split}.txt', '\n'.join(listed) + '\n')
    return devkit


def make_coco(root: Path, num_train: int = 6000, num_val: int = 200, seed: int = 0, progress: bool = True) -> Path:
    """Write the 80-class set on which the bundled demo weights were trained.

    Args:
        root: Folder that gets ``images/`` and ``annotations/instances_{train,val}.json``.
        num_train: Training images.
        num_val: Validation images.
        seed: Same seed, same files; never the scenes of :func:`make_voc`.
        progress: Show a progress bar.

    Returns:
        ``root``.
    """
    from mmdet.datasets import CocoDataset

    root = Path(root)
    (root / 'images').mkdir(parents=True, exist_ok=True)
    (root / 'annotations').mkdir(exist_ok=True)
    categories = [{'id': i, 'name': c} for i, c in enumerate(CocoDataset.METAINFO['classes'], 1)]
    contents: dict[str, dict[str, list]] = {
        split: {'images': [], 'annotations': [], 'categories': categories} for split in ('train', 'val')
    }
    counts, pool = (num_train, num_val), range(len(categories))
    for split, i, image, objects, picks in _scenes(counts, (seed, 80), pool, 'Drawing the 80-class images', progress):
        file_name = f'{split}_{i:05d}.jpg'
        Image.fromarray(image).save(root / 'images' / file_name, quality=92)
        contents[split]['images'].append({'id': i + 1, 'file_name': file_name, 'width': SIZE, 'height': SIZE})
        annotations = contents[split]['annotations']
        for k, pick in enumerate(picks, 1):
            rle = mask_to_rle(objects == k)
            annotation = {'id': len(annotations) + 1, 'image_id': i + 1, 'category_id': pick + 1, 'iscrowd': 0}
            shape = {'area': int(mask_api.area(rle)), 'bbox': mask_api.toBbox(rle).tolist(), 'segmentation': rle}
            annotations.append({**annotation, **shape})
    for split, content in contents.items():
        atomic_write_json(Prepared(root).annotation(split), content)
    return root


MAKERS: dict[str, Callable[..., Path]] = {'voc': make_voc, 'coco': make_coco}
