"""All that a check of a data set can find: how bad it is, and the cure; and the tolerances."""

from __future__ import annotations

from typing import NamedTuple

SEVERITIES = ('error', 'warning', 'note')

BOX_TOLERANCE_PX, BOX_TOLERANCE_SHARE = 2.0, 0.02
AREA_TOLERANCE = 0.10
CROSSING_SHARE = 0.05
TINY_PX = 10
DUPLICATE_IOU = 0.95
RARE = 10
IMBALANCE = 100


class Kind(NamedTuple):
    """Severity, title (follows a count of `unit`) and cure of all findings of one code.

    An error stops training, or training and evaluation go silently wrong with it. A warning costs
    accuracy or makes a number untrue. A note is good to know.
    """

    severity: str
    unit: str
    title: str
    cure: str


_FIX = '--fix OUT writes a repaired copy: '
_EXPORT = 'export the file again from the labelling tool'


def _ids(unit: str) -> dict[str, Kind]:
    name = {'images': 'image', 'annotations': 'annotation', 'categories': 'category'}[unit]
    renumber = _FIX + 'ids are numbered anew from 1'
    return {
        f'{name}-id-missing': Kind('error', unit, 'without an id', renumber),
        f'{name}-id-type': Kind('error', unit, 'whose id is not an integer', renumber),
        f'{name}-id-range': Kind('error', unit, 'whose id is negative or over 2^63 - 1', renumber),
        f'{name}-id-duplicate': Kind(
            'error',
            unit,
            'whose id an earlier entry has already',
            _FIX + ('the later entry is dropped' if unit != 'annotations' else 'they are numbered anew'),
        ),
    }


