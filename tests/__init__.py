"""The tests. A package, so that they can share `tests.fakes` and `tests.peers` whatever else is installed."""
