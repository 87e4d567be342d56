"""The header of a safetensors file, as anybody may have written it: read within bounds, whatever it says of itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nitrous_ema.snapshots.bounded_json import parse_json
from nitrous_ema.snapshots.format import MAX_HEADER_BYTES, MAX_HEADER_VALUES
from nitrous_ema.snapshots.torch_files import open_regular


def read_header(path: Path) -> tuple[Any, int, int]:
    """What a file says of its tensors.

    Returns:
        The header, of whatever JSON type; where the tensors begin, in bytes; and the file's size.

    Raises:
        ValueError: It is no such file.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(f"its header would be {header_bytes} of {file_bytes} bytes")
        return parse_json(file.read(header_bytes), max_values=MAX_HEADER_VALUES), 8 + header_bytes, file_bytes
