"""The fingerprint of an evaluation function: whether an earlier result is one that this function would return, too.

Python has no test of whether two functions compute the same. A fingerprint has a digest of each *part* that the result
may depend on: the bytecode and constants of the function and of the user's functions that it calls, defaults, and the
values of closures, global names and attributes that they use. Numbers, text and collections of them count by value, and
so do configurations (dataclasses, namespaces). Everything else (tensors, loaders, models) counts by its type. Functions
of installed packages count by name.

Evaluations may change a part themselves, such as a list to which each of them appends. Such a part is marked as
``OWN_STATE`` when the result is recorded, and is not compared.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import os
import sysconfig
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Fingerprint = Mapping[str, str]
"""Digest of each part, by a name that a user recognizes."""

OWN_STATE = ""
"""Stands for the digest of a part that evaluations have changed."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, PurePath, Enum, np.generic, np.dtype)
_TORCH_PLAIN = ("dtype", "device", "Size")
_MOST_ITEMS = 10_000  # of a collection that counts by value
_MOST_DEPTH = 8  # of nested collections
_MOST_PARTS = 1_000  # further functions count by name
_PACKAGE = os.path.join(Path(__file__).parents[1], "")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


def fingerprint(evaluate: Callable[..., Any]) -> Fingerprint:
    """Return the fingerprint of a function, a method, a ``functools.partial`` or an object that can be called."""
    parts = _Parts()
    parts.add("evaluate", evaluate)
    return dict(sorted(parts.found.items()))


def differences(one: Fingerprint, other: Fingerprint) -> list[str]:
    """Return the names of the parts in which two fingerprints differ; an empty list if results may be shared."""
    return [
        name
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name) and OWN_STATE not in (one.get(name), other.get(name))
    ]


class _Parts:
    """Collects the parts of a callable. Each function and each object is visited once."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._visited: set[int] = set()

    def add(self, name: str, value: Any) -> None:
        """Add a value under a name, with all that it depends on if it is the user's own code."""
        value = _unwrapped(value)
        if isinstance(value, partial):
            self.add(name, value.func)
            for place, argument in [*enumerate(value.args), *value.keywords.items()]:
                self.add(f"{name}: argument {place}", argument)
        elif (method := _own_method(value)) and self._visits(value if method is value else method.__self__):
            self._add_method(name, method)
        elif _is_own(value) and self._visits(value):
            self._add_function(name, value)
        elif isinstance(value, type) and any(map(_is_own, vars(value).values())) and self._visits(value):
            self.found[name] = _digest(_named(value))
            for member, each in vars(value).items():
                if _is_own(each) or (isinstance(each, _PLAIN) and not member.startswith("__")):
                    self.add(f"{name}.{member}", each)
        else:
            self.found.setdefault(name, _digest(_text(value)))

    def _visits(self, value: Any) -> bool:
        """Return whether a function or object is visited for the first time, and may be: there is a limit."""
        if id(value) in self._visited or len(self.found) >= _MOST_PARTS:
            return False
        self._visited.add(id(value))
        return True

    def _add_function(self, name: str, function: FunctionType) -> None:
        code = function.__code__
        self.found[name] = _digest(_code_text(code))
        for parameter in inspect.signature(function, follow_wrapped=False).parameters.values():
            if parameter.default is not parameter.empty:
                self.add(f"{name}: default of {parameter.name}", parameter.default)
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # the variable has no value yet
                self._add_variable(f"{name}: {variable}", cell.cell_contents, code)
        for variable in sorted(_globals_of(code) & function.__globals__.keys()):
            self._add_variable(f"{name}: {variable}", function.__globals__[variable], code)

    def _add_variable(self, name: str, value: Any, code: CodeType) -> None:
        """Add a global or closure variable of a function; of the user's own modules, the names that it uses."""
        self.add(name, value)
        if isinstance(value, ModuleType) and not _is_library(getattr(value, "__file__", None) or "<built-in>"):
            for used in sorted(_names_of(code) & vars(value).keys()):
                self.add(f"{name}.{used}", vars(value)[used])

    def _add_method(self, name: str, method: MethodType) -> None:
        """Add a method, and the other methods and the attributes of its object that it uses, directly or not."""
        self._add_function(name, function := _unwrapped(method.__func__))
        due, used = [function], set[str]()
        while due:
            for each in sorted(_names_of(due.pop().__code__) - used):
                used.add(each)
                value = inspect.getattr_static(method.__self__, each, _ABSENT)  # runs no property
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                value = _unwrapped(value)
                if value is not _ABSENT:
                    self.add(f"{name}: {each}", value)
                    due += [value] if _is_own(value) else []


