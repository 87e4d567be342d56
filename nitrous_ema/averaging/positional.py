"""Refuse lengths that are passed by position where an exponent is expected.

Other libraries have lengths in these places: ``PostHocEMA(model, ema_model, sigma_rels)`` in ema-pytorch. Taken as an
exponent, a usual length such as 0.07 is an average over nearly the whole training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ParamSpec, TypeVar

from nitrous_ema.profile import SIGMA_REL_LIMIT, gamma_to_sigma_rel

_P = ParamSpec("_P")
_R = TypeVar("_R")


def refuse_length_by_position(place: int, exponent: str, length: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator: what can only be a length raises ValueError as the positional argument of an exponent.

    Args:
        place: Place of the argument, counted from ``self``.
        exponent: Its name.
        length: The name of the argument for lengths.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            value: Any = args[place] if len(args) > place else None
            if values := _lengths(value):
                raise ValueError(
                    f"{exponent} is {value!r}, passed by position. An exponent of {values[0]:g} is a length of "
                    f"{gamma_to_sigma_rel(values[0]):.3g}, nearly the plain mean. Pass {length}={value!r} if it is the "
                    f"length, or {exponent}={value!r} if it is the exponent."
                )
            return function(*args, **kwargs)

        return checked

    return decorate


def _lengths(value: Any) -> list[float]:
    """Return a number, or each of several, if all are in the range of lengths; else an empty list."""
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [value]
    is_length = [isinstance(each, Real) and 0 < float(each) < SIGMA_REL_LIMIT for each in values]
    return [float(each) for each in values] if all(is_length) else []
