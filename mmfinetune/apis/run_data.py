"""The data of a run: annotation files made where they are missing, then checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfinetune.config import paths, views
from mmfinetune.data import coco_json, demo
from mmfinetune.data.check.findings import Example, Finding
from mmfinetune.data.check.run import Options, check
from mmfinetune.data.formats import voc_devkit
from mmfinetune.data.preflight import Split, read_split
from mmfinetune.data.prepare import prepare
from mmfinetune.utils.dist import rank0_first, say
from mmfinetune.utils.errors import Message, UserError
from mmfinetune.utils.files import writing

if TYPE_CHECKING:
    from mmengine.config import Config

# Images so many times longer than wide are tried: making the long side smaller may leave nothing of the other. So are the smallest
# and the largest; and if one of them does not pass, all sizes of a file, unless they are too many.
_ASPECT, _MOST_PIXELS, _MOST_SIZES = 16, 1 << 26, 500


def set_trial_data(cfg: Config, folder: Path) -> dict[str, Path]:
    """Let a config whose annotation files are still to be made have them, and drawn images, in a folder instead.

    Returns:
        The file that training would make for each split; empty if all are there.
    """
    files = {name: views.annotation_file(dataset) for name, dataset in views.dataset_configs(cfg).items()}
    if all(file.is_file() for file in files.values()):
        return {}
    if maker := dict(cfg.get('demo_data') or {}):
        make = demo.MAKERS[maker.pop('kind')]
        paths.set_data_root(cfg, rank0_first(lambda: make(**{**maker, 'root': folder}) and folder))
    paths.redirect_annotations(cfg, rank0_first(lambda: folder))
    return files


def prepare_data(cfg: Config, train: bool = True, full: bool = False, cache: bool = True) -> dict[str, Split]:
    """Make missing annotation files from what is there, then check all that the run reads.

    Args:
        cfg: Resolved config.
        train: Whether the training split is needed.
        full: Whether to look for all faults that training would only show by bad results, which
            reads each image once; otherwise only the headers of the images are read.
        cache: Whether to keep what that finds for the next time.

    Raises:
        UserError: No data, or data that does not fit the config or has errors.
    """
    datasets = {n: d for n, d in views.dataset_configs(cfg).items() if train or views.split_of(n) == 'test'}
    missing = [d for d in datasets.values() if not views.annotation_file(d).is_file()]
    if missing:
        _make_annotations(cfg, [views.annotation_file(d) for d in missing], Path(missing[0].get('data_root') or ''))
    splits: dict[str, Split] = {}
    done: dict[tuple, Split] = {}
    with coco_json.parsed_once():
        for name, dataset in datasets.items():
            path, root = _place(dataset)
            classes = views.dataset_classes(dataset)
            key = path, root, tuple(classes or ())
            if key not in done:
                done[key] = read_split(path, None if full else root, classes)
            splits[name] = done[key]
        _compare_truth(cfg, datasets)
        if unfit := unfit_images(datasets):
            raise UserError('images-unfit', problems=[f.message() for f in unfit], config=cfg.filename)
        if full:
            places, classes = splits_of_config(cfg)
            report = check({name: places[name] for name in splits}, classes, Options(cache=cache))
            if lines := report.lines(5):
                say('\n'.join(lines))
            report.require_good()
    return splits


def unfit_images(datasets: Mapping[str, Any], most: int = 5) -> list[Finding]:
    """Errors of the check: images that the pipelines of dataset configs cannot process.

    Args:
        datasets: Dataset configs by name.
        most: Places that are kept of each finding.
    """
    findings, seen = [], []
    for name, dataset in datasets.items():
        if dataset in seen:  # most configs test on the validation split
            continue
        seen.append(dataset)
        least = 0 if dataset.get('test_mode') else (dataset.get('filter_cfg') or {}).get('min_size', 0)
        found: dict[tuple[int, int], list[str]] = {}
        for image in coco_json.read(views.annotation_file(dataset), compact=True).images:
            width, height = image.get('width'), image.get('height')
            # What is no size, or too large, is an error already.
            if (
                type(width) is type(height) is int
                and max(least, 1) <= min(width, height)
                and width * height <= _MOST_PIXELS
            ):
                found.setdefault((width, height), []).append(str(image.get('file_name')))
        if not found:
            continue
        from mmfinetune.engine.transforms import unfit_sizes

        pipeline = dataset.get('pipeline') or ()
        tried = {size for size in found if max(size) > _ASPECT * min(size)}
        tried |= {choose(found, key=key) for choose in (min, max) for key in (min, max)}
        reasons = unfit_sizes(pipeline, tried)
        if reasons and len(found) <= _MOST_SIZES:
            reasons = unfit_sizes(pipeline, found)
        bad = [Example(file, detail=f'{w}x{h}: {reason}') for (w, h), reason in reasons.items() for file in found[w, h]]
        if bad:
            findings.append(Finding('image-pipeline', name, len(bad), bad[:most]))
    return findings


def _make_annotations(cfg: Config, files: list[Path], root: Path) -> None:
    if maker := dict(cfg.get('demo_data') or {}):
        make = demo.MAKERS[maker.pop('kind')]
        with writing(maker['root']):
            root = make(Path(maker.pop('root')), **maker)
        if all(p.is_file() for p in files):
            return
    try:
        # The config's data_root is the VOC2012 folder; the devkit may be two folders up.
        voc2012 = voc_devkit.find_devkit(root)
    except UserError:
        raise UserError(
            'data-missing', problems=[*dict.fromkeys(map(str, files)), Message('data-devkit', root=root)]
        ) from None
    prepare(voc2012, files[0].parent, 'voc', 'in-place')


def splits_of_config(cfg: Config) -> tuple[dict[str, tuple[Path, Path]], Sequence[str]]:
    """Annotation file and image folder of each split of a resolved config, and the class names."""
    return {n: _place(dataset) for n, dataset in views.dataset_configs(cfg).items()}, views.class_names(cfg)


def _place(dataset: Any) -> tuple[Path, Path]:
    """Annotation file and image folder of a dataset config."""
    root = Path(dataset.get('data_root') or '')
    return views.annotation_file(dataset), root / (dataset.get('data_prefix') or {}).get('img', '')


def _compare_truth(cfg: Config, datasets: Mapping[str, Any]) -> None:
    """Compare what evaluators read with what the loaders of their splits read.

    Raises:
        UserError: Other images or other objects.
    """
    problems = []
    for name, dataset in datasets.items():
        split, path = views.split_of(name), views.annotation_file(dataset)
        for evaluator in views.evaluators(cfg, split):
            truth = evaluator.get('ann_file')
            if truth and not _is_same_truth(path, Path(truth)):
                problems.append(Message('evaluator-file', split=split, loader=path, evaluator=truth))
    if problems:
        raise UserError('evaluator-files', problems=problems)


def _is_same_truth(loaded: Path, truth: Path) -> bool:
    """Whether a file has the images of another, and its objects unless that has none."""
    if loaded.resolve() == truth.resolve():
        return True
    ours, theirs = (coco_json.read(path, compact=True).require(('width', 'height')) for path in (loaded, truth))
    known = {image['id']: image for image in theirs.images}

    def is_known(image: Mapping) -> bool:
        return all(known.get(image['id'], {}).get(key) == image[key] for key in ('file_name', 'width', 'height'))

    def objects(coco: coco_json.Coco) -> Counter:
        return Counter((a['image_id'], a['category_id'], *map(float, a.get('bbox', ()))) for a in coco.annotations)

    same_objects = not ours.annotations or not objects(ours) - objects(theirs)
    return ours.classes == theirs.classes and all(map(is_known, ours.images)) and same_objects
