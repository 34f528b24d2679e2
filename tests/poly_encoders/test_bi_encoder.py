"""BiEncoder: the paper's reductions, and checkpoints that plain sentence-transformers reads to the same bits."""

import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

from poly_encoders import BiEncoder
from poly_encoders.loading import load_model
from without_package import run_without_package

CONTEXTS = ["hello", ["a", "b c"], "a long text that goes on and on, far beyond the limit of tokens"]
CANDIDATES = ["yes", "no, not at all", "another long text that goes on and on, far beyond the limit"]
KINDS = [
    {"reduction": reduction, "share_encoders": shared, **({"num_codes": 3} if reduction == "first_m_mean" else {})}
    for reduction in ("first", "mean", "first_m_mean")
    for shared in (False, True)
]

WITHOUT_PACKAGE = """
import numpy as np
from sentence_transformers import SentenceTransformer
path, trust, out, *texts = sys.argv[1:]
model = SentenceTransformer(path, trust_remote_code=trust == "True", device="cpu")
query, document = model.encode_query(texts[:3]), model.encode_document(texts[3:])
np.savez(out, query=query, document=document, default=model.encode(texts[3:]), scores=model.similarity(query, document))
"""


def make(checkpoints, **options):
    return BiEncoder(checkpoints(), device="cpu", **{"max_context_length": 20, "max_candidate_length": 12, **options})


