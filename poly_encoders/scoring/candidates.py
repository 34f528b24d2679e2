"""Candidate vectors in whatever holds them, read in pieces, and prepared once for many searches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from poly_encoders.hardware import has_fast_bf16
from poly_encoders.scoring.axes import FEWEST, SAMPLE, WIDEST, on_axes, principal_axes
from poly_encoders.scoring.bounds import upper_norms

ROWS_AT_ONCE = 1024  # in one block on the CPU: a few MiB, which stay in the cache between the steps
GPU_ROWS_AT_ONCE = 65536
AXES, MAPPED = "axes.npy", ("low.bin", "norms.bin", "residuals.bin")  # in the folder of what was prepared
SPOT_CHECKS = 16  # of what was prepared, in every call


@dataclass(frozen=True, eq=False)
class PreparedCandidates:
    """What `prepare` makes of candidate vectors. It refers to them, so they must stay as they were.

    A call looks at some of them, whether they did; of the others a change goes unseen, and what is found may be wrong.

    Attributes:
        vectors: `(n, dim)`, as they were given; the final scores come from these.
        low: What the first pass reads: `(n, dim)`, bfloat16; or `(n, p)`, float32, coordinates on the `axes`.
        norms: `(n,)`, float32: at least the length of each vector.
        residuals: `(n,)`, float32: at least the length of what `low` lacks of each.
        axes: `(dim, p)`, float32, orthonormal; `None` where `low` has all coordinates.
        sample: Copies of some of the vectors.
    """

    vectors: Tensor | np.ndarray
    low: Tensor
    norms: Tensor
    residuals: Tensor
    axes: Tensor | None
    sample: Tensor

    def __len__(self) -> int:
        return len(self.low)


def prepare(
    candidates: Tensor | np.ndarray,
    *,
    device: torch.device | str | None = None,
    form: Literal["bfloat16", "axes"] | None = None,
    folder: str | Path | None = None,
    show_progress_bar: bool = False,
) -> PreparedCandidates:
    """Make of candidate vectors, once, what a first pass reads faster, for any number of `top_k` calls.

    That is a copy rounded to bfloat16 where products of it are fast. Elsewhere it is the coordinates on the candidates'
    principal axes, at most half as many, where these hold most of the vectors, as they do of real texts. Either takes
    at most half the memory of float32 vectors again. The vectors are neither copied nor changed: a memory map stays on
    disk.

    Args:
        candidates: `(n, dim)` tensor, numpy array or memory-mapped array of floating-point numbers.
        device: Where the copy goes: the tensor's own device by default, the CPU for an array. An array may be prepared
            on a GPU, where it need not fit whole.
        form: What to make at any rate.
        folder: Keep what is made in files there, from which it is mapped, in place of memory; `load_prepared` finds it
            again. On the CPU.
        show_progress_bar: Show one.

    Raises:
        TypeError: not vectors of floating-point numbers.
        ValueError: another shape, NaN or infinity in them, or an unknown form.
    """
    if form not in (None, "bfloat16", "axes"):
        raise ValueError(f"form is 'bfloat16' or 'axes', not {form!r}.")
    reader = CandidateReader(getattr(candidates, "vectors", candidates), device)  # what is prepared, anew
    axes = None
    is_worth_it = len(reader) >= FEWEST and reader.dim <= WIDEST and not has_fast_bf16(reader.device)
    if len(reader) and (form == "axes" or (form is None and is_worth_it)):
        axes = principal_axes(reader.sample(SAMPLE), at_any_rate=form == "axes")
    n, width = len(reader), reader.dim if axes is None else axes.shape[1]
    dtype = torch.bfloat16 if axes is None else torch.float32
    with tqdm(total=n, desc="Preparing", unit="candidate", disable=not show_progress_bar) as bar:
        if axes is None and folder is None:
            return PreparedCandidates(reader.held, *reader.rounded(0, n, bar), None, reader.sample(SPOT_CHECKS).clone())
        if folder is None:
            low = torch.empty(n, width, dtype=dtype, device=reader.device)
            norms, residuals = low.new_empty(n, dtype=torch.float32), low.new_empty(n, dtype=torch.float32)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if axes is not None:
                np.save(Path(folder, AXES), axes.numpy())
            low, norms, residuals = _mapped(folder, n, width, dtype, shared=True)
        for first, rows in reader.blocks(0, n):
            here = slice(first, first + len(rows))
            if axes is None:
                low[here], norms[here], residuals[here] = reader.rounded(here.start, here.stop)
            else:
                norms[here] = vector_norms(rows, first)
                coordinates, rest = on_axes(rows, axes)
                low[here], residuals[here] = coordinates.to(low.device), rest.to(low.device)
            bar.update(len(rows))
    return PreparedCandidates(reader.held, low, norms, residuals, axes, reader.sample(SPOT_CHECKS).clone())


def load_prepared(candidates: Tensor | np.ndarray, folder: str | Path) -> PreparedCandidates:
    """What `prepare(candidates, folder=folder)` made, mapped from its files.

    Raises:
        ValueError: the files are of other candidates, or cut off.
        OSError: they are not there.
    """
    reader = CandidateReader(candidates, "cpu")
    path = Path(folder, AXES)
    axes = torch.from_numpy(np.load(path, allow_pickle=False)) if path.is_file() else None
    width, dtype = (reader.dim, torch.bfloat16) if axes is None else (axes.shape[1], torch.float32)
    for name, size in zip(MAPPED, (width * dtype.itemsize, 4, 4), strict=True):
        if (found := Path(folder, name).stat().st_size) != size * len(reader):
            raise ValueError(f"{Path(folder, name)} has {found} bytes, not {size * len(reader)}: prepare again.")
    low, norms, residuals = _mapped(folder, len(reader), width, dtype, shared=False)
    some = PreparedCandidates(reader.held, low, norms, residuals, axes, reader.sample(SPOT_CHECKS).clone())
    if not torch.allclose(upper_norms(some.sample), norms[reader.spread(SPOT_CHECKS)]):
        raise ValueError(f"What was prepared in {folder} is of other candidates: prepare again.")
    return some


def _mapped(folder: str | Path, n: int, width: int, dtype: torch.dtype, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`low`, `norms` and `residuals` of so many candidates in files; what is written goes there if they are shared."""
    low, norms, residuals = (
        torch.from_file(str(Path(folder, name)), shared=shared, size=n * each, dtype=kind)
        for name, each, kind in zip(MAPPED, (width, 1, 1), (dtype, torch.float32, torch.float32), strict=True)
    )
    return low.view(n, width), norms, residuals


