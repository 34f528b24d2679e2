"""Humeau et al., "Poly-encoders" (arXiv:1905.01969), section 4, restated in loops over lists of floats.

Nothing here is vectorised, batched or padded: one context, one candidate, one number after the other, in the order of
the paper's equations, so that a reader can lay the two side by side. A text is given as what its transformer puts out,
a list of N vectors h_1 ... h_N, one for each of its tokens.
"""

import math

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    """a . b"""
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits: list[float]) -> list[float]:
    """exp(l_i) / sum_j exp(l_j)"""
    largest = max(logits)  # taken out of numerator and denominator, so that neither overflows
    exponentials = [math.exp(logit - largest) for logit in logits]
    return [exponential / math.fsum(exponentials) for exponential in exponentials]


def weighted_sum(weights: list[float], vectors: list[Vector]) -> Vector:
    """sum_i w_i v_i"""
    return [
        math.fsum(weight * vector[axis] for weight, vector in zip(weights, vectors, strict=True))
        for axis in range(len(vectors[0]))
    ]


def reduce(outputs: list[Vector], how: str, m: int) -> Vector:
    """red(.), section 4.2: the first output, the average of all, or the average of the first m."""
    chosen = {"first": outputs[:1], "mean": outputs, "first_m_mean": outputs[:m]}[how]
    return weighted_sum([1 / len(chosen)] * len(chosen), chosen)


def bi_encoder_score(context: list[Vector], candidate: list[Vector], how: str, m: int) -> float:
    """s(ctxt, cand) = red(T1(ctxt)) . red(T2(cand)), section 4.2."""
    return dot(reduce(context, how, m), reduce(candidate, how, m))


def cross_encoder_score(pair: list[Vector], weight: Vector, bias: float) -> float:
    """s(ctxt, cand) = first(T(ctxt, cand)) W, section 4.3."""
    return dot(reduce(pair, "first", 1), weight) + bias


def context_vectors(outputs: list[Vector], kind: str, m: int, codes: list[Vector], scale: float) -> list[Vector]:
    """y_1 ... y_m of section 4.4; the three kinds without codes are fewer where the context has fewer tokens."""
    if kind == "first_m":
        return outputs[:m]
    if kind == "last_m":
        return outputs[-m:]
    if kind == "first_and_last_m":
        return outputs[:1] + outputs[-m:]
    vectors = []
    for code in codes:  # y_i = sum_j w_j h_j with w = softmax(c_i . h_1, ..., c_i . h_N)
        weights = softmax([scale * dot(code, output) for output in outputs])
        vectors.append(weighted_sum(weights, outputs))
    return vectors


def poly_encoder_score(vectors: list[Vector], candidate: Vector, scale: float) -> float:
    """s = y . y_cand with y = sum_i w_i y_i and w = softmax(y_cand . y_1, ..., y_cand . y_m), section 4.4."""
    weights = softmax([scale * dot(candidate, vector) for vector in vectors])
    return dot(weighted_sum(weights, vectors), candidate)
