"""The tests; a package, so that modules of tests can import `tests.support`."""
