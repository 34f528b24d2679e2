"""poly-encoders: Poly-encoders, Bi-encoders and Cross-encoders for ranking, at home in Hugging Face.

Importing this package teaches transformers' Auto classes the Poly-encoder; it has no other effect.
"""

from transformers import AutoConfig, AutoModel

from poly_encoders.modeling import PolyEncoderConfig, PolyEncoderModel, PolyEncoderOutput, poly_score


def register() -> None:
    """Teach the Auto classes our types, and have saved models carry the code that loads them without this package."""
    AutoConfig.register(PolyEncoderConfig.model_type, PolyEncoderConfig)
    AutoModel.register(PolyEncoderConfig, PolyEncoderModel)
    PolyEncoderConfig.register_for_auto_class()
    PolyEncoderModel.register_for_auto_class("AutoModel")


register()

from poly_encoders.poly_encoder import PolyEncoder  # noqa: E402  (its base classes look the types up)

__all__ = [
    "PolyEncoder",
    "PolyEncoderConfig",
    "PolyEncoderModel",
    "PolyEncoderOutput",
    "poly_score",
]
