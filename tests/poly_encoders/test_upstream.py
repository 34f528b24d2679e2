"""The private upstream names that this package leans on. If one moves, this says so before a user does."""

import inspect

import sentence_transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.trainer import BaseTrainer
from transformers import PreTrainedModel
from transformers.configuration_utils import strict
from transformers.utils.generic import can_return_tuple, maybe_autocast


def test_loading_hooks_of_sentence_transformers():
    assert BaseModel._module_classes == {}
    for name in ("_load_default_modules", "_load_config_modules", "_load_converted_modules", "_parse_model_config"):
        assert callable(getattr(BaseModel, name))
    assert "model_type" in inspect.signature(BaseModel._load_converted_modules).parameters
    assert callable(SentenceTransformer._get_model_config)
    assert "_similarity_fn_name" in inspect.getsource(SentenceTransformer._parse_model_config)
    assert issubclass(sentence_transformers.CrossEncoder, BaseModel)


def test_training_hooks_of_sentence_transformers():
    assert list(inspect.signature(BaseDataCollator._get_task_for_column).parameters)[1:] == [
        "column_name",
        "column_position",
        "router_mapping",
    ]
    assert list(inspect.signature(BaseTrainer._save).parameters) == ["self", "output_dir", "state_dict"]


def test_transformers():
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_unexpected")
    for function in (strict, can_return_tuple, maybe_autocast):
        assert callable(function)


def test_a_plain_sentence_transformer_asks_a_model_for_text_features():
    """What lets PolyEncoderModel refuse to be loaded as a SentenceTransformer."""
    from sentence_transformers.base.modules import Transformer

    assert "get_{modality}_features" in inspect.getsource(Transformer.infer_modalities)