_ABSENT = object()


def _unwrapped(value: Any) -> Any:
    """Return the user's function below a decorator of a library, such as ``torch.no_grad()``; else the value."""
    return inspect.unwrap(value) if isinstance(value, FunctionType) and not _is_own(value) else value


def _own_method(value: Any) -> MethodType | None:
    """Return a bound method of the user's, or ``__call__`` of an object of a class of the user's; else None."""
    if not isinstance(value, (MethodType, FunctionType, type)) and callable(value):
        value = getattr(value, "__call__", None)  # noqa: B004 - the method itself is wanted
    return value if isinstance(value, MethodType) and _is_own(_unwrapped(value.__func__)) else None


def _is_own(value: Any) -> bool:
    """Return whether a value is a function of the user's: not of Python, of a package or of this library."""
    return isinstance(value, FunctionType) and not _is_library(value.__code__.co_filename)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and the code of all functions that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names_of(code: CodeType) -> set[str]:
    """Return all global names and attributes that a function and the functions inside it use."""
    return {name for each in _codes(code) for name in each.co_names}


def _globals_of(code: CodeType) -> set[str]:
    return {
        instruction.argval
        for each in _codes(code)
        for instruction in dis.get_instructions(each)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _code_text(code: CodeType) -> str:
    constants = [_code_text(each) if isinstance(each, CodeType) else _text(each) for each in code.co_consts]
    exceptions = getattr(code, "co_exceptiontable", b"")  # Python 3.10 has it in the bytecode
    return repr((code.co_code, exceptions, constants, code.co_names, code.co_freevars))


def _text(value: Any, depth: int = 0) -> str:
    """Return a text that is equal for equal values, of plain types and collections of them, and for equal types."""
    kind = _named(type(value))
    if isinstance(value, _PLAIN) or (type(value).__module__ == "torch" and type(value).__name__ in _TORCH_PLAIN):
        return f"{kind} {value!r}"
    if _is_own(value):
        return _code_text(value.__code__)
    if isinstance(value, ModuleType) or callable(value):
        return _named(value)
    if isinstance(value, (Namespace, SimpleNamespace)):
        value = vars(value)
    elif is_dataclass(value):
        value = {each.name: getattr(value, each.name, None) for each in fields(value)}
    if isinstance(value, Mapping) and len(value) <= _MOST_ITEMS and depth < _MOST_DEPTH:
        items = (f"{_text(name, depth + 1)}: {_text(each, depth + 1)}" for name, each in value.items())
        return f"{kind} {{{', '.join(items)}}}"
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _MOST_ITEMS and depth < _MOST_DEPTH:
        texts = [_text(each, depth + 1) for each in value]
        return f"{kind} {sorted(texts) if isinstance(value, (set, frozenset)) else texts}"
    return kind


def _named(value: Any) -> str:
    """Return the name of a type, module, function or any other object that is compared by its name."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    return f"{getattr(value, '__module__', None) or type(value).__module__}.{name}"


def _is_library(path: str) -> bool:
    """Return whether a file is part of Python, of an installed package or of this library."""
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)
    return is_installed or path.startswith((_STANDARD_LIBRARY, _PACKAGE, "<frozen", "<built-in"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
