"""The scoring engine: scores with gradients in little memory (`score`), and the exact best of many (`top_k`).

`poly_encoders.modeling.poly_score` is the plain form of both, which their tests compare them with.
"""

from poly_encoders.scoring.candidates import PreparedCandidates, load_prepared, prepare
from poly_encoders.scoring.dense import score
from poly_encoders.scoring.search import TopK, top_k

__all__ = ["PreparedCandidates", "TopK", "load_prepared", "prepare", "score", "top_k"]
