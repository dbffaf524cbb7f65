"""The published formulas in float64 NumPy, written one by one from their definitions.

Nothing here uses kdcache or torch, and nothing is shared between formulas that kdcache shares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
INFINITY = 1000.0  # DKD's mask


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(z: Array, v: Array) -> Array:
    """KL(softmax(z) ‖ softmax(v)) per row."""
    return (softmax(z) * (log_softmax(z) - log_softmax(v))).sum(-1)


def zscore(x: Array, biased: bool = False) -> Array:
    n = x.shape[-1]
    mean = x.sum(-1, keepdims=True) / n
    variance = ((x - mean) ** 2).sum(-1, keepdims=True) / (n if biased else n - 1)
    return (x - mean) / (np.maximum(np.sqrt(variance), 0.01) + 1e-7)


def ce(v: Array, y: NDArray[np.int64]) -> Array:
    return -log_softmax(v)[np.arange(len(v)), y]


def kd(v: Array, z: Array, t: float = 4.0) -> float:
    return float(t**2 * kl(z / t, v / t).sum() / len(v))


def tckd(v: Array, z: Array, y: NDArray[np.int64], t: float = 4.0) -> float:
    rows = np.arange(len(v))
    p, q = softmax(z / t)[rows, y], softmax(v / t)[rows, y]
    b_t, b_s = np.stack([p, 1 - p], 1), np.stack([q, 1 - q], 1)
    return float(t**2 * (b_t * np.log(b_t / b_s)).sum() / len(v))


def nckd(v: Array, z: Array, y: NDArray[np.int64], t: float = 4.0) -> float:
    mask = INFINITY * np.eye(v.shape[1])[y]
    return float(t**2 * kl(z / t - mask, v / t - mask).sum() / len(v))


def dkd(v: Array, z: Array, y: NDArray[np.int64], alpha: float, beta: float, t: float) -> float:
    return alpha * tckd(v, z, y, t) + beta * nckd(v, z, y, t)


def batch_level(v: Array, z: Array, t: float) -> float:
    q, p = softmax(v / t), softmax(z / t)
    return float(((q @ q.T - p @ p.T) ** 2).sum() / len(v))


def class_level(v: Array, z: Array, t: float) -> float:
    q, p = softmax(v / t), softmax(z / t)
    return float(((q.T @ q - p.T @ p) ** 2).sum() / v.shape[1])


def masks(z: Array) -> tuple[float, float]:
    """Means of MLKD's sample mask and class mask."""
    p = softmax(z)
    surest, mass = p.max(1), p.sum(0)
    return (
        float((surest <= np.percentile(surest, 50)).mean()),
        float((mass <= np.percentile(mass, 50)).mean()),
    )


def mlkd_as_coded(v: Array, z: Array, t0: float = 4.0, zscored: bool = False) -> float:
    """v, z: (B, 2, K), weak and strong."""

    def instance(view: int, t: float) -> float:
        a, b = v[:, view], z[:, view]
        return kd(zscore(a), zscore(b), t) if zscored else kd(a, b, t)

    m, c = masks(z[:, 0])
    temperatures = (t0, 3.0, 5.0, 2.0, 6.0)
    total = m * sum(instance(0, t) for t in temperatures)
    total += instance(1, t0) + instance(1, 3.0) + instance(1, 5.0)
    total += instance(0, 2.0) + instance(0, 6.0)
    total += c * sum(class_level(v[:, 0], z[:, 0], t) for t in temperatures)
    total += m * sum(batch_level(v[:, 0], z[:, 0], t) for t in temperatures)
    return total


def mlkd_as_described(v: Array, z: Array, t0: float = 4.0) -> float:
    total = 0.0
    for t in (t0, 3.0, 5.0, 2.0, 6.0):
        for view in (0, 1):
            a, b = v[:, view], z[:, view]
            total += kd(a, b, t) + batch_level(a, b, t) + class_level(a, b, t)
    return total
