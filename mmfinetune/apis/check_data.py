"""The job of `tools/check_dataset.py`: check a data set, report, and write a repaired copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfinetune.apis import run_data
from mmfinetune.config import load
from mmfinetune.data import layout
from mmfinetune.data.check import repair, report
from mmfinetune.data.check import run as data_check


@dataclass
class Options:
    """What to check, how, and what to write; either `targets` or `config` is given.

    Attributes:
        targets: Annotation files, or folders of prepared data.
        image_root: Folder of the images of all targets; found near each file by default.
        config: Config that names splits, image folders and classes.
        images: Whether to read the image files too.
        json: Whether to print the report as JSON.
        html: File of a report with pictures.
        fix: New folder for a repaired copy.
        max_examples: Places shown of each finding.
        workers: Processes that read images; all cores by default.
        cache: Whether to take the result of an earlier check of the same files.
    """

    targets: Sequence[Path] = ()
    image_root: Path | None = None
    config: Path | None = None
    images: bool = True
    json: bool = False
    html: Path | None = None
    fix: Path | None = None
    max_examples: int = 5
    workers: int | None = None
    cache: bool = True


def run(options: Options) -> int:
    """Check, print and write what the options ask for.

    Returns:
        Exit code: 1 if there are errors in the data.

    Raises:
        UserError: No data, or a repaired copy that cannot be made.
    """
    splits: data_check.Splits
    if options.config:
        splits, classes = run_data.splits_of_config(load.load(options.config))
    else:
        splits, classes = layout.find_splits(options.targets, options.image_root), None
    how = data_check.Options(
        images=options.images, workers=options.workers, max_examples=options.max_examples, cache=options.cache
    )
    fixed = repair.fix(splits, options.fix, classes, how) if options.fix else None
    found = fixed.report if fixed else data_check.check(splits, classes, how)
    if options.html:
        report.write_html(found, options.html)
    if options.json:
        print(json.dumps(found.as_dict(), indent=1))
        return 0 if found.good else 1
    print(report.as_text(found, options.max_examples))
    if fixed:
        print(fixed.text())
    if options.html:
        print(f'Report: {options.html}')
    return 0 if found.good else 1
