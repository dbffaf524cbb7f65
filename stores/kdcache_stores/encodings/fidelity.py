"""How far decoded rows are from live ones: KL and top-1 of logits, squared error of other fields."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kdcache_stores.encodings.protocol import NOTHING, Array, Encoding, Floats
from kdcache_stores.errors import DataError

ROWS = 256
"""Rows of a shard that are measured, evenly spaced."""
LEAST_ORDER = 0.995
"""Share of rows whose largest logit must stay the largest for a dump to begin."""


def log_softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log of the softmax along the last axis, float64 (n, K)."""
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def kl(live: NDArray[np.float64], decoded: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(softmax(live) || softmax(decoded)) per row, nats, float64 (n,)."""
    p, q = log_softmax(live), log_softmax(decoded)
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(result, 0.0)


def standardize(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Z-scores along the classes, with the biased standard deviation (Sun et al. 2024, eq. 7)."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    std = centred.std(axis=1, keepdims=True)
    result: NDArray[np.float64] = np.divide(centred, std, out=np.zeros_like(centred), where=std > 0)
    return result


def measure(live: Floats, decoded: Floats) -> dict[str, float]:
    """The measures of `manifest.FIDELITY` on logits (n, K), and `rows`, their number.

    `kl_t1`, `kl_t4`: temperatures 1 and 4; `kl_z`: Z-scored, at temperature 2; mean and worst over
    rows, nats, without a factor T squared; to six digits, as the last ones differ between CPUs.
    """
    p, q = live.astype(np.float64), decoded.astype(np.float64)
    pairs = {
        "kl_t1": kl(p, q),
        "kl_t4": kl(p / 4, q / 4),
        "kl_z": kl(standardize(p) / 2, standardize(q) / 2),
    }
    result = {"rows": float(len(p))}
    for name, values in pairs.items():
        result[f"{name}_mean"] = _six_digits(values.mean())
        result[f"{name}_worst"] = _six_digits(values.max())
    result["top1_agreement"] = _six_digits((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    return result


def relative_error(live: Floats, decoded: Floats) -> float:
    """Mean over rows (n, ...) of ||live - decoded||^2 / ||live||^2, to six digits.

    A row of zeros, which every encoding keeps, counts 0.
    """
    p = live.reshape(len(live), -1).astype(np.float64)
    off = p - decoded.reshape(len(live), -1)
    size = np.einsum("ij,ij->i", p, p)
    error = np.einsum("ij,ij->i", off, off)
    return _six_digits(np.divide(error, size, out=np.zeros_like(size), where=size > 0).mean())


def head_kl(live: Floats, decoded: Floats, weight: Floats, bias: Floats) -> float:
    """Mean KL at temperature 1, nats, of the logits that a linear layer makes of rows, to six digits.

    Args:
        live, decoded: (n, D), or maps (n, D, ...) of which the layer sees the mean.
        weight, bias: (K, D) and (K,).
    """
    logits = []
    for rows in (live, decoded):
        vectors = rows.reshape(*rows.shape[:2], -1).astype(np.float64).mean(axis=2)
        logits.append(vectors @ weight.T.astype(np.float64) + bias)
    return _six_digits(kl(*logits).mean())


def decode_some(
    encoding: Encoding,
    rows: Floats,
    labels: NDArray[np.int64],
    shared: Mapping[str, Array] = NOTHING,
) -> tuple[Floats, Floats]:
    """At most `ROWS` evenly spaced rows (n, *shape), as they are and encoded and decoded again."""
    chosen = np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).round().astype(np.int64)
    live = rows[chosen]
    decoded = np.empty_like(live)
    per = {spec.name: spec.per for spec in encoding.arrays(rows.shape[1:])}
    shared = {name: a[chosen] if per[name] == "sample" else a for name, a in shared.items()}
    encoding.decode({**encoding.encode(live, labels[chosen], shared), **shared}, decoded)
    return live, decoded


def require_faithful(
    encoding: Encoding,
    rows: Floats,
    labels: NDArray[np.int64],
    shared: Mapping[str, Array] = NOTHING,
) -> None:
    """Refuse an encoding that loses the differences between logits (n, K); arguments as for `decode_some`.

    So float16 loses logits around 1e-9 (its finest step is 6e-8), and differences of a few
    between logits around 10,000 (where its steps are 8 wide).

    Raises `DataError` where the largest logit, near ties aside, is another one in more than a row
    and in more than 1 - `LEAST_ORDER` of them, or the mean Z-scored KL at tau = 2 is above the
    encoding's `most_kl`.
    """
    live, decoded = decode_some(encoding, rows, labels, shared)
    kept = keeps_order(live, decoded, encoding.near_tie)
    wrong = len(kept) - int(kept.sum())
    lost = measure(live, decoded)["kl_z_mean"]
    if wrong <= max(1.0, (1 - LEAST_ORDER) * len(kept)) and lost <= encoding.most_kl:
        return
    raise DataError(
        f"{encoding.name} loses too much of these logits: of {len(kept)} rows {wrong} have another "
        f"largest logit once they are stored (at most {1 - LEAST_ORDER:.1%} may), and the Z-scored KL "
        f"is {lost:.2g} nats (at most {encoding.most_kl:g}). The logits lie between {live.min():g} and "
        f"{live.max():g}, with a standard deviation of {np.median(live.std(axis=1)):g} within a row: "
        "use the encoding float32"
    )


def keeps_order(live: Floats, decoded: Floats, near_tie: float) -> NDArray[np.bool_]:
    """Whether each row's largest logit (n, K) is, once decoded, still one of the largest: (n,).

    A tie, and what is within `near_tie` row standard deviations of one, may be decided either way.
    """
    exact = live.astype(np.float64)
    chosen = exact[np.arange(len(exact)), decoded.argmax(axis=1)]
    result: NDArray[np.bool_] = exact.max(axis=1) - chosen <= near_tie * exact.std(axis=1)
    return result


def combine(parts: list[dict[str, float]]) -> dict[str, float]:
    """Measures of several shards as one: means weighted by rows, worst of the worst."""
    if not parts:
        return {}
    rows = sum(part["rows"] for part in parts)
    result = {"rows": rows}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.endswith("_worst"):
            result[name] = max(values)
        elif name != "rows":
            weighted = sum(value * part["rows"] for value, part in zip(values, parts, strict=True))
            result[name] = _six_digits(weighted / rows)
    return result


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def combine_means(parts: list[tuple[int, float]]) -> float | None:
    """`relative_error` or `head_kl` of several shards, each with its number of rows, as one."""
    measured = [(min(rows, ROWS), value) for rows, value in parts]
    rows = sum(count for count, _ in measured)
    return _six_digits(sum(count * value for count, value in measured) / rows) if rows else None
