"""What a Poly-encoder checkpoint is: its configuration and its model, in torch and transformers alone."""

from .configuration_poly_encoder import PolyEncoderConfig
from .modeling_poly_encoder import (
    PolyEncoderModel,
    PolyEncoderOutput,
    check_vectors,
    poly_attention,
    poly_score,
    staged_folder,
)
from .pipeline_poly_encoder import PolyEncoderPipeline

__all__ = [
    "PolyEncoderConfig",
    "PolyEncoderModel",
    "PolyEncoderOutput",
    "PolyEncoderPipeline",
    "check_vectors",
    "poly_attention",
    "poly_score",
    "staged_folder",
]
