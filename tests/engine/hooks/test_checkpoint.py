"""Checkpoints are whole at every moment, and the disk has room for them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmfinetune.engine.hooks import checkpoint
from mmfinetune.engine.hooks import stop as stop_hook
from mmfinetune.utils.files import hash_in_name, sha256_of
from mmfinetune.weights.read import read_checkpoint
from tests.builders.disk import nearly_full
from tests.builders.errors import refused
from tests.builders.toy import SCORES, DoAt, assert_same_checkpoint, make_cfg, names, stop, train

LAST = 'epoch_4.pth'


class Killed(BaseException):
    """Nothing that comes after it is done."""


@contextlib.contextmanager
def killed_before(count: int) -> Iterator[list[str]]:
    """End a run at its ``count``-th change to the file system, as SIGKILL would.

    Gives the changes that were made.
    """
    done: list[str] = []

    def guard(name: str):
        original = getattr(Path, name)

        def change(path: Path, *args, **kwargs):
            if path.suffix in ('.pth', '.tmp') or path.name == 'last_checkpoint':
                if len(done) >= count:
                    # Also in `finally`, which a killed process does not come to.
                    raise Killed
                done.append(f'{name} {path.name}')
            return original(path, *args, **kwargs)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in ('replace', 'unlink'):
            patch.setattr(Path, name, guard(name))
        yield done


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('whole')
    train(make_cfg(folder))
    return folder


def changes_of(folder: Path, **changes) -> list[str]:
    with killed_before(10**6) as done:
        train(make_cfg(folder, **changes))
    return done


SPARSE = dict(every_n_iters=2, max_keep_ckpts=1)


def assert_survives(whole: Path, folder: Path, at: int) -> list[str]:
    with killed_before(at) as done, pytest.raises(Killed):
        train(make_cfg(folder, checkpoint=SPARSE))
    saved = names(folder)
    for name in saved:
        read_checkpoint(folder / name)
    # From the first save on there is a state, and from the first score on a best one.
    written = [line for line in done if line.startswith(('replace .epoch', 'replace .iter'))]
    assert any(name.startswith(('epoch', 'iter')) for name in saved) == bool(written)
    scored = [line for line in done if line.startswith('replace .best')]
    assert sum(name.startswith('best') for name in saved) in ((1, 2) if scored else (0,))
    train(make_cfg(folder, checkpoint=SPARSE), resume=bool(saved))
    assert names(folder) == ['best_score_epoch_4.pth', LAST]
    for name in names(folder):
        assert_same_checkpoint(whole / name, folder / name)
    assert not list(folder.rglob('.*.tmp'))
    return done


@pytest.mark.parametrize('at', (6, 20, 31))
def test_kill_between_changes_of_files(whole, tmp_path, at):
    assert_survives(whole, tmp_path, at)


@pytest.mark.slow
def test_kill_before_each_change_of_a_file(whole, tmp_path):
    total = len(changes_of(tmp_path / 'all', checkpoint=SPARSE))
    for at in range(total):
        assert_survives(whole, tmp_path / str(at), at)
    print(f'killed before each of {total} changes of files: all resumed exactly')


def test_old_files_go_after_the_new_ones_are_there(tmp_path):
    done = [
        line
        for line in changes_of(tmp_path, checkpoint=dict(max_keep_ckpts=1))
        if ('last_checkpoint' not in line and not line.endswith('.tmp'))
        or (line.startswith('replace .') and 'last_checkpoint' not in line)
    ]
    saved = [line.rpartition('.pth')[0] for line in done]
    assert saved.index('unlink epoch_1') > saved.index('replace .epoch_2')
    assert saved.index('unlink best_score_epoch_1') > saved.index('replace .best_score_epoch_2')
    assert saved.index('unlink best_score_epoch_2') > saved.index('replace .best_score_epoch_4')


def test_best_of_several_scores_is_there_before_the_old_goes(tmp_path):
    done = changes_of(
        tmp_path,
        checkpoint=dict(save_best=['score', 'score2'], rule=None, greater_keys=['score', 'score2']),
        val_evaluator=dict(type='ToyMetric', names=['score', 'score2']),
    )
    for name in ('score', 'score2'):
        new = next(i for i, line in enumerate(done) if line.startswith(f'replace .best_{name}_epoch_2'))
        assert done.index(f'unlink best_{name}_epoch_1.pth') > new
    assert {'best_score_epoch_4.pth', 'best_score2_epoch_4.pth'} <= set(names(tmp_path))


def test_run_that_does_not_fit_the_disk_is_refused(tmp_path):
    with nearly_full(1000), refused('checkpoint-no-room-for-run', files=3, folder=tmp_path):
        train(make_cfg(tmp_path))
    assert names(tmp_path) == []


@pytest.mark.parametrize(('keep', 'every', 'files'), [(1, 0, 2), (2, 0, 3), (2, 5, 4), (-1, 0, 5), (9, 0, 5)])
def test_room_is_that_of_files_kept_at_a_time(whole, tmp_path, keep, every, files):
    def look(runner) -> None:
        weights, full = checkpoint.checkpoint_bytes(runner)
        parameters = sum(p.numel() for p in runner.model.parameters()) * 4
        assert full == weights + parameters  # momentum
        need = files * full + weights
        with nearly_full(need):
            hook._require_room(runner)
        with nearly_full(need - 1), refused('checkpoint-no-room-for-run'):
            hook._require_room(runner)
        raise Killed

    cfg = make_cfg(tmp_path, checkpoint=dict(max_keep_ckpts=keep, every_n_iters=every))
    hook = None

    def find(runner) -> None:
        nonlocal hook
        hook = checkpoint.checkpoint_hook(runner)
        look(runner)

    with pytest.raises(Killed):
        train(cfg, DoAt(find, 0))


def test_state_of_an_optimizer_before_its_first_step(tmp_path):
    adam = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))
    sizes = []
    runner = train(
        make_cfg(tmp_path, optim_wrapper=adam),
        DoAt(lambda runner: sizes.append(checkpoint.checkpoint_bytes(runner)), point='before_train'),
    )
    weights, full = checkpoint.checkpoint_bytes(runner)
    # AdamW counts steps too, a number for each tensor.
    assert sizes == [(weights, full - 4 * len(list(runner.model.parameters())))]


def test_disk_that_fills_up_ends_the_run_and_keeps_what_is_there(whole, tmp_path):
    with contextlib.ExitStack() as until_there_is_room:
        fill = DoAt(lambda runner: until_there_is_room.enter_context(nearly_full(1000)), 6)
        with refused('checkpoint-no-room', path=tmp_path / 'epoch_2.pth'):
            train(make_cfg(tmp_path), fill)
    assert names(tmp_path) == ['best_score_epoch_1.pth', 'epoch_1.pth']
    train(make_cfg(tmp_path), resume=True)
    assert_same_checkpoint(whole / LAST, tmp_path / LAST)


def test_leftovers_of_killed_writes_go(tmp_path):
    left = [tmp_path / '.epoch_1.pth.123.tmp', tmp_path / 'logs' / '.events.out.7.tmp']
    other = [tmp_path / 'notes.tmp', tmp_path / '.hidden']
    (tmp_path / 'logs').mkdir()
    for path in (*left, *other):
        path.write_bytes(b'half')
    train(make_cfg(tmp_path))
    assert [path.exists() for path in (*left, *other)] == [False, False, True, True]


def test_within_the_epoch_only_the_newest_is_kept(tmp_path):
    seen = []

    def look(runner) -> None:
        seen.append([name for name in names(tmp_path) if 'best' not in name])

    train(
        make_cfg(tmp_path, checkpoint=dict(every_n_iters=2)),
        *(DoAt(look, step, 'before_train_iter') for step in (2, 4, 5, 7)),
    )
    assert seen == [['iter_2.pth'], ['iter_4.pth'], ['epoch_1.pth'], ['epoch_1.pth', 'iter_7.pth']]
    assert names(tmp_path) == ['best_score_epoch_4.pth', 'epoch_3.pth', LAST]


def test_epochs_between_saves_are_not_saved_for_their_validation(tmp_path):
    train(make_cfg(tmp_path, checkpoint=dict(interval=2, max_keep_ckpts=-1)))
    assert names(tmp_path) == ['best_score_epoch_4.pth', 'epoch_2.pth', LAST]


@pytest.mark.parametrize('point', ('after_train_epoch', 'before_val', 'after_val_epoch'))
def test_stop_between_saves_saves(tmp_path, point):
    changes = dict(checkpoint=dict(interval=2, max_keep_ckpts=-1))
    stopped = stop(make_cfg(tmp_path, **changes), 5, point)
    assert stopped.checkpoint.name == 'epoch_1.pth' and stopped.checkpoint.is_file()


def test_what_a_checkpoint_says_of_its_run(whole):
    loaded = read_checkpoint(whole / LAST)
    assert (loaded['meta']['epoch'], loaded['meta']['iter']) == (4, 20)
    assert {'state_dict', 'optimizer', 'param_schedulers', 'message_hub', 'meta'} == loaded.keys()
    state = loaded['message_hub']['runtime_info']['mmfinetune']
    settings = state.pop('settings')
    assert settings['optim_wrapper']['optimizer']['lr'] == 0.05 and settings['param_scheduler'][1]['milestones'] == [2]
    assert state == {
        'version': 2,
        'epoch_start': {'epoch': 3, 'iter': 15},
        'validated_epoch': 4,
        'early_stop': {},
        'last': LAST,
        'best': {'score': {'score': max(SCORES[:4]), 'file': 'best_score_epoch_4.pth'}},
        'kept': [3, 4],
        'outdated': [],
        'batch_setup': {'processes': 1, 'batch_size': 2, 'accumulation': 1},
    }


def test_gradients_of_an_unfinished_accumulation_are_saved(tmp_path):
    changes = dict(accumulate=2, checkpoint=dict(max_keep_ckpts=-1))
    train(make_cfg(tmp_path, **changes))
    waiting = {n: bool(read_checkpoint(tmp_path / n).get('mmfinetune')) for n in names(tmp_path)}
    # 5 steps an epoch: after epochs 1 and 3 one waits.
    assert waiting == {
        'epoch_1.pth': True,
        'epoch_2.pth': False,
        'epoch_3.pth': True,
        LAST: False,
        'best_score_epoch_4.pth': False,
    }


def test_resume_in_a_copy_leaves_the_original_alone(whole, tmp_path):
    stop(make_cfg(tmp_path / 'one'), 11)
    before = names(tmp_path / 'one')
    assert 'best_score_epoch_2.pth' in before
    shutil.copytree(tmp_path / 'one', tmp_path / 'copy')
    train(make_cfg(tmp_path / 'copy'), resume=True)
    assert names(tmp_path / 'one') == before
    assert names(tmp_path / 'copy') == names(whole)


def test_lost_best_checkpoint_is_replaced_by_the_next(tmp_path, capsys):
    stop(make_cfg(tmp_path), 11)
    (tmp_path / 'best_score_epoch_2.pth').unlink()
    stop(make_cfg(tmp_path), 16, resume=True)
    assert 'best_score_epoch_2.pth is not there' in capsys.readouterr().out
    assert 'best_score_epoch_3.pth' in names(tmp_path)


def test_first_ctrl_c_saves_and_the_second_does_not_wait(tmp_path):
    def twice(runner) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        # A launcher's echo of the first is no second one.
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make_cfg(tmp_path), DoAt(twice, 6))
    assert signal.getsignal(signal.SIGINT) is handler
    assert names(tmp_path) == ['best_score_epoch_1.pth', 'epoch_1.pth']


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def test_signals_are_given_back_after_the_run(tmp_path):
    before = [signal.getsignal(n) for n in SIGNALS]
    train(make_cfg(tmp_path))
    assert [signal.getsignal(n) for n in SIGNALS] == before and signal.set_wakeup_fd(-1) == -1


def test_a_signal_while_signals_are_given_back(monkeypatch):
    hook = stop_hook._Stop()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    hook._before = dict(before)
    real = signal.signal

    def interrupted(number, handler):
        if hook._before:
            hook.release()
        return real(number, handler)

    monkeypatch.setattr(stop_hook.signal, 'signal', interrupted)
    hook.release()
    assert not hook._before and before == {number: signal.getsignal(number) for number in SIGNALS}


def test_a_closed_terminal_saves_the_run_unless_it_was_started_with_nohup(tmp_path):
    assert stop(make_cfg(tmp_path / 'a'), 6, number=signal.SIGHUP).checkpoint.name == 'iter_7.pth'
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train(make_cfg(tmp_path / 'b'), DoAt(signal.SIGHUP, 6)).iter == 20
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


CLOSED = """
import os, pty, signal, sys
from mmfinetune.engine.hooks.stop import leave_closed_terminal
main, side = pty.openpty()
reader, writer = os.pipe()
os.dup2(side, 1)
os.dup2(writer, 2)
os.close(side), os.close(writer)
leave_closed_terminal()
assert os.isatty(1)
os.close(main), os.close(reader)
leave_closed_terminal()
os.write(1, b'nobody reads this')
os.write(2, b'nor this')
os._exit(7)
"""


def test_outputs_that_nobody_reads_any_more():
    assert subprocess.run([sys.executable, '-c', CLOSED], check=False).returncode == 7


@pytest.mark.parametrize('another', (False, True))
@pytest.mark.parametrize('point', ('after_train_iter', 'before_val_epoch'))
def test_a_work_dir_that_is_removed_under_the_run(tmp_path, another, point):
    def remove(runner) -> None:
        shutil.rmtree(runner.work_dir)
        if another:
            Path(runner.work_dir).mkdir()

    work_dir = tmp_path / 'run'
    with refused('work-dir-gone', work_dir=str(work_dir)):
        train(make_cfg(work_dir), DoAt(remove, point=point))
    assert not list(tmp_path.rglob('*.pth'))


def test_stop_without_a_hook_that_saves(tmp_path):
    cfg = make_cfg(tmp_path)
    cfg.default_hooks.checkpoint = None
    stopped = stop(cfg, 6)
    assert stopped.checkpoint is None and 'nothing is saved' in str(stopped)


def test_run_counted_in_iterations_is_stopped_and_goes_on(tmp_path):
    changes = dict(
        checkpoint=dict(by_epoch=False, interval=4),
        param_scheduler=None,
        train_dataloader=dict(sampler=dict(type='InfiniteSampler', shuffle=True)),
    )
    cfg = make_cfg(tmp_path, **changes)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=10, val_interval=10)
    assert stop(cfg, 5).checkpoint.name == 'iter_6.pth'
    assert train(cfg, resume=True).iter == 10


def test_a_signal_within_the_handler_of_another_is_not_lost(monkeypatch):
    hook = stop_hook._Stop()
    seen = []

    def interrupted() -> float:
        # SIGINT comes while SIGTERM is being noted.
        if not seen:
            seen.append(signal.SIGINT)
            hook._note(signal.SIGINT, None)
        return 0.0

    monkeypatch.setattr(stop_hook.time, 'monotonic', interrupted)
    hook._note(signal.SIGTERM, None)
    assert hook._signal


@pytest.mark.parametrize(
    ('settings', 'code'),
    [
        (dict(by_epoch=False, every_n_iters=3), 'checkpoint-every-n-iters'),
        (dict(save_best='score'), 'checkpoint-rule'),
        (dict(save_best='score', rule='more'), 'checkpoint-rule'),
        (dict(save_best=['a', 'b', 'c'], rule=['less', 'less']), 'checkpoint-rule'),
    ],
)
def test_settings_that_contradict_each_other(settings, code):
    with refused(code):
        checkpoint.SafeCheckpointHook(**settings)


@pytest.mark.parametrize(
    ('settings', 'rules'),
    [
        (dict(save_best='coco/segm_mAP'), {'coco/segm_mAP': 'greater'}),
        (dict(save_best=['a_loss', 'x'], rule='less'), {'a_loss': 'less', 'x': 'less'}),
        (dict(save_best=['loss', 'acc']), {'loss': 'less', 'acc': 'greater'}),
        (dict(save_best='auto'), {'auto': None}),
        (dict(), {}),
    ],
)
def test_which_score_is_better(settings, rules):
    assert checkpoint.SafeCheckpointHook(**settings).best_rules == rules


def test_best_of_the_first_metric_by_auto_and_where_less_is_better(tmp_path):
    evaluator = dict(type='ToyMetric', names=['loss', 'acc'])
    cfg = make_cfg(tmp_path, checkpoint=dict(save_best='auto', rule=None), val_evaluator=evaluator)
    stop(cfg, 11)
    train(cfg, resume=True)
    assert 'best_loss_epoch_1.pth' in names(tmp_path) and not any('acc' in name for name in names(tmp_path))


def test_best_by_a_metric_that_is_not_there(tmp_path):
    with refused('checkpoint-no-metric', metric='mAP') as caught:
        train(make_cfg(tmp_path, checkpoint=dict(save_best='mAP')))
    assert caught.value.problems == ['score']


def test_published_copies_are_named_by_their_hash(tmp_path):
    train(make_cfg(tmp_path, checkpoint=dict(published_keys=['state_dict'])))
    published = [path for path in tmp_path.glob('*.pth') if hash_in_name(path)]
    assert [path.name.rpartition('-')[0] for path in sorted(published)] == ['best_score_epoch_4', 'epoch_4']
    for path in published:
        assert sha256_of(path).startswith(hash_in_name(path))
        assert read_checkpoint(path).keys() == {'state_dict'}


def test_checkpoints_in_another_folder(whole, tmp_path):
    cfg = make_cfg(tmp_path / 'run', checkpoint=dict(out_dir=str(tmp_path / 'store')))
    stop(cfg, 7)
    assert Path((tmp_path / 'run/last_checkpoint').read_text()) == tmp_path / 'store/run/iter_8.pth'
    train(cfg, resume=tmp_path / 'store/run/iter_8.pth')
    assert names(tmp_path / 'store/run') == names(whole) and names(tmp_path / 'run') == []
