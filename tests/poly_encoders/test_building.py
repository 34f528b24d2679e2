"""PolyEncoder on disk: saving, loading, building on other checkpoints, and what each refuses."""

import json
import logging
from copy import deepcopy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder

CONTEXTS = ["hello", ["a", "b c", "how are you?"], [{"role": "user", "content": "what time is it"}]]
CANDIDATES = ["yes", "no, not at all", "it is nine", "x"]


def test_save_and_load(poly_encoder, saved_poly_encoder):
    again = PolyEncoder(str(saved_poly_encoder), device="cpu")
    np.testing.assert_array_equal(again.encode_query(CONTEXTS), poly_encoder.encode_query(CONTEXTS))
    np.testing.assert_array_equal(again.encode_document(CANDIDATES), poly_encoder.encode_document(CANDIDATES))
    files = {file.name for file in saved_poly_encoder.iterdir()}
    assert files >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "configuration_poly_encoder.py",
        "modeling_poly_encoder.py",
        "modules.json",
        "config_sentence_transformers.json",
        "README.md",
    }
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_saved_folder_through_transformers(poly_encoder, saved_poly_encoder):
    model = AutoModel.from_pretrained(saved_poly_encoder)
    features = poly_encoder.preprocess(["hello"], task="query")
    features.pop("task")
    with torch.no_grad():
        vectors = model.get_context_features(**features)
    torch.testing.assert_close(vectors, poly_encoder.encode_query(["hello"], convert_to_tensor=True))


def test_a_folder_saved_by_transformers_alone(poly_encoder, tmp_path):
    poly_encoder[0].model.save_pretrained(tmp_path)
    poly_encoder.tokenizer.save_pretrained(tmp_path)
    again = PolyEncoder(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.encode_query(CONTEXTS), poly_encoder.encode_query(CONTEXTS))


