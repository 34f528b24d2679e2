"""Candidates on disk, searched exactly or approximately, and changed while they are read."""

from poly_encoders.index.candidate_index import CandidateIndex
from poly_encoders.index.view import Hits

__all__ = ["CandidateIndex", "Hits"]
