"""The keys under which checkpoints and the message hub keep a run's state."""

from __future__ import annotations

pass


EPOCH_START = 'epoch_start'

WITHIN_EPOCH = 'iter_{}.pth'
VALIDATED = 'validated_epoch'
GRADIENTS = 'gradients'
OUTDATED = 'outdated'
