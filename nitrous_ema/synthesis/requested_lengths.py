"""The requested lengths of a synthesis, as fractions of the training time and as exponents."""

from __future__ import annotations

from collections.abc import Sequence

from nitrous_ema._base.arguments import check_sequence
from nitrous_ema.profile import checked_lengths, gamma_to_sigma_rel, sigma_rel_to_gamma


def lengths_of(
    gammas: Sequence[float] | None,
    sigma_rels: Sequence[float] | None,
    names: tuple[str, str] = ("gammas", "sigma_rels"),
) -> list[tuple[float, float]]:
    """Return (sigma_rel, gamma) of each requested length.

    Only the missing one of the two is computed. The other is unchanged to the bit, because file names contain it.

    Args:
        gammas: The lengths as exponents, or
        sigma_rels: as fractions of the training time.
        names: Names of the two arguments as the user passes them, for messages.

    Raises:
        ValueError: Both or neither of gammas and sigma_rels, no length, or one outside its domain.
        TypeError: A single length or text instead of a sequence.
    """
    lengths: list[tuple[float, float]] = []
    if (gammas is None) == (sigma_rels is None):
        raise ValueError(
            f"pass exactly one of {names[0]} and {names[1]}; got {'neither' if gammas is None else 'both'} of them."
        )
    for name, sequence in zip(names, (gammas, sigma_rels), strict=True):
        if sequence is not None:
            check_sequence(name, sequence)
    if gammas is not None:
        lengths = [(float(gamma_to_sigma_rel(gamma)), float(gamma)) for gamma in gammas]
    elif sigma_rels is not None:
        sigma_rels = list(sigma_rels)
        checked_lengths(names[1], sigma_rels)
        lengths = [(float(sigma_rel), float(sigma_rel_to_gamma(sigma_rel))) for sigma_rel in sigma_rels]
    if not lengths:
        raise ValueError("no length was requested; pass at least one sigma_rel or gamma.")
    return lengths
