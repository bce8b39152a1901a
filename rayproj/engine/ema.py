"""Averages of the weights whose length is chosen afterwards (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3 and appendix C).

The average of power-function profile at step t weighs the weights of step τ by τ^γ / ∫ τ^γ. Its width σ_rel is the standard
deviation of that profile relative to t: a width of 0.1 averages over about the last tenth. Snapshots of averages of some
widths span those of others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Track = tuple[float, float]
"""(step, σ_rel) of a snapshot."""


def exponent(width: float) -> float:
    """γ of a width σ_rel: the positive root of γ³ + 7γ² + (16 - σ⁻²) γ + 12 - σ⁻² (appendix C.2)."""
    roots = np.roots([1.0, 7.0, 16.0 - width**-2, 12.0 - width**-2])
    return float(roots[np.isreal(roots)].real.max())


def decay(step: int, width: float) -> float:
    """β of the update that makes the average of step `step`, from 1: (1 - 1/t)^(γ + 1) (eq. 2)."""
    return float((1.0 - 1.0 / step) ** (exponent(width) + 1.0))


def overlap(a: Track, b: Track) -> float:
    """∫ of the product of two profiles (appendix C.3)."""
    (t, p), (s, q) = (a[0], exponent(a[1])), (b[0], exponent(b[1]))
    later, power = (s, q) if s > t else (t, p)
    return (p + 1) * (q + 1) / (p + q + 1) * (min(t, s) / later) ** power / later


def combination(snapshots: Sequence[Track], wanted: Track) -> tuple[np.ndarray, float]:
    """How to sum snapshots to an average of another width, by least squares over the profiles.

    Returns:
        float64 [snapshots] weights that sum to 1, and the relative error of the profile, |Σ xᵢ pᵢ - p| / |p|.
    """
    known = np.array([[overlap(a, b) for b in snapshots] for a in snapshots])
    sought = np.array([overlap(a, wanted) for a in snapshots])
    weights = np.linalg.lstsq(known, sought, rcond=1e-14)[0]
    weights /= weights.sum()
    norm = overlap(wanted, wanted)
    error = max(0.0, weights @ known @ weights - 2 * weights @ sought + norm)
    return weights, float(np.sqrt(error / norm))
