"""No check is blind: with any line of the protocol taken away, the one that watches over it fails."""

from __future__ import annotations

import pytest

from tests.crash.mutations import MUTATIONS, notices
from tests.crash.subject import NoSuchLine, load_subject


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.missing)
def test_check_fails_without(mutation):
    assert notices(mutation.seen_by, mutation.edits)


@pytest.mark.parametrize("check", ["disk that forgets, in order", "ranks that disagree", "taken temporary name",
                                   "streaming a changed chunk", "slot of a failed write"])  # fmt: skip
def test_check_passes_with_every_line_there(check):
    assert notices(check, {}) is None


def test_mutation_of_a_line_that_is_not_there_is_told():
    with pytest.raises(NoSuchLine, match="0 times, expected once"):
        load_subject({"snapshots.store": [("no such line", "")]})
