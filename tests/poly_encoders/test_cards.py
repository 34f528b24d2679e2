"""The cards that the three encoders save: metadata, snippets, who may edit them, and that none loses a model."""

import logging
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData

from card_snippets import assert_prints_what_it_shows, python_blocks, ranking_shown, run_block
from hub_metadata import check_card
from parlai_original import FIXTURES
from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder
from poly_encoders.cards import BiEncoderModelCardData, PolyEncoderModelCardData
from poly_encoders.cards.card_text import is_generated, metadata_of, section_of, signed, snippet_id, with_id
from poly_encoders.cards.examples import MAX_CANDIDATE, MAX_CONTEXT, widget_examples
from poly_encoders.hub.model_files import model_files
from poly_encoders.parlai import convert_parlai_checkpoint

KINDS = {"poly": PolyEncoder, "bi": BiEncoder, "cross": CrossEncoder}
SETS = [
    {"context": ["a fish?", "no, a bird"], "candidates": ["it flies", "it swims", "it flies", "it barks"], "label": 0},
    {"context": "what barks", "candidates": ["a cat", "a dog", "a cow"], "label": 1},
    {"context": "what meows", "candidates": ["a cat", "a dog", "a cow"], "label": 0},
    {"context": "what moos", "candidates": ["a cat", "a dog", "a cow"], "label": 2},
]
PLACE = "path/to/this/model"


@pytest.fixture(scope="module")
def roomy(checkpoints):
    """A tiny encoder with room for the snippets' texts, of which each character is a token."""
    return checkpoints("bert", max_position_embeddings=256)


