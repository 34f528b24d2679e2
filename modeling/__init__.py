"""What a Poly-encoder checkpoint is: its configuration and its model, in torch and transformers alone."""

from .configuration_poly_encoder import PolyEncoderConfig
from .modeling_poly_encoder import PolyEncoderModel, PolyEncoderOutput, check_vectors, poly_score, staged_folder

__all__ = ["PolyEncoderConfig", "PolyEncoderModel", "PolyEncoderOutput", "check_vectors", "poly_score", "staged_folder"]
