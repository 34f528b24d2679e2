"""Every family of backbone: padding on either side changes nothing, and saving keeps every bit."""

import pytest
import torch

import tiny
from poly_encoders import PolyEncoder, PolyEncoderModel


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("kind", ["learnt_codes", "first_m", "last_m", "first_and_last_m"])
def test_padding_changes_nothing(family, kind):
    left = family in tiny.LEFT_PADDED
    model = tiny.poly_model(family, context_vectors=kind, attn_implementation="eager")
    batch = tiny.token_batch(4, 7, left=left)
    padded = tiny.pad(batch, 5, left=left)
    torch.testing.assert_close(
        model.get_context_features(**padded), model.get_context_features(**batch), atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        model.get_candidate_features(**padded), model.get_candidate_features(**batch), atol=2e-5, rtol=1e-4
    )


@torch.no_grad()
def test_a_decoder_ignores_the_side_of_its_padding():
    model = tiny.poly_model("qwen3")
    alone = torch.randint(5, tiny.VOCAB_SIZE, (1, 6))
    expected = model.get_context_features(alone)
    for left in (True, False):
        padded = tiny.pad({"input_ids": alone, "attention_mask": torch.ones_like(alone)}, 4, left=left)
        torch.testing.assert_close(model.get_context_features(**padded), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_saving_and_loading(family, tmp_path):
    model = tiny.poly_model(family)
    model.save_pretrained(tmp_path)
    again, info = PolyEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    batch = tiny.token_batch(3, 6, left=family in tiny.LEFT_PADDED)
    torch.testing.assert_close(again.get_context_features(**batch), model.get_context_features(**batch))


def test_no_parameter_is_left_without_a_gradient(family):
    """A pooler that nothing reads would stop distributed training."""
    model = tiny.poly_model(family).train()
    candidates = tiny.token_batch(3, 5)
    model(**tiny.token_batch(3, 6), candidate_input_ids=candidates["input_ids"], labels=torch.arange(3)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_from_text(family, checkpoints):
    model = PolyEncoder(checkpoints(family), num_codes=3, device="cpu")
    contexts = model.encode_query(["hello", ["a", "longer one, of two turns"]])
    candidates = model.encode_document(["yes", "no, not at all", "x"])
    assert contexts.shape == (2, 3, tiny.WIDTH)
    assert candidates.shape == (3, tiny.WIDTH)
    alone = model.encode_query(["hello"])
    torch.testing.assert_close(torch.tensor(contexts[:1]), torch.tensor(alone), atol=2e-5, rtol=1e-4)


def test_a_million_characters(family, checkpoints):
    model = PolyEncoder(checkpoints(family), num_codes=3, device="cpu", max_context_length=64)
    text = "x" * 1_000_000 + " the very end"
    assert model.encode_query([text]).shape == (1, 3, tiny.WIDTH)


def test_positions_are_never_exceeded(checkpoints):
    """RoBERTa's 66 rows of positions hold 64 tokens; its tokenizer here knows no limit."""
    for name in ("bert", "roberta", "xlm-roberta", "mpnet"):
        model = PolyEncoder(checkpoints(name), num_codes=3, device="cpu")
        limit = 66 if name == "bert" else 64
        assert model.max_seq_length == limit
        assert model.preprocess(["y" * 500], task="query")["input_ids"].shape == (1, limit)
        model.encode_document(["y" * 500])
