"""PolyEncoderConfig: defaults, checks, JSON."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, BertConfig

import tiny
from poly_encoders import PolyEncoder, PolyEncoderConfig

TURNS = {"context_vectors": "turns"}


def test_works_with_no_arguments():
    config = PolyEncoderConfig()
    assert isinstance(config.context_encoder, BertConfig)
    assert isinstance(config.candidate_encoder, BertConfig)
    assert config.candidate_encoder is not config.context_encoder
    assert (config.num_codes, config.reduction) == (64, "mean")


@pytest.mark.parametrize("options", [{}, {"share_encoders": True}])
def test_json_round_trip(options, tmp_path):
    config = tiny.poly_config("roberta", num_codes=7, context_vectors="last_m", turn_separator=" | ", **options)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, PolyEncoderConfig)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert (again.candidate_encoder is None) == bool(options)


def test_the_older_name_of_reduction(checkpoints, tmp_path):
    config = tiny.poly_config(candidate_vector="first")
    assert config.reduction == config.candidate_vector == "first"
    saved = config.to_dict()
    assert "candidate_vector" not in saved
    saved["candidate_vector"] = saved.pop("reduction")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["reduction"] == "first"
    model = PolyEncoder(checkpoints(), device="cpu", config_kwargs={"candidate_vector": "first"})
    assert model[0].config.reduction == "first"
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="reduction='mean' would need training anew"):
        PolyEncoder(str(tmp_path), device="cpu", config_kwargs={"candidate_vector": "mean"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_codes": 0}, "at least 1"),
        ({"num_codes": -3}, "at least 1"),
        ({"output_scaling": 0.0}, "output_scaling"),
        ({"output_scaling": float("nan")}, "output_scaling"),
        ({"code_std": -1.0}, "code_std"),
        ({"max_context_length": 0}, "max_context_length"),
        ({"max_turns": -3}, "max_turns"),
        ({"max_turn_length": 0}, "max_turn_length"),
        *(({"final_temperature": value}, "final_temperature") for value in (0.0, -1.0, float("nan"), float("inf"))),
        *(({**TURNS, "last_turn_share": value}, "last_turn_share") for value in (-0.1, 1.0, 2, float("nan"))),
        ({"last_turn_share": 0.5}, "not 'learnt_codes'"),
        ({"context_vectors": "last_m", "last_turn_share": 0.5, "learn_last_turn_share": True}, "not 'last_m'"),
        ({**TURNS, "learn_last_turn_share": True}, "starts above 0"),
        ({"candidate_encoder": tiny.family_config("bert", width=16)}, "32 wide, the candidate encoder 16"),
        ({"candidate_encoder": tiny.family_config("bert"), "share_encoders": True}, "share_encoders=True"),
    ],
)
def test_values_out_of_range_are_named(options, said):
    with pytest.raises(StrictDataclassClassValidationError, match=said):
        tiny.poly_config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_codes": "many"},
        {"context_vectors": "middle_m"},
        {"reduction": "max"},
        {"candidate_vector": "max"},
        {"code_attention": "cosine"},
        {"normalize": "yes"},
        {"turn_boundary_ids": ["[SEP]"]},
    ],
)
def test_values_of_a_wrong_kind_are_refused(options):
    with pytest.raises(StrictDataclassFieldValidationError):
        tiny.poly_config(**options)


def test_what_is_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'num_codes'"):
        PolyEncoderConfig(num_code=3)
    with pytest.raises(ValueError, match="without 'model_type'"):
        PolyEncoderConfig(context_encoder={"hidden_size": 32})
    tiny.family_config("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the architecture 'bert'"):
        PolyEncoderConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "vectors"),
    [
        *((kind, 5) for kind in ("learnt_codes", "first_m", "last_m", "turns")),
        ("first_and_last_m", 6),
        ("turns_and_codes", 10),
    ],
)
def test_number_of_context_vectors(kind, vectors):
    assert tiny.poly_config(num_codes=5, context_vectors=kind).num_context_vectors == vectors


def test_common_options_reach_both_encoders():
    config = PolyEncoderConfig(hidden_size=48, num_attention_heads=4)
    assert config.context_encoder.hidden_size == config.candidate_encoder.hidden_size == config.hidden_size == 48
