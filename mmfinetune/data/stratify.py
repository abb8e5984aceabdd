"""Distribute groups of images over splits, each label in its share."""

from __future__ import annotations

import numpy as np

from mmfinetune.utils import console

# Tries for one split, as far as they cost no more than a few seconds.
_TRIES = 10
MAX_SEED = (1 << 32) // _TRIES - 1  # each try has a seed of its own, of 32 bits
_TRIED_GROUPS = 50_000


def stratify(counts: np.ndarray, ratios: np.ndarray, seed: int = 0, progress: bool = False) -> np.ndarray:
    """Distribute groups so that each label comes near its share in every split.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas: "On the Stratification of Multi-Label
    Data", ECML PKDD 2011): the rarest label first, each of its examples to the split that misses
    most of it. Beyond the paper an example is a group of images, big ones first, and a label with
    no more groups left than there are splits without it goes to these, the first split first.

    Args:
        counts: Images of each label in each group, (groups, labels); the last column counts all
            images of the group.
        ratios: Share of each split; they sum to 1.
        seed: For ties and the order of groups of one size.
        progress: Whether to show a progress bar.

    Returns:
        Index of the split of each group, (groups,).
    """
    # Not default_rng: NumPy guarantees only this generator's numbers for all versions (NEP 19).
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order, -1], kind='stable')]
    present = counts > 0
    left = present.sum(0)
    missing = np.outer(ratios, counts.sum(0))
    bare = np.ones(missing.shape, bool)
    result = np.full(len(counts), -1)
    with console.bar(total=len(counts), desc='split', unit='group', wanted=progress) as bar:
        while left.any():
            label = int(np.argmin(np.where(left > 0, left, left.max() + 1)))
            for group in order[present[order, label]]:
                if result[group] >= 0:
                    continue
                # The last column too, or a split could stay empty altogether.
                for column in (-1, label):
                    without = np.flatnonzero(bare[:, column])
                    if len(without) and len(without) >= left[column]:
                        split = without[0]
                        break
                else:
                    split = np.lexsort((rng.random_sample(len(ratios)), missing[:, -1], missing[:, label]))[-1]
                result[group] = split
                missing[split] -= counts[group]
                left -= present[group]
                bare[split] &= ~present[group]
                bar.update()
    return result


def best_of(counts: np.ndarray, objects: np.ndarray, ratios: np.ndarray, seed: int = 0) -> np.ndarray:
    """The best of several results of `stratify`, by images and by objects, (groups, labels), of each class."""
    tries = max(1, min(_TRIES, _TRIED_GROUPS // len(counts)))
    everywhere = (counts > 0).sum(0) >= len(ratios)

    def badness(where: np.ndarray) -> tuple[int, float]:
        absent, off = 0, 0.0
        for kind in (counts, objects):
            found = np.stack([kind[where == s].sum(0) for s in range(len(ratios))])
            absent += int(((found == 0) & everywhere & (kind.sum(0) > 0)).sum())
            off += (np.abs(found / np.maximum(found.sum(0), 1) - ratios[:, None]) * (found.sum(0) > 0)).sum()
        return absent, round(float(off), 9)

    # Seeds of neighbouring runs must not share tries.
    found = [stratify(counts, ratios, seed * _TRIES + i, progress=tries == 1) for i in range(tries)]
    return min(found, key=badness)
