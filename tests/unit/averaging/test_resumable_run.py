"""A new run in a used folder: the warning for a training that forgot to resume."""

from __future__ import annotations

import errno
import os
import warnings
from datetime import datetime, timedelta, timezone

import pytest

from nitrous_ema import KarrasEMA, NitrousWarning, SnapshotStore
from nitrous_ema.averaging import lineage
from nitrous_ema.averaging.resumable_run import resumable_run_warning
from nitrous_ema.snapshots.names import new_run_id
from tests.support.fakes import TIMEOUT_SECONDS
from tests.support.models import Net
from tests.support.restored_runs import CLASSES, file_of, saved, train


@pytest.mark.parametrize("cls", CLASSES)
def test_forgetting_to_resume_is_warned_of_once_at_the_first_update(cls, make):
    first = make(Net(), cls, checkpoint_every_num_steps=3)
    train(first, range(1, 8))
    first.flush(TIMEOUT_SECONDS)
    second = make(Net(), cls, checkpoint_every_num_steps=1)
    with pytest.warns(NitrousWarning, match="begins anew") as caught:
        second.update()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for words in (f"run, {second.run},", f"run {first.run} has snapshots up to step 6", "load_state_dict", "restore()"):
        assert words in str(caught[0].message)
    train(second, range(2, 5))  # warnings are errors here
    second.load_state_dict(saved(second))
    second.update()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", ["restore", "load", "empty folder", "karras"])
def test_no_warning_where_a_run_resumes_or_has_nothing_to_resume(how, cls, make, tmp_path):
    first = make(Net(), cls)
    train(first, range(1, 4))
    if how != "empty folder":
        first.checkpoint()
        first.flush(TIMEOUT_SECONDS)
    ema = KarrasEMA(Net(), sigma_rel=0.1) if how == "karras" else make(Net(), cls)
    if how == "restore":
        ema.restore()
    if how == "load":
        ema.load_state_dict(saved(first))
    ema.update()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("how", ["begins", "loads a state of its own lineage"])
def test_run_is_read_although_the_clock_of_an_earlier_run_was_ahead(how, cls, make, monkeypatch):
    with monkeypatch.context() as ahead:
        now = datetime.now(timezone.utc) + timedelta(hours=1)
        ahead.setattr(lineage, "new_run_id", lambda: new_run_id(now))
        first = make(Net(), cls)
    train(first, range(1, 4))
    first.checkpoint()
    first.close()
    other = make(Net(), cls)
    state = saved(other)
    second = make(Net(), cls, checkpoint_every_num_steps=1)
    if how == "begins":
        with pytest.warns(NitrousWarning, match=r"readers select the newest run, which is this one"):
            second.update()
    else:
        second.load_state_dict(state)
        second.update()
    second.close()
    assert first.run < second.run == SnapshotStore(second.checkpoint_folder).get().run


def test_warning_that_is_an_error_counts_nothing(make):
    first = make(Net())
    train(first, range(1, 4))
    first.checkpoint()
    second = make(Net())
    with pytest.raises(NitrousWarning, match="begins anew"):
        second.update()
    assert (second.step, second.initted) == (0, False)
    second.restore()
    second.update()
    assert second.step == 4


def test_warning_names_the_run_that_readers_select(make):
    first = make(Net())
    train(first, range(1, 4))
    first.checkpoint()
    older, newer = "20000101T000000.000000-00000000", "29990101T000000.000000-00000000"
    assert f"select the newest run, which is {first.run};" in resumable_run_warning(first.snapshots, older)
    assert "the newest run, which is this one as soon" in resumable_run_warning(first.snapshots, newer)


@pytest.mark.parametrize("trouble", ["damaged", "cannot be listed"])
def test_folder_that_cannot_be_read_is_logged_only(trouble, make, caplog, monkeypatch):
    first = make(Net())
    train(first, range(1, 4))
    first.checkpoint()
    second = make(Net())
    if trouble == "damaged":
        os.truncate(file_of(first, 3), 100)
    else:

        def refuse(path):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(second.snapshots.files, "list", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.update()
    assert "the search for runs to resume failed" in caplog.text
    assert second.step == 1
    monkeypatch.undo()
