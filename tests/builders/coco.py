"""A small COCO data set in memory, to be changed and then written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


class CocoData:
    """Three images of 40x30: one with an object, one with a crowd region only, one with nothing."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / 'instances.json'
        self.images = [
            {'id': i, 'file_name': f'{i}.{kind}', 'width': 40, 'height': 30}
            for i, kind in ((1, 'jpg'), (2, 'png'), (3, 'jpg'))
        ]
        self.annotations = [self.annotation(1, 1, 1), self.annotation(2, 1, 5), self.annotation(3, 2, 1, iscrowd=1)]
        self.categories = [{'id': 1, 'name': 'cat'}, {'id': 5, 'name': 'dog'}]
        for image in self.images:
            self.draw(image['file_name'])

    @staticmethod
    def annotation(number: int, image: int, category: int, iscrowd: int = 0) -> dict:
        return {
            'id': number,
            'image_id': image,
            'category_id': category,
            'iscrowd': iscrowd,
            'bbox': [1, 1, 5, 5],
            'area': 25,
            'segmentation': [[1, 1, 6, 1, 6, 6]],
        }

    def draw(self, name: str, size: tuple[int, int] = (40, 30)) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(self.root / name)
        return self.root / name

    def write(self) -> None:
        self.path.write_text(
            json.dumps({'images': self.images, 'annotations': self.annotations, 'categories': self.categories})
        )
