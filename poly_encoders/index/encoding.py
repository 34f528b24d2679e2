"""What an index needs of a model: vectors of both sides, the score, and a sign of who encodes candidates how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poly_encoders.bi_encoder import BiEncoder
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.two_sided import TwoSidedEncoder

# Short, long (beyond any usual limit), with what a prompt, lower case, newlines or another language would change.
PROBES = ["Where is it?", "The\nQuick brown FOX, said: jump! " * 100, "Ein Gruß aus Zürich — 你好"]
TOLERANCE = 0.02  # of a vector's length: what bfloat16 or another machine may change, and hardly any training


class IndexModel:
    """A model as an index uses it."""

    def __init__(self, model: TwoSidedEncoder) -> None:
        if not isinstance(model, PolyEncoder | BiEncoder):
            raise TypeError(
                f"An index is searched with a PolyEncoder or a BiEncoder, not a {type(model).__name__}: candidates "
                "need vectors of their own."
            )
        self.model = model
        self.scale = float(model.final_scale) if isinstance(model, PolyEncoder) else 1.0
        # A Poly-encoder of cosines makes vectors of length 1 itself.
        self.normalize = isinstance(model, BiEncoder) and model.similarity_fn_name == "cosine"

    @property
    def name(self) -> str | None:
        """A folder or Hub id that the model was loaded from whole; `None` for one that was built."""
        names = (getattr(module, "name_or_path", None) for module in self.model.modules())
        return next((name for name in names if isinstance(name, str) and name), None)

    @property
    def folder(self) -> str | None:
        """Where the model lies, if that is a folder."""
        return self.name if self.name is not None and Path(self.name).is_dir() else None

    @property
    def hub_id(self) -> str | None:
        """Where it came from, if that is the Hub."""
        return None if self.folder else self.name

    @property
    def dim(self) -> int:
        return int(self.model.get_embedding_dimension() or 0)

    def candidates(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """`(n, dim)` float32."""
        found = self.model.encode_document([*texts], normalize_embeddings=self.normalize, **options)
        return np.asarray(found, dtype=np.float32)

    def contexts(self, contexts: Sequence[Any], **options: Any) -> Tensor:
        """`(n, m, dim)`, on the model's device."""
        found = self.model.encode_query(
            [*contexts], normalize_embeddings=self.normalize, convert_to_tensor=True, **options
        )
        return found if found.dim() == 3 else found[:, None]

    def probes(self) -> list[list[float]]:
        return [[round(float(x), 6) for x in row] for row in self.candidates(PROBES, show_progress_bar=False)]

    def refuse_other(self, probes: list[list[float]] | None, dim: int, path: Any) -> None:
        """
        Raises:
            ValueError: the index's candidates were encoded otherwise than this model encodes them.
        """
        if dim != self.dim:
            raise ValueError(
                f"The vectors in {path} are {dim} wide, this model's {self.dim}. Load the model they are of."
            )
        if probes is None:
            return
        then, now = torch.tensor(probes), torch.tensor(self.probes())
        apart = float(((now - then).norm(dim=1) / then.norm(dim=1).clamp(min=1e-12)).max()) if len(then) else 0.0
        if not apart <= TOLERANCE:
            raise ValueError(
                f"This model encodes candidates otherwise than they were encoded in {path}: the vector of a probe "
                f"differs by {apart:.1%}. Load the model they are of, or one that was trained from it with "
                "freeze_candidate_encoder, or build the index again."
            )
