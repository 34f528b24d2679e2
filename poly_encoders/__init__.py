"""poly-encoders: Poly-encoders, Bi-encoders and Cross-encoders for ranking, at home in Hugging Face.

Importing this package teaches transformers' Auto classes the Poly-encoder, and the tokenizer of checkpoints that were
converted from ParlAI, and its `pipeline` the task sentence-similarity; it has no other effect.
"""

from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.pipelines import PIPELINE_REGISTRY

from poly_encoders.modeling import (
    PolyEncoderConfig,
    PolyEncoderModel,
    PolyEncoderOutput,
    PolyEncoderPipeline,
    poly_score,
)


def register() -> None:
    """Teach the Auto classes our types, and have saved models carry the code that loads them without this package."""
    AutoConfig.register(PolyEncoderConfig.model_type, PolyEncoderConfig)
    AutoModel.register(PolyEncoderConfig, PolyEncoderModel)
    PolyEncoderConfig.register_for_auto_class()
    PolyEncoderModel.register_for_auto_class("AutoModel")
    task = "sentence-similarity"
    if task not in PIPELINE_REGISTRY.get_supported_tasks():  # one of transformers' own, or another package's, stays
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=PolyEncoderPipeline, pt_model=AutoModel)
        PolyEncoderConfig.pipeline_is_registered = True


register()

# The models below find their types in the Auto classes, so they come after.
from poly_encoders.bi_encoder import BiEncoder  # noqa: E402
from poly_encoders.cross_encoder import CrossEncoder  # noqa: E402
from poly_encoders.evaluation import CandidateRankingEvaluator  # noqa: E402
from poly_encoders.parlai import ParlAITokenizer  # noqa: E402
from poly_encoders.poly_encoder import PolyEncoder  # noqa: E402

# A tokenizer_config.json can name ParlAITokenizer only if AutoTokenizer knows it, and it is made known beside a
# configuration; ours is the nearest.
AutoTokenizer.register(PolyEncoderConfig, tokenizer_class=ParlAITokenizer)

__all__ = [
    "BiEncoder",
    "CandidateRankingEvaluator",
    "CrossEncoder",
    "PolyEncoder",
    "PolyEncoderConfig",
    "PolyEncoderModel",
    "PolyEncoderOutput",
    "poly_score",
]
