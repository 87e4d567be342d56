"""The search for a run that training could have resumed, when a new run begins in a used folder."""

from __future__ import annotations

import logging

from nitrous_ema.errors import SnapshotError, SnapshotNotFound
from nitrous_ema.snapshots.store import SnapshotStore

_log = logging.getLogger(__name__)


def resumable_run_warning(store: SnapshotStore, run: str) -> str | None:
    """Return a warning for a run that begins in a folder where another run has snapshots, else None.

    Args:
        store: The snapshot folder.
        run: Id of the run that begins.
    """
    try:
        newest = store.get()
    except SnapshotNotFound:
        return None
    except SnapshotError as error:  # such as a run of another user, who has kept others from it
        _log.warning("%s: the search for runs to resume failed: %s", store.root, error)
        return None
    except Exception:  # no reason to end a training that has just begun
        _log.warning("%s: the search for runs to resume failed", store.root, exc_info=True)
        return None
    if newest.run == run:
        return None
    # Not always this one: the other may have written its first snapshot since, or have the last name that there is.
    selected = "this one as soon as it has a snapshot" if run > newest.run else newest.run
    return (
        f"This run, {run}, begins anew in {store.root}, where run {newest.run} has snapshots up to step "
        f"{newest.step}. To continue run {newest.run} instead, call ema.load_state_dict(...) with your saved state, or "
        "ema.restore(), before the first update(). The two runs are never mixed: readers select the newest run, which "
        f"is {selected}; pass run= to select the other."
    )