class CandidateReader:
    """Pieces of candidate vectors as tensors on one device, whatever holds them.

    Args and errors as for `prepare`. What was prepared will do as well, if it is still of as many candidates; and
    `where`, `(n,)`, says which of them count: all where it is left out.
    """

    def __init__(
        self,
        candidates: PreparedCandidates | Tensor | np.ndarray,
        device: torch.device | str | None = None,
        where: Tensor | np.ndarray | None = None,
    ) -> None:
        self.prepared = candidates if isinstance(candidates, PreparedCandidates) else None
        if self.prepared is not None:
            candidates, device = self.prepared.vectors, self.prepared.low.device
        if not isinstance(candidates, Tensor | np.ndarray) or isinstance(candidates, np.ma.MaskedArray):
            raise TypeError(
                f"Candidates are a {type(candidates).__name__}; expected a tensor or a numpy array (n, dim), as "
                "encode_document gives it. Stack a list of vectors first."
            )
        if isinstance(candidates, Tensor) and candidates.layout != torch.strided:
            raise TypeError(f"Candidates are a {candidates.layout} tensor; make it dense with .to_dense() first.")
        if not is_float(candidates):
            raise TypeError(
                f"These candidate vectors are {candidates.dtype}; expected float16, bfloat16, float32 or float64. "
                "Quantised codes have no dot products: encode with precision='float32'."
            )
        if candidates.ndim != 2:
            raise ValueError(f"Candidate vectors have shape {tuple(candidates.shape)}; expected (n, dim).")
        self.held = candidates.detach() if isinstance(candidates, Tensor) else candidates
        own = candidates.device if isinstance(candidates, Tensor) else torch.device("cpu")
        self.device = own if device is None else torch.device(device)
        self.dim = candidates.shape[1]
        if self.prepared is not None:
            self._refuse_changed(self.prepared)
        self.where = None if where is None else torch.as_tensor(where, device=self.device)
        if self.where is not None and (self.where.dtype != torch.bool or self.where.shape != (len(self),)):
            what = f"{self.where.dtype} of shape {tuple(self.where.shape)}"
            raise ValueError(f"where is {what}; expected booleans, one for each of the {len(self)} candidates.")

    def _refuse_changed(self, prepared: PreparedCandidates) -> None:
        """Look at some of the vectors, whether they are those that were prepared."""
        if len(prepared) != len(self):
            counts = f"{len(prepared)} candidates were prepared, but there are {len(self)} now"
            raise ValueError(f"{counts}: prepare them again.")
        if prepared.sample.shape[1] != self.dim:
            was = prepared.sample.shape[1]
            raise ValueError(f"Candidates {was} wide were prepared, but they are {self.dim} now: prepare them again.")
        now = self.sample(SPOT_CHECKS)
        if not torch.equal(now, prepared.sample):
            which = int((now != prepared.sample).any(dim=1).int().argmax()) * self.spread(SPOT_CHECKS).step
            raise ValueError(f"Candidate {which} is another vector than when it was prepared: prepare them again.")

    def __len__(self) -> int:
        return len(self.held)

    def take(self, where: slice | Tensor) -> Tensor:
        """The vectors of a slice, or at `(s,)` positions, in the dtype that holds them."""
        if isinstance(self.held, Tensor):
            return self.held[where.to(self.held.device) if isinstance(where, Tensor) else where].to(self.device)
        piece = self.held[where.cpu().numpy() if isinstance(where, Tensor) else where]
        # torch would warn of read-only memory, and has no negative or uneven strides and no foreign byte order.
        if not (piece.flags.writeable and piece.flags.c_contiguous and piece.dtype.isnative):
            piece = np.array(piece, dtype=piece.dtype.newbyteorder("="), order="C", subok=False)
        return torch.from_numpy(piece).to(self.device)

    def sample(self, most: int) -> Tensor:
        """So many of the vectors, evenly spread, or all where there are fewer: `(s, dim)`."""
        return self.take(self.spread(most))

    def spread(self, most: int) -> slice:
        """So many places, evenly spread, or all where there are fewer."""
        step = max(1, len(self) // most)
        return slice(0, most * step, step)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """The vectors from start to stop in blocks that fit the CPU's cache, each with the index of its first."""
        step = ROWS_AT_ONCE if self.device.type == "cpu" else GPU_ROWS_AT_ONCE
        for first in range(start, stop, step):
            yield first, self.take(slice(first, min(first + step, stop)))

    def of_prepared(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """What was prepared: `low`, `norms` and `residuals`."""
        assert self.prepared is not None
        here = slice(start, stop)
        return self.prepared.low[here], self.prepared.norms[here], self.prepared.residuals[here]

    def rounded(self, start: int, stop: int, bar: tqdm | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`(r, dim)` in bfloat16, and upper bounds of the lengths of the vectors and of what rounding took from them.

        Raises:
            ValueError: one of them is not finite.
        """
        if self.prepared is not None and self.prepared.axes is None:
            return self.of_prepared(start, stop)
        low = torch.empty((stop - start, self.dim), dtype=torch.bfloat16, device=self.device)
        if is_low := isinstance(self.held, Tensor) and self.held.dtype == torch.bfloat16:
            low = self.take(slice(start, stop))  # nothing to round, nothing to copy
        norms = torch.empty(stop - start, dtype=torch.float32, device=self.device)
        residuals = torch.zeros_like(norms)
        for first, rows in self.blocks(start, stop):
            here = slice(first - start, first - start + len(rows))
            norms[here] = vector_norms(rows, first)
            if not is_low:
                low[here] = rows
                exact = rows if rows.dtype == torch.float64 else rows.float()
                residuals[here] = upper_norms(exact - low[here].to(exact.dtype))
            if bar is not None:
                bar.update(len(rows))
        return low, norms, residuals


def vector_norms(rows: Tensor, first: int) -> Tensor:
    """Upper bounds of the lengths of `(r, dim)` vectors, `(r,)` float32; infinite where float32 cannot hold them.

    Raises:
        ValueError: a vector is not finite; `first` is the index of the first in the message.
    """
    norms = upper_norms(rows)
    if not bool(norms.isfinite().all()):  # also where only the square of a good number overflows
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise ValueError(
                f"Candidate {first + int(bad[0])} holds NaN or infinity, so nothing can be ranked against it. Encode "
                "it again, or leave it out."
            )
    return norms


def check_devices(context: Tensor, candidates: "Tensor | CandidateReader") -> None:
    """Raise a ValueError if contexts and candidates are apart."""
    if context.device != candidates.device:
        raise ValueError(
            f"Context vectors are on {context.device}, candidate vectors on {candidates.device}. "
            "Move one of them with .to(device) first."
        )


def is_float(array: Tensor | np.ndarray) -> bool:
    """Whether these are floating-point numbers of a kind that can be scored."""
    if isinstance(array, Tensor):
        return array.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return array.dtype.kind == "f" and array.dtype.itemsize in (2, 4, 8)
