"""Mutations of valid files that leave them nearly valid."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import zipfile
from typing import Any

from tests.fuzz import independent

HUGE = 2**63
HOSTILE_TEXTS = (
    "",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "x" * 300,
    "NaN",
    "1e400",
    "9" * 5000,
    "[" * 3000,
    "[[]]",
    "{}",
)
HOSTILE_VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 16, 64, 2**31, HUGE, HUGE - 1, 2**64, 10**30, 0.0, 0.5, -0.5, 1e308, 1e-320),
    *(True, None, [], {}, [[]], [0, 0], [1, 2, 3], {"a": 1}, "F16", "F32", "I32", "F64", "BOOL", "C64", "U8"),
    *HOSTILE_TEXTS,
)
TOKENS = (
    b"NaN",
    b"1e400",
    b"-1",
    b"18446744073709551615",
    b"\\u002c",
    b"\\ud800",
    b"[[[[[[",
    b'"',
    b"\\",
    b"\0",
    b"\xff",
)
RAW_VALUES = (b"[" * 50_000, b"9" * 5000, b"NaN", b"1e400", b"-0", b'{"a":1,"a":1}', b"[", b"1.0", b"", b"[1,]", b"tru")
"""Texts that ``json`` does not write."""
LENGTHS = (0, 1, 7, 8, 4088, 4096, 8184, 2**31, HUGE, 2**64 - 1, 100_000_000, 99_999_992)


NUDGES = (-8, -4, -1, 1, 4, 8)


def some_bytes(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """Return a file after one to four changes that ignore its format."""
    changed = bytearray(content)
    if changed and rng.random() < 0.3:  # a single bit, anywhere
        end = 8 + int.from_bytes(content[:8], "little")
        parts = [(0, len(content)), (0, len(content[:end].rstrip(b" "))), (end, len(content))]
        begin, end = rng.choice([part for part in parts if part[0] < part[1]])
        changed[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        if rng.random() < 0.5:  # where the header is, most of the time
            at = min(at, rng.randrange(2000))
        _change(rng, changed, at, other)
    return bytes(changed)


def _change(rng: random.Random, changed: bytearray, at: int, other: bytes) -> None:
    length = min(1 << rng.randrange(12), len(changed))
    kind = rng.randrange(9)
    if kind <= 1 and changed:
        changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
    elif kind == 2 and changed:
        changed[min(at, len(changed) - 1)] = rng.choice(b'\x00\xff\x7f\x80 09{}[]",:-.e')
    elif kind == 3:
        changed[:8] = rng.choice(LENGTHS).to_bytes(8, "little")
    elif kind == 4:
        del changed[at : at + length]
    elif kind == 5:
        changed[at:at] = changed[at : at + length]
    elif kind == 6:
        changed[at:at] = rng.choice(TOKENS)
    elif kind == 7:
        del changed[at:]
    else:
        begin = rng.randrange(len(other) + 1)
        changed[at : at + length] = other[begin : begin + length]


def header(rng: random.Random, content: bytes, alignment: int = 8) -> bytes:
    """Return a file with one value of its header changed, also inside of texts that are JSON again; lengths match."""
    length = int.from_bytes(content[:8], "little")
    try:
        tree = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return some_bytes(rng, content, content)
    data = content[8 + length :]
    if rng.random() < 0.8:
        _change_tree(rng, tree)
    if rng.random() < 0.3 and isinstance(tree, dict) and len(tree) > 2:  # exchange two entries
        names = list(tree)
        one, two = rng.sample(names[1:], 2)
        tree[one], tree[two] = tree[two], tree[one]
    text = json_bytes(tree)
    if rng.random() < 0.1:
        text = text[:-1] + b"," + text[1:]
    if rng.random() < 0.1:
        text = _with_raw_value(rng, text)
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + bytes(rng.randrange(20))
    if rng.random() < 0.5:
        text = with_digest(text)
    padded = text.ljust(max(length, -(-(8 + len(text)) // alignment) * alignment - 8))
    return len(padded).to_bytes(8, "little") + padded + data


def _with_raw_value(rng: random.Random, text: bytes) -> bytes:
    """Replace one value before a comma or a closing bracket by a text that is not a JSON value."""
    begin = rng.choice([found.end() for found in re.finditer(rb"[:\[]", text)] or [0])
    end = min((at for mark in (b",", b"}", b"]") if (at := text.find(mark, begin)) >= 0), default=len(text))
    return text[:begin] + rng.choice(RAW_VALUES) + text[end:]


def json_bytes(tree: Any) -> bytes:
    """Return JSON as the package writes it; lone surrogates, which the package refuses, pass."""
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def with_digest(text: bytes) -> bytes:
    """Return a header with the matching digest of its layout, if it has a layout."""
    try:
        tree = json.loads(text)
        facts = tree["__metadata__"]
        names = ("gammas", "sigma_rels", "checkpoint_dtype", "tensors")
        facts["layout_sha256"] = hashlib.sha256(json_bytes({name: facts[name] for name in names})).hexdigest()
        return json_bytes(tree)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def sealed(content: bytes) -> bytes:
    """Return a snapshot file with all its checksums made to match."""
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        if end > len(content) or end > 10**6:
            return content
        blob = content[:end]
        try:
            facts = json.loads(blob[8:])["__metadata__"]
            crcs = json_bytes(independent.chunk_crc32(content, max(16, int(facts["chunk_bytes"]))))
            old = json_bytes(facts["crc32"])
            if len(crcs) <= 20 * 1024:
                changed = blob.rstrip(b" ").replace(b'"crc32":' + old, b'"crc32":"' + crcs + b'"')
                blob = changed.ljust(end) if len(changed) <= end else blob
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            pass
        at = blob.index(b'"header_crc32":"') + 16
        return blob[:at] + independent.header_crc32(blob).encode() + blob[at + 8 :] + content[end:]
    except ValueError:
        return content


def archive(rng: random.Random, content: bytes, other: bytes = b"") -> bytes:
    """Return a torch file with one member changed, as a valid archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            parts = [(member.filename, old.read(member)) for member in old.infolist()]
    except Exception:
        return some_bytes(rng, content, other)
    number = rng.randrange(len(parts)) if rng.random() < 0.4 else 0  # data.pkl comes first
    name, part = parts[number]
    parts[number] = name, some_bytes(rng, part, rng.choice(parts)[1])
    if rng.random() < 0.1:
        parts.append((rng.choice(parts)[0] + rng.choice(("", "x", "/../../x")), part))
    if rng.random() < 0.05:
        del parts[number]
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as new:
        names = set()
        for name, part in parts:
            if name not in names:
                new.writestr(zipfile.ZipInfo(name), part, compress_type=kind)
            names.add(name)
    return file.getvalue()