def test_a_sentence_transformer_brings_weights_pooling_and_ranking(sentence_transformer_folder):
    """The paper's, when new, ranks as the mean-pooled model's dot products do, because its codes are near zero."""
    original = SentenceTransformer(sentence_transformer_folder, device="cpu")
    pooled = torch.nn.Sequential(*list(original)[:2])
    codes = {"context_vectors": "learnt_codes", "normalize": False, "config_kwargs": {"code_std": 0.0}}
    model = PolyEncoder(sentence_transformer_folder, num_codes=16, device="cpu", **codes)
    assert model[0].config.reduction == "mean"
    with torch.no_grad():
        expected = [pooled(original.preprocess([text]))["sentence_embedding"][0] for text in CANDIDATES]
    candidates = model.encode_document(CANDIDATES, convert_to_tensor=True)
    torch.testing.assert_close(candidates, torch.stack(expected), atol=1e-5, rtol=1e-5)
    contexts = model.encode_query(CANDIDATES, convert_to_tensor=True)
    torch.testing.assert_close(model.similarity(contexts, candidates), candidates @ candidates.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_vectors_that_a_checkpoint_gave_stay_valid(sentence_transformer_folder, tmp_path, pooling):
    source = SentenceTransformer(sentence_transformer_folder, device="cpu")
    source[1].pooling_mode = pooling
    source.save(str(tmp_path))
    model = PolyEncoder(str(tmp_path), device="cpu")
    index = source.encode([*CANDIDATES, "long " * 40])
    np.testing.assert_allclose(model.encode_document([*CANDIDATES, "long " * 40]), index, atol=1e-6)
    scores = model.similarity(model.encode_query([CONTEXTS[1]]), index[:4])[0].tolist()
    ranking = {entry["corpus_id"]: entry["score"] for entry in model.rank(CONTEXTS[1], CANDIDATES)}
    assert [ranking[place] for place in range(4)] == pytest.approx(scores, abs=1e-6)


def test_prompts_of_a_checkpoint_are_kept(sentence_transformer_folder, tmp_path):
    """Without them an index made with one got other vectors beside it, and contexts were read as never before."""
    prompts = {"query": "ask: ", "document": "say: "}
    modules = list(SentenceTransformer(sentence_transformer_folder, device="cpu"))
    source = SentenceTransformer(modules=modules, prompts=prompts, device="cpu")
    source.save(str(tmp_path / "theirs"))
    model = PolyEncoder(str(tmp_path / "theirs"), device="cpu")
    assert (model.prompts, model.default_prompt_name, model.similarity_fn_name) == (prompts, None, "custom")
    np.testing.assert_allclose(model.encode_document(CANDIDATES), source.encode_document(CANDIDATES), atol=1e-6)
    mine = PolyEncoder(str(tmp_path / "theirs"), device="cpu", prompts={"query": "mine: "})
    assert mine.prompts == {"query": "mine: ", "document": "say: "}
    model.save_pretrained(str(tmp_path / "ours"))
    assert PolyEncoder(str(tmp_path / "ours"), device="cpu").prompts == prompts


NEW = {"context_vectors": "turns", "num_codes": 32, "share_encoders": True, "last_turn_share": 0.5}
COSINES, DOTS = {"normalize": True, "final_temperature": 0.025}, {"normalize": False, "final_temperature": 1.0}
PAPERS = {"num_codes": 64, "share_encoders": False, "last_turn_share": 0.0, "code_std": 0.05, **DOTS}
CODES = {**PAPERS, **COSINES, "share_encoders": True, "code_std": 0.5}


@pytest.mark.parametrize(
    ("similarity", "options", "expected"),
    [
        (None, {}, {**NEW, **COSINES}),  # a plain encoder
        ("cosine", {}, {**NEW, **COSINES}),
        ("dot", {}, {**NEW, **DOTS}),
        ("dot", {"normalize": True}, {**NEW, **COSINES}),
        ("cosine", {"normalize": False}, {**NEW, **DOTS}),
        ("cosine", {"context_vectors": "turns_and_codes"}, {**NEW, **COSINES, "context_vectors": "turns_and_codes"}),
        ("cosine", {"last_turn_share": 0.0}, {**NEW, **COSINES, "last_turn_share": 0.0}),
        ("cosine", {"context_vectors": "learnt_codes"}, CODES),
        ("cosine", {"context_vectors": "learnt_codes", "normalize": False}, PAPERS),
        ("dot", {"context_vectors": "learnt_codes"}, PAPERS),
        (None, {"context_vectors": "first_m"}, PAPERS),
        ("dot", {"context_vectors": "learnt_codes", "normalize": True}, CODES),
    ],
)
def test_what_a_new_model_is(checkpoints, sentence_transformer_folder, tmp_path, similarity, options, expected):
    path = checkpoints()
    if similarity is not None:
        modules = list(SentenceTransformer(sentence_transformer_folder, device="cpu"))[: 2 + (similarity == "cosine")]
        SentenceTransformer(modules=modules, similarity_fn_name=similarity, device="cpu").save(str(tmp_path))
        path = str(tmp_path)
    model = PolyEncoder(path, device="cpu", **options)
    config = model[0].config
    expected = {**expected, **options}
    assert {name: getattr(config, name) for name in expected} == expected
    assert model.scores_are_cosines == config.normalize
    lengths = np.linalg.norm(model.encode_document(CANDIDATES), axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == config.normalize


def test_cls_pooling_becomes_first(sentence_transformer_folder, tmp_path):
    source = SentenceTransformer(sentence_transformer_folder, device="cpu")
    source[1].pooling_mode = "cls"
    source.save(str(tmp_path / "cls"))
    assert PolyEncoder(str(tmp_path / "cls"), num_codes=2, device="cpu")[0].config.reduction == "first"
    source[1].pooling_mode = "max"
    source.save(str(tmp_path / "max"))
    with pytest.raises(ValueError, match="'max'"):
        PolyEncoder(str(tmp_path / "max"), num_codes=2, device="cpu")
    model = PolyEncoder(str(tmp_path / "max"), num_codes=2, reduction="mean", device="cpu")
    assert model[0].config.reduction == "mean"


def test_a_module_without_counterpart_is_refused(sentence_transformer_folder, tmp_path):
    from sentence_transformers.base.modules import Dense

    source = SentenceTransformer(sentence_transformer_folder, device="cpu")
    source.append(Dense(tiny.WIDTH, 8))
    source.save(str(tmp_path))
    with pytest.raises(ValueError, match="Dense module"):
        PolyEncoder(str(tmp_path), device="cpu")


def test_a_bi_encoder_brings_both_its_encoders(checkpoints, tmp_path):
    bi = BiEncoder(checkpoints(), max_context_length=20, max_candidate_length=9, turn_separator=" | ", device="cpu")
    with torch.no_grad():
        bi[0].sub_modules["document"][0].model.embeddings.word_embeddings.weight.mul_(1.5)
    bi.save_pretrained(str(tmp_path))
    model = PolyEncoder(str(tmp_path), num_codes=2, device="cpu")
    np.testing.assert_allclose(model.encode_document(CANDIDATES), bi.encode_document(CANDIDATES), atol=1e-5)
    config = model[0].config
    assert (config.max_context_length, config.max_candidate_length, config.turn_separator) == (20, 9, " | ")
    with pytest.raises(ValueError, match="share_encoders"):
        PolyEncoder(str(tmp_path), share_encoders=True, device="cpu")


def test_options_of_a_saved_model(saved_poly_encoder):
    model = PolyEncoder(str(saved_poly_encoder), max_context_length=12, turn_separator=" / ", device="cpu")
    assert model.max_seq_length == 12
    assert model.context_texts([["a", "b"]]) == ["a / b"]
    assert PolyEncoder(str(saved_poly_encoder), num_codes=4, device="cpu")[0].config.num_codes == 4
    numbers = {"normalize": False}, {"final_temperature": 0.1}, {"last_turn_share": 0.4}
    for options in ({"num_codes": 5}, {"context_vectors": "first_m"}, *numbers):
        with pytest.raises(ValueError, match="would need training anew"):
            PolyEncoder(str(saved_poly_encoder), device="cpu", **options)


@pytest.mark.parametrize("kind", ["turns_and_codes", "learnt_codes"])
def test_one_encoder_divides_into_two_equal_ones(checkpoints, tmp_path, kind):
    """So that a model with one can be trained on, its candidates' side frozen."""
    model = PolyEncoder(checkpoints(), context_vectors=kind, num_codes=2, share_encoders=True, device="cpu")
    model.save_pretrained(str(tmp_path / "one"))
    two = PolyEncoder(str(tmp_path / "one"), share_encoders=False, device="cpu")
    assert two[0].model.context_encoder is not two[0].model.candidate_encoder
    two.save_pretrained(str(tmp_path / "two"))
    for again in (two, PolyEncoder(str(tmp_path / "two"), device="cpu")):
        assert not again[0].config.share_encoders
        np.testing.assert_array_equal(again.encode_document(CANDIDATES), model.encode_document(CANDIDATES))
        np.testing.assert_array_equal(again.encode_query(["a b"]), model.encode_query(["a b"]))
    with pytest.raises(ValueError, match="would need training anew"):
        PolyEncoder(str(tmp_path / "two"), share_encoders=True, device="cpu")


def test_shared_encoders(checkpoints, tmp_path):
    model = PolyEncoder(checkpoints(), num_codes=2, share_encoders=True, device="cpu")
    assert model[0].model.context_encoder is model[0].model.candidate_encoder
    model.save_pretrained(str(tmp_path))
    again = PolyEncoder(str(tmp_path), device="cpu")
    assert again[0].config.share_encoders
    np.testing.assert_array_equal(again.encode_document(CANDIDATES), model.encode_document(CANDIDATES))


@pytest.mark.parametrize("kind", ["first_m", "last_m", "first_and_last_m", "turns_and_codes"])
def test_other_context_vectors_survive_saving(checkpoints, tmp_path, kind):
    model = PolyEncoder(checkpoints(), num_codes=3, context_vectors=kind, device="cpu")
    model.save_pretrained(str(tmp_path))
    again = PolyEncoder(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(again.encode_query(CONTEXTS), model.encode_query(CONTEXTS))
    assert again.rank(CONTEXTS[1], CANDIDATES) == model.rank(CONTEXTS[1], CANDIDATES)


def test_a_plain_sentence_transformer_refuses_it(saved_poly_encoder):
    with pytest.raises(TypeError, match=r"poly_encoders\.PolyEncoder\(path\)"):
        SentenceTransformer(str(saved_poly_encoder), device="cpu").encode(["hello"])


@pytest.mark.parametrize("wrong", [BiEncoder, CrossEncoder])
def test_our_other_classes_refuse_it(saved_poly_encoder, wrong):
    with pytest.raises(ValueError, match="PolyEncoder"):
        wrong(str(saved_poly_encoder), device="cpu")


def test_another_kind_of_checkpoint_is_refused(checkpoints, tmp_path):
    CrossEncoder(checkpoints(), device="cpu").save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="is a CrossEncoder"):
        PolyEncoder(str(tmp_path), device="cpu")


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(OSError):
        PolyEncoder(str(tmp_path / "nothing"), device="cpu")
    with pytest.raises(ValueError, match="need a model_name_or_path"):
        PolyEncoder(num_codes=3)


def test_missing_weights_are_never_made_up(saved_codes_encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in saved_codes_encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["codes"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="do not hold codes"):
        PolyEncoder(str(tmp_path), device="cpu")
    config = json.loads((saved_codes_encoder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((saved_codes_encoder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_codes": 7}))
    with pytest.raises(OSError, match=r"codes \(there \(4, 32\), expected \(7, 32\)\)"):
        PolyEncoder(str(tmp_path), device="cpu")


def test_the_card_is_data_and_has_no_leftovers(poly_encoder, saved_poly_encoder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(saved_poly_encoder / "README.md")
    assert {"poly-encoder", "arxiv:1905.01969"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "sentence-similarity"
    for leftover in ("{{", "{%", "SentenceTransformer(", "None"):
        assert leftover not in card.text


def test_the_card_s_snippet_runs_as_printed(saved_poly_encoder, capsys):
    card = (saved_poly_encoder / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0].replace("path/to/this/model", str(saved_poly_encoder))
    exec(compile(snippet, "card", "exec"), {})
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    promised = [line[2:] for line in snippet.splitlines() if line.startswith("# ")]
    assert printed == promised


@pytest.mark.parametrize(
    ("options", "warned"),
    [({}, False), ({"context_vectors": "learnt_codes"}, True), ({"context_vectors": "turns_and_codes"}, True)],
)
def test_a_warning_that_new_codes_need_training(checkpoints, options, warned):
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_warning()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    upstream = logging.getLogger("poly_encoders.modeling.modeling_poly_encoder")
    upstream.addHandler(handler)
    try:
        transformers_logging.get_logger("x").warning_once.cache_clear()
        PolyEncoder(checkpoints(), num_codes=2, device="cpu", **options)
    finally:
        upstream.removeHandler(handler)
    assert any("train it" in record for record in records) == warned


def test_copies_are_independent(poly_encoder):
    copy = deepcopy(poly_encoder)
    with torch.no_grad():
        next(copy.parameters()).zero_()
    assert next(poly_encoder.parameters()).abs().sum() > 0


def test_a_folder_of_transformers_alone_refuses_other_options_too(poly_encoder, tmp_path):
    poly_encoder[0].model.save_pretrained(tmp_path)
    poly_encoder.tokenizer.save_pretrained(tmp_path)
    for options in ({"num_codes": 8}, {"reduction": "first"}):
        with pytest.raises(ValueError, match="would need training anew"):
            PolyEncoder(str(tmp_path), device="cpu", **options)


def test_an_encoder_with_weights_missing_is_refused(checkpoints, tmp_path):
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    for file in Path(checkpoints()).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: weights[k] for k in sorted(weights)[::2]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="does not hold"):
        PolyEncoder(str(tmp_path), device="cpu")


def test_two_vocabularies_are_refused(sentence_transformer_folder, tmp_path):
    from copy import deepcopy

    from sentence_transformers.base.modules import Router

    side = list(SentenceTransformer(sentence_transformer_folder, device="cpu"))
    other = deepcopy(side)
    other[0].tokenizer.add_tokens(["newword"])
    other[0].model.resize_token_embeddings(len(other[0].tokenizer))
    SentenceTransformer(modules=[Router.for_query_document(side, other)], device="cpu").save(str(tmp_path))
    with pytest.raises(ValueError, match="different vocabularies"):
        PolyEncoder(str(tmp_path), device="cpu")
