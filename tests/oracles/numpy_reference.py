"""The small formulas in NumPy loops: profiles, read-outs, AURAC, best low-rank approximations.

Written for reading, not for speed: a sum over ranks is a loop over ranks. R is the rank of the factors, S the
training ranks (`ranks`), indices `i` run from 1 to R as in the formulas.
"""

import numpy as np

SCALE_RULES = {
    "none": lambda rank: 1.0,
    "rank": lambda rank: 1.0 / rank,
    "sqrt": lambda rank: 1.0 / np.sqrt(rank),
}


def scale(rank, scaling="none"):
    """s_r of one rank r >= 1 under a scale rule."""
    return SCALE_RULES[scaling](rank)


def profile_lora(ranks, scaling="none"):
    """LoRA: p_i = s_R for all i. Returns [R] float64."""
    largest = max(ranks)
    return np.array([scale(largest, scaling) for _ in range(largest)])


def profile_dylora(ranks, drawn, scaling="none"):
    """DyLoRA with the drawn rank b: p_i = s_b for i <= b, else 0. Returns [R] float64."""
    return np.array([scale(drawn, scaling) if i <= drawn else 0.0 for i in range(1, max(ranks) + 1)])


def profile_matryoshka(ranks, scaling="none", weights=None):
    """MatryoshkaLoRA: p_i = sum of w_r s_r over r in S with r >= i, weights follow S. Returns [R]."""
    weights = [1.0] * len(ranks) if weights is None else weights
    profile = np.zeros(max(ranks))
    for i in range(1, max(ranks) + 1):
        for rank, weight in zip(ranks, weights, strict=True):
            if rank >= i:
                profile[i - 1] += weight * scale(rank, scaling)
    return profile


def prefix(ranks, rank, scaling="none"):
    """The read-out p_i = s_r for i <= r, else 0; zeros at r = 0. `rank` need not be in S. Returns [R]."""
    if rank == 0:
        return np.zeros(max(ranks))
    return profile_dylora(ranks, rank, scaling)


def nested(ranks, rank, scaling="none", weights=None):
    """The read-out p_i = sum of w_q s_q over q in S with i <= q <= r. Returns [R] float64."""
    weights = [1.0] * len(ranks) if weights is None else weights
    profile = np.zeros(max(ranks))
    for i in range(1, max(ranks) + 1):
        for inner, weight in zip(ranks, weights, strict=True):
            if i <= inner <= rank:
                profile[i - 1] += weight * scale(inner, scaling)
    return profile


def masked(ranks, rank, scaling="none", weights=None):
    """The read-out P_i for i <= r, else 0, with P the Matryoshka profile. Returns [R] float64."""
    training = profile_matryoshka(ranks, scaling, weights)
    return np.array([training[i - 1] if i <= rank else 0.0 for i in range(1, max(ranks) + 1)])


def readouts(ranks, rank, scaling="none", weights=None):
    """All three read-outs of one rank: {"prefix", "nested", "masked"} -> [R] float64."""
    return {
        "prefix": prefix(ranks, rank, scaling),
        "nested": nested(ranks, rank, scaling, weights),
        "masked": masked(ranks, rank, scaling, weights),
    }


def product(x, a, b, profile):
    """((x A) * p) B as the sum over i of p_i (x A[:, i]) B[i]. x [..., D], a [D, R], b [R, F] -> [..., F]."""
    total = np.zeros((*np.shape(x)[:-1], np.shape(b)[1]))
    for i, weight in enumerate(profile):
        total += weight * (np.asarray(x, np.float64) @ a[:, i])[..., None] * b[i]
    return total


def nested_sum(x, a, b, ranks, scaling="none", weights=None):
    """The sum that P gathers: over r in S of w_r s_r (x A[:, :r]) B[:r] -> [..., F]."""
    weights = [1.0] * len(ranks) if weights is None else weights
    x = np.asarray(x, np.float64)
    return sum(
        weight * scale(rank, scaling) * (x @ a[:, :rank]) @ b[:rank]
        for rank, weight in zip(ranks, weights, strict=True)
    )


def aurac(accuracies, ranks, axis="log2"):
    """Trapezoids over x = r ("linear") or log2 r ("log2") divided by its length; one rank: its accuracy."""
    if len(ranks) == 1:
        return float(accuracies[0])
    x = [float(np.log2(rank)) if axis == "log2" else float(rank) for rank in ranks]
    area = sum((x[k + 1] - x[k]) * (accuracies[k] + accuracies[k + 1]) / 2 for k in range(len(x) - 1))
    return float(area / (x[-1] - x[0]))


def best_approximation(a, b, profile, rank):
    """The best rank-r approximation of A diag(p) B in the Frobenius norm, by SVD of the [D, F] product."""
    full = np.asarray(a, np.float64) @ np.diag(np.asarray(profile, np.float64)) @ np.asarray(b, np.float64)
    left, singular, right = np.linalg.svd(full, full_matrices=False)
    return (left[:, :rank] * singular[:rank]) @ right[:rank]


def best_approximation_error(a, b, profile, rank):
    """Its Frobenius distance from A diag(p) B: the norm of the singular values after the r-th."""
    full = np.asarray(a, np.float64) @ np.diag(np.asarray(profile, np.float64)) @ np.asarray(b, np.float64)
    return float(np.sqrt(np.sum(np.linalg.svd(full, compute_uv=False)[rank:] ** 2)))