KINDS: dict[str, Kind] = {
    # The file
    'no-file': Kind(
        'error',
        'files',
        'not there',
        'correct the path, or make the file with tools/prepare_data.py or tools/prepare_voc.py',
    ),
    'file-unreadable': Kind('error', 'files', 'that cannot be opened', 'pass a file that you may read'),
    'encoding': Kind(
        'error',
        'files',
        'not in plain UTF-8, which pycocotools needs',
        'save as UTF-8 without a byte order mark; ' + _FIX + 'it is saved so',
    ),
    'not-json': Kind('error', 'files', 'that cannot be parsed as JSON', _EXPORT + '; it may be cut short'),
    'nesting': Kind('error', 'files', 'nested too deeply to be COCO', _EXPORT),
    'top-level': Kind(
        'error',
        'files',
        'whose top is no JSON object',
        'pass a COCO file: {"images": [...], "annotations": [...], "categories": [...]}',
    ),
    'section-missing': Kind(
        'error', 'sections', 'missing', 'a COCO file has the lists images, annotations and categories'
    ),
    'section-type': Kind('error', 'sections', 'of another type than a list', _EXPORT),
    'entry-type': Kind('error', 'entries', 'of another type than a JSON object', _FIX + 'they are dropped'),
    'no-images': Kind('error', 'files', 'without images', _EXPORT),
    'no-categories': Kind('error', 'files', 'without categories', _EXPORT),
    'no-objects': Kind(
        'error', 'files', 'without a usable object', 'there is nothing to learn or to measure: label the images'
    ),
    # Categories
    **_ids('categories'),
    'category-name': Kind('error', 'categories', 'without a name', 'name them in the file'),
    'category-name-duplicate': Kind('error', 'categories', 'whose name another has already', _FIX + 'they become one'),
    'category-id-zero': Kind(
        'note',
        'categories',
        'with id 0; some tools take it for background',
        'nothing to do if it is a class of its own',
    ),
    'background-class': Kind(
        'warning', 'categories', 'named like the background', 'take it out: the heads have a background of their own'
    ),
    'class-order': Kind(
        'error',
        'files',
        'whose categories are not the classes expected, in their order',
        'labels follow the order of the file: write all files with '
        'the same categories, and set metainfo.classes and num_classes to them; '
        '--fix OUT puts them into the order of the config or the first file',
    ),
    'class-absent': Kind(
        'warning',
        'classes',
        'without an object to learn from',
        'label some, or take the class out of all files and the config',
    ),
    'class-unmeasured': Kind(
        'note', 'classes', 'without an object to be measured by', 'their AP is not defined and left out of the mean'
    ),
    'class-rare': Kind(
        'note', 'classes', f'with fewer than {RARE} objects to learn from', 'label more of them, or expect a poor AP'
    ),
    'class-imbalance': Kind(
        'note',
        'classes',
        f'with {IMBALANCE} times fewer objects than the most frequent',
        'consider ClassBalancedDataset',
    ),
    # Images as the file lists them
    **_ids('images'),
    'file-name': Kind('error', 'images', 'without a usable file_name', _FIX + 'they are dropped'),
    'file-name-outside': Kind(
        'warning',
        'images',
        'whose file_name is absolute or leaves the image folder',
        'the data set cannot be moved: use names relative to the image folder',
    ),
    'image-size-invalid': Kind(
        'error', 'images', 'without a usable width and height', _FIX + 'the size is read from the image'
    ),
    'image-listed-twice': Kind(
        'warning',
        'images',
        'whose file is listed already',
        'merge the two entries: each has only a part of the objects',
    ),
    'image-empty': Kind(
        'note',
        'images',
        'without objects; training leaves them out',
        'nothing to do if there is nothing to label in them',
    ),
    # Image files
    'image-missing': Kind(
        'error',
        'images',
        'whose file is missing',
        'put it there, correct --images or data_prefix; ' + _FIX + 'they are dropped',
    ),
    'image-unreadable': Kind(
        'error', 'images', 'that cannot be read', 'put a good copy there; ' + _FIX + 'they are dropped'
    ),
    'image-truncated': Kind('error', 'images', 'cut short', 'put a whole copy there; ' + _FIX + 'they are dropped'),
    'image-size': Kind(
        'error',
        'images',
        'of another size than the file says; masks are off',
        'put the images there that were labelled; ' + _FIX + 'they are dropped',
    ),
    'image-exif': Kind(
        'error',
        'images',
        'that EXIF turns when they are read, while the file has the size before; masks are off',
        _FIX + 'masks are turned like the image, or the size is put right where the masks are already',
    ),
    'image-exif-same-size': Kind(
        'warning',
        'images',
        'that EXIF turns or mirrors without a trace in their size',
        'look at their masks (--html): they must fit the turned image, which is what training reads',
    ),
    'image-duplicate': Kind('warning', 'images', 'with the content of another one', 'keep one of them'),
    'image-depth': Kind(
        'warning',
        'images',
        'of 16 bits or more a channel, read as 8',
        'scale them to 8 bits yourself, or detail in the dark is lost',
    ),
    'image-channels': Kind(
        'note',
        'images',
        'other than RGB or grey (alpha, CMYK)',
        'nothing to do if they look right: they are read as BGR',
    ),
    'image-extension': Kind(
        'note', 'images', 'of another format than their name says', 'nothing to do: the content decides'
    ),
    # Annotations
    **_ids('annotations'),
    'annotation-id-zero': Kind(
        'error',
        'annotations',
        'with id 0, which COCO evaluation takes for "no match"',
        _FIX + 'ids are numbered anew from 1',
    ),
    'image-id-unknown': Kind('error', 'annotations', 'of an image that is not listed', _FIX + 'they are dropped'),
    'category-id-unknown': Kind(
        'error',
        'annotations',
        'of a category that is not listed',
        'list it under categories; ' + _FIX + 'they are dropped',
    ),
    'box-invalid': Kind(
        'error', 'annotations', 'whose bbox is not four finite numbers', _FIX + 'it is made from the mask'
    ),
    'box-degenerate': Kind(
        'warning',
        'annotations',
        'whose bbox has no area; training leaves them out, evaluation counts them',
        _FIX + 'it is made from the mask',
    ),
    'box-outside': Kind(
        'warning',
        'annotations',
        'whose bbox is wholly outside the image; training leaves them out',
        'bbox is [x, y, width, height] in pixels; ' + _FIX + 'it is made from the mask',
    ),
    'box-over-edge': Kind(
        'warning',
        'annotations',
        f'whose bbox leaves the image by more than {BOX_TOLERANCE_PX:g} px',
        'bbox is [x, y, width, height], not [x1, y1, x2, y2]; ' + _FIX + 'it is clipped',
    ),
    'box-tiny': Kind(
        'warning',
        'annotations',
        'whose bbox is under 1 px on a side; training leaves them out, evaluation counts them',
        'take them out if they are slips of the mouse',
    ),
    'box-mask': Kind(
        'warning',
        'annotations',
        'whose bbox is not that of the mask (more than '
        f'{BOX_TOLERANCE_PX:g} px and {BOX_TOLERANCE_SHARE:.0%} of its longer side)',
        _FIX + 'it is made from the mask',
    ),
    'area-invalid': Kind(
        'error', 'annotations', 'whose area is not a number; training stops at them', _FIX + 'it is made from the mask'
    ),
    'area-zero': Kind(
        'warning',
        'annotations',
        'whose area is not over 0; training leaves them out, evaluation counts them',
        _FIX + 'it is made from the mask',
    ),
    'area-mismatch': Kind(
        'warning',
        'annotations',
        f'whose area is not that of the mask (by more than {AREA_TOLERANCE:.0%} and its border)',
        'AP of small, medium and large objects is untrue; ' + _FIX + 'it is made from the mask',
    ),
    'iscrowd-missing': Kind(
        'warning', 'annotations', 'without iscrowd, which pycocotools needs', _FIX + 'it is set to 0'
    ),
    'iscrowd-value': Kind(
        'error',
        'annotations',
        'whose iscrowd is not 0 or 1',
        _FIX + 'a truth value becomes 0 or 1; the others are dropped',
    ),
    'crowd-polygon': Kind(
        'note',
        'annotations',
        'for a crowd region, drawn as polygons',
        'check that iscrowd is meant: training ignores such regions',
    ),
    'mask-missing': Kind(
        'error',
        'annotations',
        'without a segmentation; Mask R-CNN cannot learn from boxes alone',
        'label masks; ' + _FIX + 'they are dropped',
    ),
    'mask-type': Kind(
        'error',
        'annotations',
        'whose segmentation is neither polygons nor RLE',
        'polygons are [[x1, y1, x2, y2, ...], ...]; '
        + _FIX
        + 'a single flat polygon is wrapped, the others are dropped',
    ),
    'polygon-points': Kind(
        'error', 'annotations', 'with a polygon of fewer than 3 points', _FIX + 'the polygon is dropped'
    ),
    'polygon-odd': Kind(
        'error', 'annotations', 'with a polygon of an odd number of coordinates', _FIX + 'the polygon is dropped'
    ),
    'polygon-number': Kind(
        'error', 'annotations', 'with a polygon that has NaN or infinity', _FIX + 'the polygon is dropped'
    ),
    'polygon-far': Kind(
        'error',
        'annotations',
        'with a polygon that goes farther out than the image is long; drawing it may take all memory',
        'coordinates are pixels; ' + _FIX + 'it is clipped',
    ),
    'polygon-over-edge': Kind(
        'warning',
        'annotations',
        f'with a polygon that leaves the image by more than {BOX_TOLERANCE_PX:g} px',
        _FIX + 'it is clipped',
    ),
    'polygon-crossing': Kind(
        'warning',
        'annotations',
        f'with a polygon that crosses itself, so that {CROSSING_SHARE:.0%} of its area or more is in doubt',
        'draw it anew: what is covered twice counts as outside',
    ),
    'mask-empty': Kind('warning', 'annotations', 'whose mask has no pixel', _FIX + 'they are dropped'),
    'mask-tiny': Kind(
        'note', 'annotations', f'whose mask has fewer than {TINY_PX} pixels', 'nothing to do if they are real objects'
    ),
    'rle-size': Kind(
        'error',
        'annotations',
        'whose RLE has another size than the image',
        'size is [height, width]; ' + _FIX + 'they are dropped',
    ),
    'rle-counts': Kind(
        'error', 'annotations', 'whose RLE counts are damaged', _EXPORT + '; ' + _FIX + 'they are dropped'
    ),
    'rectangle-masks': Kind(
        'warning',
        'annotations',
        'whose mask is just the box; a converter has made most masks of this file from boxes',
        'convert again from the true masks (tools/prepare_data.py), or fine-tune a box detector',
    ),
    'object-duplicate': Kind(
        'warning',
        'annotations',
        f'repeating another object (same class, mask IoU over {DUPLICATE_IOU})',
        'take one out: the other counts as missed',
    ),
    # Between splits
    'leak-content': Kind(
        'warning',
        'images',
        'with the same content as an image of another split',
        'take them out of one split: scores on seen images are too good',
    ),
    'leak-similar': Kind(
        'warning',
        'images',
        'looking the same as an image of another split',
        'take them out of one split if they are the same picture',
    ),
}
