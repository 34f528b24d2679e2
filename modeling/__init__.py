"""What a Poly-encoder checkpoint is: its configuration, its model and its way from text to a ranking.

The folder stays flat, and its files import one another relatively and nothing else but torch and transformers, because
transformers copies them, flat, into the folder of every saved Poly-encoder, where they work without this package.
"""

from .configuration_poly_encoder import PolyEncoderConfig
from .modeling_poly_encoder import PolyEncoderModel, PolyEncoderOutput
from .pipeline_poly_encoder import PolyEncoderPipeline
from .scoring_poly_encoder import check_vectors, poly_attention, poly_score

__all__ = [
    "PolyEncoderConfig",
    "PolyEncoderModel",
    "PolyEncoderOutput",
    "PolyEncoderPipeline",
    "check_vectors",
    "poly_attention",
    "poly_score",
]
