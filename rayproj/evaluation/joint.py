"""What a network that knows how sure it is says of many labels together: log-losses of epistemic neural networks.

Such a network gives class probabilities p(y | x, z) for each *index* z, and the joint probability of labels is the mean over
indices of their product (Osband et al. 2023, "Epistemic Neural Networks", eq. 2). Everything here follows from the log
probabilities of the true labels, fp64 [Z, n]: of Z indices and n examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import lgamma, log

import numpy as np
from scipy.special import logsumexp

from rayproj import keyed


def log_mean_exp(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """log of the mean of exp; of nothing but -inf it is -inf."""
    with np.errstate(divide="ignore"):
        return np.asarray(logsumexp(values, axis=axis) - log(values.shape[axis]))


def marginal_nll(log_p: np.ndarray) -> np.ndarray:
    """-log of the probability of each true label, [n], the mean over the indices being the prediction."""
    return -log_mean_exp(log_p)


def joint_nll(log_p: np.ndarray, tau: int = 0) -> np.ndarray:
    """-log of the joint probability of each batch of `tau` examples that follow each other, [n // tau]; what is left over
    is left out. 0: of all of them together, [1]."""
    tau = tau or log_p.shape[1]
    batches = log_p.shape[1] // tau
    return -log_mean_exp(log_p[:, : batches * tau].reshape(len(log_p), batches, tau).sum(2))


def divergence(truth: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """KL(truth ‖ found) from log-likelihoods [n] of labels that were drawn by the truth, and the share of them that `found`
    thinks possible; where it does not, the largest finite difference stands (Osband et al. 2022, "The Neural Testbed")."""
    difference = truth - found
    finite = np.isfinite(difference)
    if not finite.any():
        return math.inf, 0.0
    return float(np.where(finite, difference, difference[finite].max(initial=-math.inf)).mean()), float(finite.mean())


def anchors(n: int, tau: int, kappa: int, seed: int) -> np.ndarray:
    """int64 [n // kappa, tau]: tau draws, with replacement, of each kappa examples that follow each other.

    They are keyed by the place of the examples in the test set, and by nothing of what these show: draws that followed from
    the labels would be others for the same set in another order.
    """
    groups = n // kappa
    drawn = (keyed.uniform(seed, "anchors", keyed.places(groups), (tau,)).double() * kappa).long().numpy()
    return np.arange(groups)[:, None] * kappa + drawn


def polyadic_nll(log_p: np.ndarray, tau: int = 10, kappa: int = 2, seed: int = 0) -> np.ndarray:
    """-log of the joint probability of tau labels drawn from each kappa anchors, [n // kappa]; kappa = 2 is dyadic sampling.

    Labels of examples far apart are nearly independent, so that a joint loss of a few of them says hardly more than the
    marginal one; of the same ones again and again it does (Osband et al. 2022, "Evaluating High-Order Predictive
    Distributions in Deep Learning", section 5).
    """
    chosen = anchors(log_p.shape[1], tau, kappa, seed)
    return -log_mean_exp(log_p[:, chosen].sum(2))


def exact_polyadic_nll(log_p: np.ndarray, tau: int = 10, kappa: int = 2) -> np.ndarray:
    """What `polyadic_nll` is on average over the draws, [n // kappa]: the sum over how often each anchor can come."""
    groups = log_p.shape[1] // kappa
    anchored = log_p[:, : groups * kappa].reshape(len(log_p), groups, kappa)
    found = np.zeros(groups)
    for counts in _compositions(tau, kappa):
        chance = np.exp(lgamma(tau + 1) - sum(lgamma(c + 1) for c in counts) - tau * log(kappa))
        # An anchor that does not come adds nothing, even if it is impossible.
        total = sum(c * anchored[:, :, k] for k, c in enumerate(counts) if c)
        found -= chance * log_mean_exp(np.asarray(total))
    return found


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of so many, zeros among them."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)
