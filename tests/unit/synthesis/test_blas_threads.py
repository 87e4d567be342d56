from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
from nitrous_ema.synthesis.blas_threads import _library, one_thread_per_product
read, write = _library()
write(3)
print(read())
with one_thread_per_product():
    print(read())
    with one_thread_per_product():
        print(read())
    print(read())
print(read())
try:
    with one_thread_per_product():
        raise KeyError
except KeyError:
    print(read())
"""


def test_threads_of_the_library_are_what_they_were_when_the_last_user_is_gone():
    """In a process of its own: the number belongs to all of a process."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    found = done.stdout.split()
    if found[0] == "1":
        pytest.skip("numpy's BLAS library is unknown, or has no threads")
    assert found == ["3", "1", "1", "1", "3", "3"]
