"""What one process does for all."""

from __future__ import annotations

from mmfinetune.utils import dist


def test_one_process_does_the_work_itself(capsys):
    assert dist.rank0_first(lambda: 7) == 7
    dist.say('seven')
    assert capsys.readouterr().out == 'seven\n'
