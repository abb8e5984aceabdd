"""The PASCAL VOC 2012 devkit: where it is, and how to get it."""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePosixPath

from mmfinetune.utils.download import download, unpack_tar
from mmfinetune.utils.errors import UserError

VOC_URL = 'http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar'
VOC_MD5 = '6cd6e144f989b92b3379bac3b3de84fd'
VOC_SIZE = 1_999_639_040  # bytes


def find_devkit(root: str | Path) -> Path:
    """The `VOC2012` folder in or at `root`.

    Args:
        root: The folder that holds `VOCdevkit/VOC2012`, or `VOCdevkit`, or `VOC2012` itself.

    Raises:
        UserError: There is none.
    """
    root = Path(root)
    candidates = (root / 'VOCdevkit' / 'VOC2012', root / 'VOC2012', root)
    for folder in candidates:
        if any((folder / name).is_dir() for name in ('JPEGImages', 'SegmentationObject')):
            return folder
    raise UserError('voc-missing', problems=map(str, candidates), path=root, url=VOC_URL)


def download_voc(root: str | Path, url: str = VOC_URL, progress: bool = True) -> Path:
    """Download, verify and unpack the official archive; returns the `VOC2012` folder.

    A devkit already in `root` is left alone. The archive (2.0 GB) stays in `root`, and one put
    there by hand is used. The next call resumes an interrupted download.

    Raises:
        UserError: See `mmfinetune.utils.download`.
    """
    with contextlib.suppress(UserError):
        return find_devkit(root)
    target, archive = Path(root, 'VOCdevkit', 'VOC2012'), Path(root, PurePosixPath(VOC_URL).name)
    if target.exists():
        raise UserError('voc-folder-taken', path=target)
    download(url, archive, md5=VOC_MD5, size=VOC_SIZE, progress=progress)
    return unpack_tar(archive, 'VOCdevkit/VOC2012', target, progress)