@pytest.fixture(scope="module")
def saved(roomy, tmp_path_factory):
    """A function from a kind to a folder that it was saved to, evaluated first; read only."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            torch.manual_seed(0)
            options = {"num_codes": 4} if kind == "poly" else {}
            model = KINDS[kind](roomy, device="cpu", **options)
            evaluate(model)
            folders[kind] = tmp_path_factory.mktemp("saved") / kind
            model.save_pretrained(str(folders[kind]))
        return folders[kind]

    return folder


def evaluate(model):
    options = {"name": "dev", "dataset": "acme/animals", "split": "validation", "at_k": (1, 2, 5)}
    return CandidateRankingEvaluator(SETS, show_progress_bar=False, write_csv=False, **options)(model)


def text_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task", "library"),
    [
        ("poly", "sentence-similarity", "transformers"),
        ("bi", "sentence-similarity", "sentence-transformers"),
        ("cross", "text-ranking", "sentence-transformers"),
    ],
)
def test_metadata_and_figures(saved, kind, task, library):
    card = ModelCard.load(saved(kind) / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == (task, library)
    assert {"poly-encoder", "arxiv:1905.01969"} <= set(card.data.tags)
    # The Hub shows plain sentence-transformers' snippet for this tag, and that cannot score with a Poly-encoder.
    assert ("sentence-transformers" in card.data.tags) == (kind != "poly")
    assert card.data.base_model is None, "a folder is no id of the Hub"
    assert check_card(text_of(saved(kind))) == []
    for leftover in ("{{", "{%", str(saved(kind).parent), "None", "Undefined"):
        assert leftover not in card.content

    expected = evaluate(KINDS[kind](str(saved(kind)), device="cpu"))
    results = {result.metric_type: result for result in card.data.eval_results}
    # Of three candidates or four, all rank among the first five: that would say nothing.
    assert results.keys() == {"recall@1", "recall@2", "mrr"}
    for name, result in results.items():
        assert result.metric_value == pytest.approx(expected[f"dev_{name}"], abs=1e-4)
        assert (result.dataset_type, result.dataset_split, result.task_type) == ("acme/animals", "validation", task)
    assert results["recall@1"].metric_name == "R@1"  # the sets are of two sizes
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    assert f"| MRR | {expected['dev_mrr']:.4f} |" in card.text

    if kind == "cross":
        assert "widget" not in card.data
        return
    # One text, each candidate once, and in an order that does not tell the positive.
    first, *rest = card.data["widget"]
    assert first == {"source_sentence": "a fish?\nno, a bird", "sentences": ["it barks", "it flies", "it swims"]}
    assert [example["source_sentence"] for example in rest] == ["what barks", "what meows"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_upstream_s_card_data_were_told(roomy, tmp_path, kind):
    told = SentenceTransformerModelCardData(license="mit", language="en", tags=["birds"], model_name="Birds")
    KINDS[kind](roomy, device="cpu", model_card_data=told).save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert {"birds", "poly-encoder"} <= set(card.data.tags)
    assert "# Birds" in card.text


def test_a_folder_s_name_is_no_id_of_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("sentence_transformers.base.model_card.get_model_info", asked.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert PolyEncoderModelCardData().set_base_model("org/model") is False
    assert asked == []


def test_a_trained_model_shows_emissions_and_options_but_no_paths(poly_encoder, tmp_path):
    class Tracker:
        _start_time = 1.0

        def _prepare_emissions_data(self):
            names = {"emissions": 0.0123, "energy_consumed": 0.5, "on_cloud": "N", "cpu_model": "x", "gpu_model": None}
            return type("Data", (), {**names, "ram_total_size": 8.0})

    data = poly_encoder.model_card_data
    data.code_carbon_callback = type("Callback", (), {"tracker": Tracker()})
    data.add_tags("generated_from_trainer")
    changed = {"max_steps": 3, "resume_from_checkpoint": "runs/x", "my_path": str(tmp_path), "hub_token": "hf_secret"}
    changed["other_path"] = "C:\\Users\\me"
    data.all_hyperparameters = data.non_default_hyperparameters = changed
    poly_encoder.save_pretrained(str(tmp_path / "model"))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data["co2_eq_emissions"]["emissions"] == pytest.approx(12.3)
    assert "12.3 g of CO2" in card.text
    assert "| `max_steps` | 3 |" in card.text
    for secret in (str(tmp_path), "runs/x", "hf_secret", "Users"):
        assert secret not in card.content


def test_the_user_wants_no_examples(roomy, tmp_path):
    data = BiEncoderModelCardData(generate_widget_examples=False)
    model = BiEncoder(roomy, device="cpu", model_card_data=data)
    evaluate(model)
    model.save_pretrained(str(tmp_path))
    assert "what barks" not in text_of(tmp_path)
    for block in python_blocks(text_of(tmp_path)):
        assert len(ranking_shown(block)) == 3  # of an example that is nobody's data
    again = BiEncoder(str(tmp_path), device="cpu")  # a no is one for good
    evaluate(again)
    again.save_pretrained(str(tmp_path / "again"))
    assert "what barks" not in text_of(tmp_path / "again")


def test_long_examples_are_clipped_and_come_last():
    long = {"context": "early words " * 100 + "the end", "candidates": ["right " * 100, "wrong"], "label": 0}
    alone = {"context": "no choice", "candidates": ["same", "same "], "label": 0}
    many = {"context": "which", "candidates": [f"wrong {i}" for i in range(40)] + ["right"], "label": 40}
    examples = widget_examples([long, alone, many, {"context": "short", "candidates": ["yes", "no"], "label": 1}], str)
    assert [example["source_sentence"][-9:] for example in examples] == ["which", "short", "s the end"]
    assert len(examples[0]["sentences"]) == 5
    assert "right" in examples[0]["sentences"]
    clipped = examples[2]
    assert len(clipped["source_sentence"]) <= MAX_CONTEXT + 4
    assert max(map(len, clipped["sentences"])) <= MAX_CANDIDATE + 4
    assert any(text.startswith("right right") for text in clipped["sentences"])


# --- snippets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("poly", {"context_vectors": "last_m", "num_codes": 3, "max_turns": 1, "turn_separator": ' | "x" '}),
        ("poly", {"max_context_length": 30, "max_candidate_length": 20}),
        ("poly", {"prompts": {"query": "ask: ", "document": "say: "}}),
        ("poly", {"context_vectors": "learnt_codes", "prompts": {"query": "ask: ", "document": "say: "}}),
        ("poly", {"context_vectors": "turns_and_codes", "num_codes": 2, "turn_separator": "\n"}),
        ("poly", {"turn_separator": " | "}),  # no single token
        ("bi", {"reduction": "first_m_mean", "num_codes": 3, "max_turns": 1}),
        ("bi", {"share_encoders": True, "max_context_length": 30, "turn_separator": "\\"}),
        ("bi", {"prompts": {"document": "say: "}}),
        ("cross", {"max_turns": 1, "turn_separator": " </s> "}),
    ],
)
def test_blocks_run_and_print_what_they_show(roomy, tmp_path, kind, options):
    KINDS[kind](roomy, device="cpu", **options).save_pretrained(str(tmp_path / "model"))
    card = text_of(tmp_path / "model")
    for block in python_blocks(card):
        assert_prints_what_it_shows(block, run_block(block.replace(PLACE, str(tmp_path / "model"))))
    details = card.split("## Usage")[0]
    shown = {"max_context_length": "the last {} |", "max_turns": "| Turns kept | the last {} |"}
    shown |= {"context_vectors": "of the kind `{}` |"}
    if options.get("context_vectors") != "turns_and_codes":
        shown["num_codes"] = "| Context vectors (m) | {}," if kind == "poly" else ", m = {} |"
    for name in options.keys() & shown.keys():
        assert shown[name].format(options[name]) in details
    # One tokenizer for both sides of a Bi-encoder cuts both on the left; the card says so in both of its places.
    end = "last" if kind == "bi" and options.get("share_encoders") else "first"
    assert f"| Tokens kept of a candidate | the {end} " in details
    assert f"of a candidate the {end} " in card
    if kind == "bi":
        plain = "prompts" in options
        assert ("texts are read as candidates, but without their prompt\n" in card) == plain


@pytest.mark.parametrize(
    ("options", "warned", "details"),
    [
        (
            {},
            False,
            ["one for each of its last 32 turns", "| cosines", "| 0.025 |", "each vector | 0.5 |", "at most 64;"],
        ),
        ({"last_turn_share": 0.0, "normalize": False}, False, ["| dot products |", "final attention | 1 |"]),
        ({"context_vectors": "learnt_codes"}, True, ["one for each of 64 learnt codes", "| cosines", "| 0.025 |"]),
        ({"context_vectors": "learnt_codes", "normalize": False}, True, ["64 learnt codes", "| dot products |"]),
        (
            {"context_vectors": "turns_and_codes", "num_codes": 8},
            True,
            ["last 8 turns and one for each of 8 learnt codes"],
        ),
        ({"context_vectors": "last_m"}, True, ["64 of the encoder's outputs", "that it takes as context vectors"]),
    ],
)
def test_what_a_poly_encoder_is_made_of(roomy, tmp_path, options, warned, details):
    PolyEncoder(roomy, device="cpu", **options).save_pretrained(str(tmp_path / "model"))
    card = text_of(tmp_path / "model")
    for detail in details:
        assert detail in card
    assert ("## Not trained yet" in card) == warned
    assert ("encode_query([conversation]), existing_vectors)" in card) != warned
    assert ("The last turn's share" in card) == ("| 0.5 |" in card)
    PolyEncoder(str(tmp_path / "model"), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert text_of(tmp_path / "again") == card


def test_a_temperature_that_was_learnt(roomy, tmp_path):
    learnt = {"learn_final_temperature": True, "learn_last_turn_share": True}
    model = PolyEncoder(roomy, device="cpu", config_kwargs=learnt)
    with torch.no_grad():
        model[0].model.log_temperature.fill_(-3.0)
        model[0].model.last_turn_logit.fill_(-1.0)
    model.save_pretrained(str(tmp_path))
    assert "| Temperature of the final attention | 0.0498, learnt |" in text_of(tmp_path)
    assert "| The last turn's share in each vector | 0.269, learnt |" in text_of(tmp_path)


def test_an_index_that_stayed(roomy, tmp_path):
    """Also when the model is loaded and saved again."""
    model = PolyEncoder(roomy, device="cpu", share_encoders=False)
    model.model_card_data.add_tags("generated_from_trainer")
    model.model_card_data.non_default_hyperparameters = {"freeze_candidate_encoder": True}
    model.save_pretrained(str(tmp_path / "model"))
    assert "Contexts alone were trained" in section_of(text_of(tmp_path / "model"), "Its index")
    PolyEncoder(str(tmp_path / "model"), device="cpu").save_pretrained(str(tmp_path / "again"))
    for heading in ("Its index", "Training"):
        assert section_of(text_of(tmp_path / "again"), heading) == section_of(text_of(tmp_path / "model"), heading)


@pytest.mark.parametrize("case", ["poly_codes8", "bi_mean", "cross_first"])
def test_a_converted_model(tmp_path, case):
    folder = tmp_path / "model"
    convert_parlai_checkpoint(FIXTURES / case / "model", folder)
    card = text_of(folder)
    assert check_card(card) == []
    assert "converted from a checkpoint of [ParlAI]" in card
    assert "Not trained yet" not in card
    ours, *others = python_blocks(card)
    assert_prints_what_it_shows(ours, run_block(ours.replace(PLACE, str(folder))))
    for block in others:  # pairs that are too long are cut by another rule there
        assert run_block(block.replace(PLACE, str(folder)))
    # All of it is pushed.
    assert set(model_files(folder)) == {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_an_example_that_cannot_be_ranked_costs_its_output_only(saved, tmp_path, monkeypatch):
    model = PolyEncoder(str(saved("poly")), device="cpu")
    monkeypatch.setattr(PolyEncoder, "rank", lambda *args, **options: 1 / 0)
    model.save_pretrained(str(tmp_path))
    assert "model.rank(context, candidates" in text_of(tmp_path)


# --- saving again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_keeps_what_is_still_true(saved, kind, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved(kind), folder)
    card = text_of(folder).replace("tags:\n", "license: mit\nbase_model: org/encoder\ntags:\n- mine\n- loss:Old\n", 1)
    card = with_id(signed(card.replace("## Citation", "## Training\n\n![](evaluation.png)\n\n## Citation")), "acme/it")
    (folder / "README.md").write_text(card)
    (folder / "evaluation.png").write_bytes(b"a picture")
    model = KINDS[kind](str(folder), device="cpu")
    model.model_card_data.base_model = "acme/it"  # as upstream says of what comes from the Hub
    model.save_pretrained(str(tmp_path / "again"))
    before, after = metadata_of(card), metadata_of(text_of(tmp_path / "again"))
    assert sorted(after.pop("tags")) == sorted(before.pop("tags"))
    assert after == before
    for heading in ("Training", "Evaluation", "As the encoder comes", "Usage"):
        assert section_of(text_of(tmp_path / "again"), heading) == section_of(card, heading)
    assert (tmp_path / "again" / "evaluation.png").read_bytes() == b"a picture"
    # Settings that have changed are in it, and a license that the program sets.
    changed = KINDS[kind](str(folder), device="cpu", max_turns=7)
    changed.model_card_data.set_license("apache-2.0")
    changed.save_pretrained(str(tmp_path / "changed"))
    assert "| Turns kept | the last 7 |" in text_of(tmp_path / "changed")
    assert metadata_of(text_of(tmp_path / "changed"))["license"] == "apache-2.0"
    # Trained further, it is another model: license, language, tags and base model alone are still true.
    model.model_card_data.add_tags("generated_from_trainer")  # upstream's mark of a run
    model.save_pretrained(str(tmp_path / "trained"))
    trained = metadata_of(text_of(tmp_path / "trained"))
    assert (trained["license"], trained["base_model"]) == ("mit", "acme/it")
    assert "mine" in trained["tags"]
    assert not {"widget", "model-index", "metrics"} & trained.keys()
    assert "loss:Old" not in trained["tags"]
    assert snippet_id(text_of(tmp_path / "trained")) is None
    for gone in ("evaluation.png", "## Evaluation", "## As the encoder comes"):
        assert gone not in text_of(tmp_path / "trained")


@pytest.mark.parametrize("kind", KINDS)
def test_saving_twice_gives_the_same_card(saved, kind, tmp_path):
    model = KINDS[kind](str(saved(kind)), device="cpu")
    for _ in range(2):
        model.save_pretrained(str(tmp_path))
        assert text_of(tmp_path) == text_of(saved(kind))
    assert ("## As the encoder comes" in text_of(tmp_path)) == (kind == "poly")
    assert "## Not trained yet" not in text_of(tmp_path)


@pytest.mark.parametrize("edit", ["license: mit\ntags:", "tags:\n# a comment\n", None])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_card_stays_until_the_model_is_trained(saved, kind, edit, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(saved(kind), folder)
    card = "# All mine {{ braces }}\n" if edit is None else text_of(folder).replace("tags:", edit, 1)
    (folder / "README.md").write_text(card)
    model = KINDS[kind](str(folder), device="cpu")
    model.save_pretrained(str(folder))
    model.save_pretrained(str(tmp_path / "elsewhere"))
    assert text_of(tmp_path / "elsewhere") == card
    model.model_card_data.add_tags("generated_from_trainer")
    model.save_pretrained(str(folder))
    assert text_of(folder) == card
    assert caplog.text.count("written or edited by hand, so it stays as it is") == 3
    model.save_pretrained(str(tmp_path / "trained"))
    assert "## Training" in text_of(tmp_path / "trained")
    assert ("license: mit" in text_of(tmp_path / "trained")) == ("license" in (edit or ""))


def test_whose_card_it_is():
    card = signed('# Title\n\nmodel = PolyEncoder("path/to/this/model")\n')
    assert is_generated(card)
    assert is_generated(card.replace("\n", "\r\n"))
    assert signed(card) == card
    assert snippet_id(card) is None
    assert snippet_id(with_id(with_id(card, "a/b"), "c/d")) == "c/d"
    for edited in (card.replace("Title", "title"), card + "\nMore.\n", card.split("<!--")[0], "", "# Mine\n"):
        assert not is_generated(edited)
        assert with_id(edited, "a/b") == edited
    assert metadata_of("---\nlicense: [mit\n---\n") == metadata_of("---\njust text\n---\n") == metadata_of("x") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_that_fails_loses_no_model(saved, kind, tmp_path, monkeypatch, caplog):
    shutil.copytree(saved(kind), tmp_path / "model")
    model = KINDS[kind](str(tmp_path / "model"), device="cpu")
    monkeypatch.setattr(type(model), "length_limits", lambda self: 1 / 0)
    with caplog.at_level(logging.ERROR, logger="poly_encoders"):
        model.save_pretrained(str(tmp_path / "model"))
        model.save_pretrained(str(tmp_path / "other"))
    assert "card could not be made" in caplog.text
    assert text_of(tmp_path / "model") == text_of(saved(kind)), "the card that was there stays"
    assert not (tmp_path / "other" / "README.md").exists()
    monkeypatch.undo()
    assert KINDS[kind](str(tmp_path / "other"), device="cpu").rank("a", ["b"])


def test_the_card_of_the_encoder_is_not_taken_for_the_model_s(sentence_transformer_folder, tmp_path):
    """Upstream would save a SentenceTransformer's card with every Bi-encoder built on it."""
    shutil.copytree(sentence_transformer_folder, tmp_path / "start")
    (tmp_path / "start" / "README.md").write_text("---\nlicense: mit\n---\n# Somebody else's model\n")
    BiEncoder(str(tmp_path / "start"), device="cpu").save_pretrained(str(tmp_path / "bi"))
    assert "Somebody else" not in text_of(tmp_path / "bi")
    assert "# Bi-encoder" in text_of(tmp_path / "bi")


def test_upstream_s_names_that_cards_lean_on():
    """Both are private to sentence-transformers: a release without them fails here."""
    model = SentenceTransformer(modules=[torch.nn.Identity()], device="cpu")
    assert model._model_card_text is None
    assert callable(model._create_model_card)
    for kind in KINDS.values():
        assert kind._create_model_card is not SentenceTransformer._create_model_card
