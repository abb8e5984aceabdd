"""The job of `tools/check_dataset.py`: check a data set, report, and write a repaired copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.apis import run_data
from mmfinetune.config import load, views
from mmfinetune.data import coco_json, layout
from mmfinetune.data.check import repair, report
from mmfinetune.data.check import run as data_check
from mmfinetune.data.check.findings import Finding
from mmfinetune.utils.files import atomic_write_text, require_writable


@dataclass(frozen=True)
class Options(data_check.Options):
    """What to check and what to write; how, see `data_check.Options`. Either `targets` or `config` is given.

    Attributes:
        targets: Annotation files, or folders of prepared data.
        image_root: Folder of the images of all targets; found near each file by default.
        config: Config that names splits, image folders and classes.
        json: Whether to print the report as JSON.
        html: File of a report with pictures.
        fix: New folder for a repaired copy.
    """

    targets: Sequence[Path] = ()
    image_root: Path | None = None
    config: Path | None = None
    json: bool = False
    html: Path | None = None
    fix: Path | None = None


def run(options: Options) -> int:
    """Check, print and write what the options ask for; exit code 1 if there are errors in the data.

    Raises:
        UserError: No data, or a repaired copy that cannot be made.
    """
    if options.html:
        require_writable(options.html.parent)
    splits: data_check.Splits
    unfit: list[Finding] = []
    if options.config:
        cfg = load.load(options.config)
        splits, classes = run_data.splits_of_config(cfg)
    else:
        splits, classes = layout.find_splits(options.targets, options.image_root), None
    with coco_json.parsed_once():
        if options.config:
            unfit = run_data.unfit_images(views.dataset_configs(cfg), options.max_examples)
        fixed = repair.fix(splits, options.fix, classes, options) if options.fix else None
        found = fixed.report if fixed else data_check.check(splits, classes, options)
    found.findings[:0] = unfit
    if options.html:
        atomic_write_text(options.html, report.as_html(found))
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        print(report.as_text(found, options.max_examples))
        if fixed:
            print(fixed.text())
        if options.html:
            print(f'Report: {options.html}')
    return 0 if found.good else 1
