"""Checkpoints of ParlAI, the original implementation: convert them, and read text as it does."""

from poly_encoders.parlai.convert import convert_parlai_checkpoint
from poly_encoders.parlai.tokenizer import ParlAITokenizer

__all__ = ["ParlAITokenizer", "convert_parlai_checkpoint"]