def _change_tree(rng: random.Random, tree: Any) -> None:
    """Replace, remove, copy or nudge one value in a tree of JSON, also inside of texts that are JSON."""
    places = [(tree, key) for key in _keys(tree)]
    for holder, key in places:
        if len(places) < 400:
            places += [(holder[key], inner) for inner in _keys(holder[key])]
    if not places:
        return
    holder, key = rng.choice(places)
    facts = tree.get("__metadata__") if isinstance(tree, dict) else None
    if _keys(facts) and rng.random() < 0.5:  # few of the values, but most checks depend on them
        holder, key = facts, rng.choice(list(_keys(facts)))
    value = holder[key]
    kind = rng.randrange(6)
    if isinstance(value, str) and value[:1] in ("[", "{") and kind < 3:
        inner = json.loads(value) if _is_json(value) else value
        _change_tree(rng, inner)
        holder[key] = json.dumps(inner, separators=(",", ":"), ensure_ascii=False)
    elif kind == 0 and isinstance(holder, dict):
        holder[rng.choice(HOSTILE_TEXTS)] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and type(value) is int:
        holder[key] = value + rng.choice(NUDGES)
    elif kind in (2, 3, 4) and isinstance(value, list) and all(type(each) is int for each in value):
        nudge = rng.choice(NUDGES)
        holder[key] = [each + nudge for each in value]
    elif kind == 2 and isinstance(value, str) and value.isdecimal() and len(value) < 20:
        holder[key] = str(int(value) + rng.choice(NUDGES))
    elif kind == 3 and isinstance(value, str):
        holder[key] = rng.choice((str, json.dumps))(rng.choice(HOSTILE_VALUES))
    elif kind == 4:
        holder[key] = holder[rng.choice(list(_keys(holder)))]
    else:
        holder[key] = rng.choice(HOSTILE_VALUES)


def _keys(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (list, dict))
    except (ValueError, RecursionError):
        return False
