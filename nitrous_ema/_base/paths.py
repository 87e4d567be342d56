"""Paths as users write them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# With one slash too: pathlib.Path has shortened "s3://bucket" to "s3:/bucket". Drives of Windows have one letter.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(name: str, path: Any) -> Path:
    """Return a path of this machine, with ``~`` replaced by the home folder.

    Args:
        name: The argument's name, for the message.
        path: The path.

    Raises:
        TypeError: It is neither a string nor a path.
        ValueError: It is empty, holds a null character, is a URL, or names the home folder of an unknown user.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise TypeError(f"{name} is {path!r}; expected a path, as a string or a pathlib.Path.")
    if not text or "\0" in text:
        raise ValueError(f"{name} is {text!r}; expected the path of a folder or file.")
    # Without this, a folder of that name would be created below the working directory.
    if _URL.match(text):
        raise ValueError(
            f"{name} is {text!r}, a URL; expected a path of this machine. Mount the storage, or use a local folder and "
            "copy it."
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name} is {text!r}: {error}. Write the path in full.") from error
