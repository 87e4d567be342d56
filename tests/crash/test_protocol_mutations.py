"""Every check is effective: with any line of the protocol removed, the check for that line fails."""

from __future__ import annotations

import pytest

from tests.crash.mutations import MUTATIONS, notices
from tests.crash.subject import NoSuchLine, load_subject


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.removed)
def test_check_fails_without(mutation):
    assert notices(mutation.noticed_by, mutation.edits)


@pytest.mark.parametrize("check", ["disk that forgets, in order", "ranks that disagree", "taken temporary name",
                                   "streaming a changed chunk", "slot of a failed write"])  # fmt: skip
def test_check_passes_on_the_unchanged_code(check):
    assert notices(check, {}) is None


def test_mutation_of_a_missing_line_is_an_error():
    with pytest.raises(NoSuchLine, match="0 times, expected once"):
        load_subject({"snapshots.store": [("no such line", "")]})
