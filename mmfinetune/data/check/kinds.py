"""All that a check of a data set can find: how bad it is, and how to fix it; and the tolerances."""

from __future__ import annotations

import re
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
    """Severity, title (follows a count of `unit`) and hint of all findings of one code.

    An error stops training, or training and evaluation go silently wrong with it. A warning costs
    accuracy or makes a number untrue. A note is good to know.
    """

    severity: str
    unit: str
    title: str
    hint: str


_FIX = '--fix OUT writes a repaired copy:'
_EXPORT = 'export the file again from the labelling tool'


def _ids(unit: str, units: str, duplicates: str = 'the later entry is dropped') -> str:
    return f"""\
{unit}-id-missing: error {units} without an id
    {_FIX} ids are renumbered from 1
{unit}-id-type: error {units} whose id is not an integer
    {_FIX} ids are renumbered from 1
{unit}-id-range: error {units} whose id is negative or over 2^63 - 1
    {_FIX} ids are renumbered from 1
{unit}-id-duplicate: error {units} with the id of an earlier entry
    {_FIX} {duplicates}"""


# Code, severity, unit and title; below it the hint.
_TABLE = f"""
no-file: error files not found
    correct the path, or make the file with tools/prepare_data.py or tools/prepare_voc.py
file-unreadable: error files that cannot be opened
    pass a file that you may read
encoding: error files not in plain UTF-8, which pycocotools needs
    save as UTF-8 without a byte order mark; {_FIX} it is saved that way
not-json: error files that cannot be parsed as JSON
    {_EXPORT}; it may be cut short
nesting: error files nested too deeply to be COCO
    {_EXPORT}
top-level: error files whose top is not a JSON object
    pass a COCO file: {{"images": [...], "annotations": [...], "categories": [...]}}
section-missing: error sections missing
    a COCO file has the lists images, annotations and categories
section-type: error sections of another type than a list
    {_EXPORT}
entry-type: error entries of another type than a JSON object
    {_FIX} they are dropped
no-images: error files without images
    {_EXPORT}
no-categories: error files without categories
    {_EXPORT}
no-objects: error files without a usable object
    there is nothing to learn or to measure: label the images
{_ids('category', 'categories')}
category-name: error categories without a name
    name them in the file
category-name-duplicate: error categories with the name of another
    {_FIX} they become one
category-id-zero: note categories with id 0; some tools take it for background
    nothing to do if it is a real class
background-class: warning categories named like the background
    remove it: the heads have a background of their own
class-order: error files whose categories are not the classes expected, in their order
    labels follow the order of the file: write all files with the same categories, and set metainfo.classes and \
num_classes to them; --fix OUT puts them into the order of the config or the first file
class-absent: warning classes without an object to learn from
    label some, or remove the class from all files and the config
class-unmeasured: note classes without an object to be measured by
    their AP is not defined and left out of the mean
class-rare: note classes with fewer than {RARE} objects to learn from
    label more of them, or expect a poor AP
class-imbalance: note classes with {IMBALANCE} times fewer objects than the most frequent
    consider ClassBalancedDataset
{_ids('image', 'images')}
file-name: error images without a usable file_name
    {_FIX} they are dropped
file-name-outside: warning images whose file_name is absolute or leaves the image folder
    the data set cannot be moved: use names relative to the image folder
image-size-invalid: error images without a usable width and height
    {_FIX} the size is read from the image
image-listed-twice: warning images whose file is listed already
    merge the two entries: each has only a part of the objects
image-empty: note images without objects; training leaves them out
    nothing to do if there is nothing to label in them
image-missing: error images whose file is missing
    restore it, or correct --image-root or data_prefix; {_FIX} they are dropped
image-unreadable: error images that cannot be read
    replace them by good copies; {_FIX} they are dropped
image-truncated: error images cut short
    replace them by complete copies; {_FIX} they are dropped
image-size: error images of another size than the file says; masks are off
    restore the images that were labelled; {_FIX} they are dropped
image-exif: error images that EXIF turns when they are read, while the file has the size before; masks are off
    {_FIX} masks are turned like the image, or the size is corrected where the masks are upright already
image-exif-same-size: warning images that EXIF turns or mirrors without a trace in their size
    look at their masks (--html): they must fit the turned image, which is what training reads
image-duplicate: warning images with the content of another one
    keep one of them
image-depth: warning images of 16 bits or more a channel, read as 8
    scale them to 8 bits yourself, or detail in the dark is lost
image-channels: note images other than RGB or grey (alpha, CMYK)
    nothing to do if they look right: they are read as BGR
image-extension: note images of another format than their name says
    nothing to do: the content decides
{_ids('annotation', 'annotations', 'they are renumbered')}
annotation-id-zero: error annotations with id 0, which COCO evaluation takes for "no match"
    {_FIX} ids are renumbered from 1
image-id-unknown: error annotations of an image that is not listed
    {_FIX} they are dropped
category-id-unknown: error annotations of a category that is not listed
    list it under categories; {_FIX} they are dropped
box-invalid: error annotations whose bbox is not four finite numbers
    {_FIX} it is made from the mask
box-degenerate: warning annotations whose bbox has no area; training leaves them out, evaluation counts them
    {_FIX} it is made from the mask
box-outside: warning annotations whose bbox is wholly outside the image; training leaves them out
    bbox is [x, y, width, height] in pixels; {_FIX} it is made from the mask
box-over-edge: warning annotations whose bbox leaves the image by more than {BOX_TOLERANCE_PX:g} px
    bbox is [x, y, width, height], not [x1, y1, x2, y2]; {_FIX} it is clipped
box-tiny: warning annotations whose bbox is under 1 px on a side; training leaves them out, evaluation counts them
    remove them if they are slips of the mouse
box-mask: warning annotations whose bbox is not that of the mask (more than {BOX_TOLERANCE_PX:g} px and \
{BOX_TOLERANCE_SHARE:.0%} of its longer side)
    {_FIX} it is made from the mask
area-invalid: error annotations whose area is not a number; training stops at them
    {_FIX} it is made from the mask
area-zero: warning annotations whose area is not over 0; training leaves them out, evaluation counts them
    {_FIX} it is made from the mask
area-mismatch: warning annotations whose area is not that of the mask (by more than {AREA_TOLERANCE:.0%} and its border)
    AP of small, medium and large objects is untrue; {_FIX} it is made from the mask
iscrowd-missing: warning annotations without iscrowd, which pycocotools needs
    {_FIX} it is set to 0
iscrowd-value: error annotations whose iscrowd is not 0 or 1
    {_FIX} a truth value becomes 0 or 1; the others are dropped
crowd-polygon: note annotations for a crowd region, drawn as polygons
    check that iscrowd is meant: training ignores such regions
mask-missing: error annotations without a segmentation; Mask R-CNN cannot learn from boxes alone
    label masks; {_FIX} they are dropped
mask-type: error annotations whose segmentation is neither polygons nor RLE
    polygons are [[x1, y1, x2, y2, ...], ...]; {_FIX} a single flat polygon is wrapped, the others are dropped
polygon-points: error annotations with a polygon of fewer than 3 points
    {_FIX} the polygon is dropped
polygon-odd: error annotations with a polygon of an odd number of coordinates
    {_FIX} the polygon is dropped
polygon-number: error annotations with a polygon that has NaN or infinity
    {_FIX} the polygon is dropped
polygon-far: error annotations with a polygon that goes farther out than the image is long; drawing it may take all \
memory
    coordinates are pixels; {_FIX} it is clipped
polygon-over-edge: warning annotations with a polygon that leaves the image by more than {BOX_TOLERANCE_PX:g} px
    {_FIX} it is clipped
polygon-crossing: warning annotations with a polygon that crosses itself, so that {CROSSING_SHARE:.0%} of its area or \
more is in doubt
    redraw it: what is covered twice counts as outside
mask-empty: warning annotations whose mask has no pixel
    {_FIX} they are dropped
mask-tiny: note annotations whose mask has fewer than {TINY_PX} pixels
    nothing to do if they are real objects
rle-size: error annotations whose RLE has another size than the image
    size is [height, width]; {_FIX} they are dropped
rle-counts: error annotations whose RLE counts are damaged
    {_EXPORT}; {_FIX} they are dropped
rectangle-masks: warning annotations whose mask is just the box; a converter has made most masks of this file from boxes
    convert again from the true masks (tools/prepare_data.py), or fine-tune a box detector
object-duplicate: warning annotations repeating another object (same class, mask IoU over {DUPLICATE_IOU})
    remove one: the other counts as missed
leak-content: warning images with the same content as an image of another split
    remove them from one split: scores on seen images are too good
leak-similar: warning images looking the same as an image of another split
    remove them from one split if they are the same picture
"""

KINDS: dict[str, Kind] = {
    code: Kind(*rest) for code, *rest in re.findall(r'^([\w-]+): (\w+) (\w+) (.+)\n    (.+)$', _TABLE, re.MULTILINE)
}