@pytest.mark.parametrize("options", KINDS)
def test_vectors_follow_the_paper(checkpoints, tmp_path, options):
    """Here, loaded again, and in plain sentence-transformers, where a text of no side is taken for a candidate."""
    model = make(checkpoints, **options, turn_separator=" | ")
    model.save_pretrained(str(tmp_path / "model"))
    again = BiEncoder(str(tmp_path / "model"), device="cpu")
    assert (again.share_encoders, again.turn_separator) == (options["share_encoders"], " | ")
    assert again.reduction_options() == {name: options[name] for name in options if name != "share_encoders"}
    with pytest.raises(ValueError, match="would need training anew"):
        BiEncoder(str(tmp_path / "model"), share_encoders=not options["share_encoders"], device="cpu")
    code = [file.name for file in (tmp_path / "model").rglob("*.py")]
    is_ours = options["reduction"] == "first_m_mean"
    assert code == ["first_m_pooling.py"] * is_ours

    texts = {"query": model.context_texts(CONTEXTS), "document": CANDIDATES}
    arguments = [tmp_path / "model", is_ours, tmp_path / "plain.npz", *texts["query"], *CANDIDATES]
    run_without_package(WITHOUT_PACKAGE, *map(str, arguments), cache=tmp_path)
    plain = np.load(tmp_path / "plain.npz")
    vectors = {"query": model.encode_query(CONTEXTS), "document": model.encode_document(CANDIDATES)}
    if not model.share_encoders:  # one encoder for both knows no side that it could take
        np.testing.assert_array_equal(plain["default"], vectors["document"])
    np.testing.assert_array_equal(plain["scores"], model.similarity(*vectors.values()).numpy())
    for task, encode in (("query", again.encode_query), ("document", again.encode_document)):
        np.testing.assert_array_equal(plain[task], vectors[task])
        np.testing.assert_array_equal(encode(CONTEXTS if task == "query" else CANDIDATES), vectors[task])
        encoder = model[0] if model.share_encoders else model[0].sub_modules[task][0]
        for text, vector in zip(texts[task], vectors[task], strict=True):
            features = model.preprocess([text], task=task)
            ids = {name: features[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                hidden = encoder.model(**ids).last_hidden_state[0]
            kept = {"first": hidden[:1], "mean": hidden, "first_m_mean": hidden[:3]}[options["reduction"]]
            np.testing.assert_allclose(vector, kept.mean(dim=0).numpy(), atol=1e-5)
    torch.testing.assert_close(
        model.similarity(*vectors.values()), torch.tensor(vectors["query"]) @ torch.tensor(vectors["document"]).T
    )


def test_the_hubs_widget_takes_a_text_for_a_candidate(checkpoints, tmp_path):
    """It calls encode, which could not determine the route; so did models that were saved before."""
    model = make(checkpoints)
    model[0].default_route, model[0].allow_empty_key = None, False
    model.save_pretrained(str(tmp_path / "old"))
    with pytest.raises(ValueError, match="route"):
        SentenceTransformer(str(tmp_path / "old"), device="cpu").encode(CANDIDATES)
    load_model(tmp_path / "old", device="cpu").save_pretrained(str(tmp_path / "new"))
    plain = SentenceTransformer(str(tmp_path / "new"), device="cpu")
    np.testing.assert_array_equal(plain.encode(CANDIDATES), model.encode_document(CANDIDATES))
    for call in (model.encode, model.preprocess, BiEncoder(tmp_path / "new", device="cpu").encode):
        with pytest.raises(ValueError, match="encode_query"):
            call(["x"])


def test_a_shared_encoder_has_a_limit_for_each_side_and_cuts_on_the_left(checkpoints):
    model = make(checkpoints, share_encoders=True, max_context_length=9, max_candidate_length=5)
    for task, kept in (("query", "defghij"), ("document", "hij")):
        ids = model.preprocess(["abcdefghij"], task=task)["input_ids"][0]
        assert model.tokenizer.convert_ids_to_tokens(ids) == ["<s>", *kept, "</s>"]


def test_separate_encoders_start_equal_and_apart(checkpoints):
    context, candidate = (side[0] for side in make(checkpoints)[0].sub_modules.values())
    for ours, theirs in zip(context.parameters(), candidate.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("shared", [False, True])
def test_a_sentence_transformer_keeps_its_cosine_unless_told_otherwise(sentence_transformer_folder, tmp_path, shared):
    """Dropping it, as was done, cost a checkpoint 4 points before any training."""
    unit = SentenceTransformer(sentence_transformer_folder, device="cpu").encode(CANDIDATES[:2])
    cosine = BiEncoder(sentence_transformer_folder, device="cpu", share_encoders=shared)
    dot = BiEncoder(sentence_transformer_folder, device="cpu", share_encoders=shared, similarity_fn_name="dot")
    np.testing.assert_allclose(cosine.encode_document(CANDIDATES[:2]), unit, atol=1e-6)
    vectors = dot.encode_document(CANDIDATES[:2])
    np.testing.assert_allclose(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), unit, atol=1e-5)
    assert not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    for model, name in ((cosine, "cosine"), (dot, "dot")):
        model.save_pretrained(str(tmp_path / name))
        for each in (model, BiEncoder(tmp_path / name, device="cpu"), load_model(tmp_path / name, device="cpu")):
            assert (each.similarity_fn_name, each.scores_are_cosines) == (name, name == "cosine")
            np.testing.assert_array_equal(each.encode_document(CANDIDATES), model.encode_document(CANDIDATES))


def test_what_brings_no_similarity_has_dot_products(checkpoints, sentence_transformer_folder):
    """So has a model of modules, as one converted from ParlAI is, which once got the cosine."""
    modules = list(make(checkpoints))
    for model in (make(checkpoints), BiEncoder(modules=modules, device="cpu")):
        assert (model.similarity_fn_name, model.scores_are_cosines) == ("dot", False)
    normalised = BiEncoder(modules=list(SentenceTransformer(sentence_transformer_folder, device="cpu")), device="cpu")
    assert (normalised.similarity_fn_name, normalised.scores_are_cosines) == ("dot", True)
    assert make(checkpoints, similarity_fn_name="cosine").scores_are_cosines


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reduction": "max"}, "'first', 'mean'"),
        ({"num_codes": 4}, "belongs to"),
        ({"max_context_length": 2}, "no room"),
    ],
)
def test_bad_options(checkpoints, options, said):
    with pytest.raises(ValueError, match=said):
        make(checkpoints, **options)


def test_a_router_of_anothers_is_arranged_as_well(sentence_transformer_folder, tmp_path):
    side = list(SentenceTransformer(sentence_transformer_folder, device="cpu"))
    router = Router.for_query_document(side, deepcopy(side))
    SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path))
    for options, rest in (({}, ["Normalize"]), ({"similarity_fn_name": "dot"}, [])):
        model = BiEncoder(str(tmp_path), reduction="first", device="cpu", **options)
        for modules in model[0].sub_modules.values():
            assert [type(module).__name__ for module in modules] == ["Transformer", "Pooling", *rest]
            assert modules[1].pooling_mode == "cls"
    with pytest.raises(ValueError, match="share_encoders"):
        BiEncoder(str(tmp_path), share_encoders=True, device="cpu")


@pytest.mark.slow
def test_several_devices_come_to_an_end(checkpoints):
    """Once seen not to end in three minutes, on a machine with much else to do."""
    model, texts, found = make(checkpoints), [f"text {number}" for number in range(10)], []

    def encode():
        found.append(model.encode_document(texts, device=["cpu", "cpu"], chunk_size=3))

    thread = threading.Thread(target=encode, daemon=True)
    thread.start()
    thread.join(timeout=180)
    assert found, "encode_document has not ended"
    np.testing.assert_allclose(found[0], model.encode_document(texts), atol=1e-5)
