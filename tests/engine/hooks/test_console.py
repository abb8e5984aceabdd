"""What is seen of a run."""

from __future__ import annotations

import re

import pytest

from mmfinetune.engine.hooks.console import _clock, _loss_parts, validation_table
from tests.builders.runs import TOOLS, train_tool
from tests.builders.terminals import in_terminal

# MMEngine's visualizer, of boxes that end at the image's edge.
pytestmark = pytest.mark.filterwarnings('ignore:.*out of bounds')

DUMPS = ('Hooks will be executed', 'System environment', 'Epoch(train)', 'Epoch(val)', 'loading annotations', 'Saving')


def test_output_of_a_run_is_short_and_in_its_log_is_the_rest(finished_run):
    out = finished_run.outcome.out
    log = max(finished_run.kept.glob('tiny/*/*.log')).read_text()
    assert not [word for word in DUMPS if word in out]
    assert not [word for word in DUMPS if word not in log and word != 'loading annotations']
    assert not re.search(r'[\x00-\x09\x0b-\x1f\x7f]', out)
    # Only a path, or a command to copy, may be longer.
    assert not [line for line in out.partition('Diagnosis:')[0].splitlines() if len(line) > 100 and ' ' in line.strip()]
    assert re.findall(r'^Epoch (\d)/2  loss [\d.]+  rpn [\d.+]+ cls [\d.]+ bbox [\d.]+ mask ', out, re.M) == ['1', '2']
    assert len(re.findall(r'^  val loss [\d.]+ +AP +AP50 +AP75', out, re.M)) == 2
    assert len(re.findall(r'^Step 1: loss [\d.]+, [\d.]+ s, about ', out, re.M)) == 1
    for line in re.findall(r'^(?:Epoch|  val loss).*', out, re.M):
        assert line in log


def test_verbose_brings_it_all_back(in_site):
    outcome = train_tool(
        *('tiny.py', '--train', '--verbose', '--work-dir', 'work_dirs/loud', '--cfg-options', 'train_cfg.max_epochs=1')
    )
    assert outcome.code == 0, outcome.err
    assert not [word for word in DUMPS if word not in outcome.out and word != 'loading annotations']


def test_terminal_has_a_line_that_is_refreshed(in_site):
    args = ('tiny.py', '--work-dir', 'work_dirs/seen', '--cfg-options', 'train_cfg.max_epochs=1', '--gpus', '1')
    shown = in_terminal(TOOLS / 'train_pretrained.py', *args, env={'CUDA_VISIBLE_DEVICES': ''})
    assert shown.code == 0, shown.raw[-2000:]
    assert shown.states[0] == 'Loading PyTorch…'
    [first] = [state for state in shown.states if state.startswith('epoch 1/1 1/2 ')]
    assert re.fullmatch(r'epoch 1/1 1/2 eta \d+:\d\d loss [\d.]+ rpn \S+ cls \S+ bbox \S+ mask \S+ [\d.]+ img/s', first)
    assert any(state.startswith('Validation ') for state in shown.states)
    assert any(state.startswith('Test ') for state in shown.states)
    assert max(map(len, shown.states)) <= 100
    # Nothing of it is left, and no line for logs.
    assert not [line for line in shown.lines if line.startswith(('epoch ', 'Step 1', 'Validation', 'Loading', 'Test '))]
    assert len([line for line in shown.lines if line.startswith('Epoch 1/1 ')]) == 1


METRICS = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.75, 'coco/bbox_mAP_75': -1.0, 'val/loss': 1.25}


def test_table_of_a_validation():
    title, row = validation_table(METRICS, {}).splitlines()
    assert title.split() == ['val', 'loss', '1.250', 'AP', 'AP50', 'AP75']
    assert row.split() == ['boxes', '0.500', '0.750', '-']
    metrics = {**METRICS, 'coco/segm_mAP': 0.4, 'coco/segm_mAP_50': 0.6}
    text = validation_table(metrics, {'coco/segm_mAP': 0.45}, ['coco/segm_mAP', 'val/loss'])
    assert text.splitlines()[2].split() == ['masks', '0.400', '0.600', '-', '-0.050', 'best']
    assert text.splitlines()[3] == '  best val/loss'


def test_validation_with_other_metrics_is_a_line():
    assert (
        validation_table({'accuracy': 0.5, 'what': 'text'}, {}, ['accuracy'])
        == '  Validation:  accuracy 0.5  best accuracy'
    )
    assert validation_table({}, {}) == ''


def test_terms_of_a_loss_by_stage():
    losses = {'loss': 3.5, 'loss_rpn_cls': 0.25, 'loss_rpn_bbox': 0.5, 'loss_mask': 1.5, 's0.loss_cls': 1.25}
    assert _loss_parts(losses, 2) == ['loss 3.500', 'rpn .25+.50 mask 1.50 s0 1.25']


@pytest.mark.parametrize(
    ('seconds', 'text'), [(None, ''), (59.6, 'eta 1:00'), (3599, 'eta 59:59'), (14700, 'eta 4h05')]
)
def test_time_left(seconds, text):
    assert _clock(seconds) == text
