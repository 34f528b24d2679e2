r"""How far a score computed in low precision can be from the true one.

Let d_i = x . y_i be the dots of a candidate x with the m context vectors y_i of one context, and hats mark what was
rounded. The score is f(d) = sum_i w_i d_i with w = softmax(scale * d).

**The dots.** With d^_i the computed product of the rounded vectors, d_i - d^_i = (x - x^) . y_i + x^ . (y_i - y^_i) +
(x^ . y^_i - d^_i), and by Cauchy-Schwarz each part is at most a product of lengths:

    |d_i - d^_i| <= |x - x^| |y_i| + |x^| |y_i - y^_i| + gamma |x^| |y^_i| + tau  =: e

The lengths of what rounding took away are measured, not estimated. gamma bounds the accumulation of dim products in
float32 in any order (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1: dim * u with
u = 2^-24). Four times that is taken, for accumulators that truncate, with m + 32 more for dim: this room also covers
the rounding of float64 inputs to float32, of the softmax in float32, of thresholds and bounds themselves, and of the
true score to float32. tau is what flushing subnormal numbers to zero can lose. Where the products are handed over in
bfloat16, their own rounding to nearest adds at most 2^-8 |d^_i|.

**The axes.** With orthonormal axes Q, of which a pass knows the coordinates a of x = Q a + r and q = Q^T y_i alone,
d_i = a . q + r . (y_i - Q q) exactly, so that what it does not see is at most |r| |y_i - Q q|. Float32 keeps a, q and Q
only nearly so: a part of r of at most gamma |x| stays on the axes, for which gamma is taken twice.

**The score** lies between the dots: f(d) <= max_i d_i, so no candidate with max_i d^_i + e below a threshold can reach
it. And it is Lipschitz in them: d f / d d_i = w_i (1 + scale (d_i - f)), so |f(d) - f(d^)| <= L(m) max_i |e_i| with
L(m) = max_d sum_i w_i |1 + scale (d_i - f)|, the same for every scale. Those derivatives sum to 1, so that L = 1 + 2
max(-sum of the negative ones). With scale (d_i - f) = log w_i + H, H the entropy of w, and the negative ones holding
the weight P in all, their sum is largest when they are all but one and equal, which leaves one number to choose:

    L(m) = 1 + 2 max_P [ P (1 - P) log((m - 1) (1 - P) / P) - P ]        1 for m = 1; 1.93, 2.50, 3.26 for 16, 64, 360
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

BFLOAT16_STEP = 2.0**-8  # the largest relative error of rounding to bfloat16, to nearest
SUBNORMAL = 2.0**-125  # twice the largest number that hardware may take for zero


class DotError:
    """|d - d^| <= residual * rest + share * norm * length + constant, with `(g,)` float32 parts, one for each context.

    Made of `(g, m, dim)` contexts and what they were rounded to for the product, perhaps themselves; with `(dim, p)`
    axes that is their coordinates. Without `full_float32` the product may round its inputs again, to TF32 or bfloat16.
    """

    def __init__(self, context: Tensor, rounded: Tensor, full_float32: bool, axes: Tensor | None = None) -> None:
        dim, m = context.shape[-1], context.shape[-2]
        length = rest = upper_norms(context).amax(dim=-1)  # of the longest context vector
        taken = torch.zeros_like(length)
        gamma = (dim + m + 32) * 2.0**-22 + (0 if full_float32 else 2 * BFLOAT16_STEP)
        if axes is not None:
            context, axes = context.cpu().double(), axes.cpu().double()  # some devices have no float64
            on_axes = context @ axes
            taken = upper_norms(on_axes - rounded.cpu()).amax(dim=-1).to(length.device)
            rest = upper_norms(context - on_axes @ axes.T).amax(dim=-1).to(length.device)
            gamma *= 2
        elif rounded is not context:
            taken = upper_norms(context - rounded.to(context.dtype)).amax(dim=-1)
        swell = 1 + 2 * BFLOAT16_STEP  # a rounded vector may be longer than the vector was
        share = swell * (taken / length + gamma * swell) + SUBNORMAL * math.sqrt(dim) / length
        constant = SUBNORMAL * (dim + math.sqrt(dim) * length)
        more = 1 + 2.0**-18  # rounding must not lower them
        self.length, self.share, self.constant = length * more, share * more, constant * more
        self.rest = self.length if axes is None else rest * more

    def of(self, norms: Tensor, residuals: Tensor | None = None, which: Any = slice(None)) -> Tensor:
        """Bounds for candidates of these norms and residuals in the contexts that `which` picks; the three broadcast.

        No residuals where candidates were not rounded to bfloat16: for float64 to float32 gamma has room. Infinite or
        NaN where the product of two lengths overflows, as then a dot may have.
        """
        length = self.length[which]
        error = norms * (2 * length) * (self.share[which] / 2) + self.constant[which]
        return error if residuals is None else error + residuals * self.rest[which]


def upper_norms(vectors: Tensor) -> Tensor:
    """Upper bounds of the lengths of `(..., dim)` vectors, float32 and never 0; infinite where it cannot hold them."""
    dim = vectors.shape[-1]
    norms = torch.linalg.vector_norm(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)
    # Raised by what float32 may have lost: rounding, and squares too small for it.
    return (norms * (1 + (dim + 4) * 2.0**-23) + math.sqrt(dim) * 2.0**-63).float()


@functools.lru_cache
def lipschitz(m: int) -> float:
    """L(m): how much at most the score moves when no dot moves by more than 1; see the top of this file."""
    if m == 1:
        return 1.0
    share = np.linspace(1e-4, 1 - 1e-4, 9999)
    gain = share * (1 - share) * np.log((m - 1) * (1 - share) / share) - share
    return 1 + 2 * max(0.0, float(gain.max())) + 1e-5  # the grid misses the maximum by less
