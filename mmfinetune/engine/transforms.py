"""Data transforms."""

from __future__ import annotations

from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS

from mmfinetune.utils.errors import UserError


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """``LoadImageFromFile`` that names the file when an image is missing or does not decode.

    Raises:
        UserError: With the path and the cure.
    """

    def transform(self, results: dict) -> dict | None:
        try:
            loaded = super().transform(results)
            if loaded is not None and loaded['img'] is None:
                raise ValueError('not an image')
        except Exception as error:
            # OpenCV, Pillow and the file backends raise whatever they like here.
            raise UserError(
                'image-unreadable-in-training',
                'Cannot read the image {path}: {why}',
                hint='replace it by a good copy, or remove the image from the annotation file '
                '(`python tools/prepare_voc.py --skip-bad` does it for VOC)',
                path=results.get('img_path'),
                why=str(error) or type(error).__name__,
            ) from None
        return loaded
