"""The candidates' principal axes: half of the coordinates or fewer hold most of real texts' vectors.

A pass that reads the first p coordinates alone reads a part of the memory and multiplies a part of the numbers, and
what it leaves unread is bounded; `poly_encoders.scoring.bounds` has the derivation. Random vectors have no such axes.
"""

import torch
from torch import Tensor

from poly_encoders.hardware import full_float32_products
from poly_encoders.scoring.bounds import upper_norms

FEWEST = 4096  # candidates, for which to make any
WIDEST = 2048  # coordinates, of which finding axes takes seconds
SAMPLE = 16384  # candidates that the axes are made from
ENOUGH = 0.94  # of the vectors' squared length on the axes: fewer leave too many candidates, more cost too much
TOO_LITTLE = 0.8
STEP = 32


def principal_axes(sample: Tensor, at_any_rate: bool = False) -> Tensor | None:
    """As few orthonormal axes as hold enough of `(s, dim)` vectors, at most half as many as these have coordinates.

    Args:
        sample: Candidate vectors, of any lengths: each counts by its direction.
        at_any_rate: Give some even where they hold too little to pay.

    Returns:
        `(dim, p)` float32, or `None` where they hold too little.
    """
    device, dim = sample.device, sample.shape[1]
    sample = sample.cpu().double()  # some devices have no float64
    units = torch.nn.functional.normalize(sample, dim=1).float()
    energy, axes = torch.linalg.eigh((units.T @ units).double())  # ascending
    if dim < 2 or not bool(energy.isfinite().all()):
        return None
    held = energy.flip(0).clamp(min=0).cumsum(0)
    held = held / held[-1].clamp(min=1e-30)
    wanted = int((held < ENOUGH).sum()) + 1
    p = min(-(-wanted // STEP) * STEP, dim // 2)
    if held[p - 1] < TOO_LITTLE and not at_any_rate:
        return None
    return axes.flip(1)[:, :p].float().contiguous().to(device)


def on_axes(rows: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates of `(r, dim)` vectors, `(r, p)` float32, and at least the length of what is not on the axes.

    In full float32, whatever autocast and the process's settings say: the bounds allow for no less.
    """
    if full_float32_products(rows.device):
        rows = rows.float()
    else:
        rows, axes = rows.cpu().double(), axes.cpu().double()
    with torch.autocast(rows.device.type, enabled=False):
        coordinates = (rows @ axes).float()
        rest = upper_norms(rows - coordinates.to(rows.dtype) @ axes.T)
        # What the products and the difference may have lost.
        rest = rest + upper_norms(rows) * rounding(axes)
    return coordinates, rest


def rounding(axes: Tensor) -> float:
    """What the coordinates on `(dim, p)` axes may be off by in float32, over a vector's length."""
    return (sum(axes.shape) + 32) * 2.0**-22
