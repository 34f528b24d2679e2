"""The cards that the three encoders save: their metadata, their snippets, and that no card loses a model."""

import json
import logging
import shutil

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from transformers import AutoModel

import tiny
from card_snippets import assert_prints_what_it_shows, python_blocks, ranking_shown, run_block
from hub_metadata import check_card
from parlai_original import FIXTURES
from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder
from poly_encoders.cards import BiEncoderModelCardData, PolyEncoderModelCardData
from poly_encoders.cards.examples import MAX_CANDIDATE, MAX_CONTEXT, widget_examples
from poly_encoders.parlai import convert_parlai_checkpoint
from without_package import run_without_package

KINDS = {"poly": PolyEncoder, "bi": BiEncoder, "cross": CrossEncoder}
SETS = [
    {"context": ["a fish?", "no, a bird"], "candidates": ["it flies", "it swims", "it flies", "it barks"], "label": 0},
    {"context": "what barks", "candidates": ["a cat", "a dog", "a cow"], "label": 1},
    {"context": "what meows", "candidates": ["a cat", "a dog", "a cow"], "label": 0},
    {"context": "what moos", "candidates": ["a cat", "a dog", "a cow"], "label": 2},
]


@pytest.fixture(scope="module")
def roomy_checkpoint(tmp_path_factory):
    """A tiny encoder with room for the snippets' texts, of which each character is a token."""
    folder = tmp_path_factory.mktemp("roomy")
    config = tiny.family_config("bert")
    config.max_position_embeddings = 256
    torch.manual_seed(3)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(roomy_checkpoint, tmp_path_factory):
    """A function from a kind to a folder that it was saved to, evaluated first; read only."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            torch.manual_seed(0)
            options = {"num_codes": 4, "config_kwargs": {"code_std": 1.0}} if kind == "poly" else {}
            model = KINDS[kind](roomy_checkpoint, device="cpu", **options)
            evaluate(model)
            folders[kind] = tmp_path_factory.mktemp("saved") / kind
            model.save_pretrained(str(folders[kind]))
        return folders[kind]

    return folder


def evaluate(model, **options):
    settings = {"name": "dev", "dataset": "acme/animals", "split": "validation", "at_k": (1, 2, 5)}
    settings |= {"show_progress_bar": False, "write_csv": False}
    return CandidateRankingEvaluator(SETS, **{**settings, **options})(model)


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
def test_metadata(saved, kind, task, library):
    card = ModelCard.load(saved(kind) / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == (task, library)
    assert {"poly-encoder", "arxiv:1905.01969"} <= set(card.data.tags)
    # The Hub shows plain sentence-transformers' snippet for this tag, and that cannot score with a Poly-encoder.
    assert ("sentence-transformers" in card.data.tags) == (kind != "poly")
    assert card.data.base_model is None, "a folder is no id of the Hub"
    assert check_card(text_of(saved(kind))) == ([], [])
    for leftover in ("{{", "{%", str(saved(kind).parent), "None", "Undefined"):
        assert leftover not in card.content


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_results_for_the_hub(saved, kind):
    card = ModelCard.load(saved(kind) / "README.md")
    expected = evaluate(KINDS[kind](str(saved(kind)), device="cpu"))
    results = {result.metric_type: result for result in card.data.eval_results}
    # Of three candidates or four, all rank among the first five: that would say nothing.
    assert results.keys() == {"recall@1", "recall@2", "mrr"}
    for name, result in results.items():
        assert isinstance(result, EvalResult)
        assert result.metric_value == pytest.approx(expected[f"dev_{name}"], abs=1e-4)
        assert (result.dataset_type, result.dataset_split) == ("acme/animals", "validation")
        assert result.task_type == card.data.pipeline_tag
    assert results["recall@1"].metric_name == "R@1"  # the sets are of two sizes
    again = ModelCardData(**ModelCard(card.content).data.to_dict())
    assert again.to_dict() == card.data.to_dict()
    assert f"| MRR | {expected['dev_mrr']:.4f} |" in card.text


def test_metrics_name_the_number_of_candidates():
    evaluator = CandidateRankingEvaluator(SETS[1:], at_k=(1, 2, 3), shared_candidates=["a horse"])
    assert evaluator.metric_labels == {"recall@1": "R@1/4", "recall@2": "R@2/4", "recall@3": "R@3/4", "mrr": "MRR"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_upstream_s_card_data_were_told(roomy_checkpoint, tmp_path, kind):
    told = SentenceTransformerModelCardData(license="mit", language="en", tags=["birds"], model_name="Birds")
    KINDS[kind](roomy_checkpoint, device="cpu", model_card_data=told).save_pretrained(str(tmp_path))
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


def test_emissions_that_codecarbon_measured(poly_encoder, tmp_path):
    class Tracker:
        _start_time = 1.0

        def _prepare_emissions_data(self):
            names = {"emissions": 0.0123, "energy_consumed": 0.5, "on_cloud": "N", "cpu_model": "x", "gpu_model": None}
            return type("Data", (), {**names, "ram_total_size": 8.0})

    poly_encoder.model_card_data.code_carbon_callback = type("Callback", (), {"tracker": Tracker()})
    poly_encoder.model_card_data.add_tags("generated_from_trainer")
    poly_encoder.save_pretrained(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["co2_eq_emissions"]["emissions"] == pytest.approx(12.3)
    assert "12.3 g of CO2" in card.text


# --- widget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_widget_examples_are_of_the_evaluation(saved, kind):
    first, *rest = ModelCard.load(saved(kind) / "README.md").data["widget"]
    # One text, each candidate once, and in an order that does not tell the right one.
    assert first == {"source_sentence": "a fish?\nno, a bird", "sentences": ["it barks", "it flies", "it swims"]}
    assert [example["source_sentence"] for example in rest] == ["what barks", "what meows"]


def test_a_cross_encoder_has_no_widget(saved):
    assert "widget" not in ModelCard.load(saved("cross") / "README.md").data


def test_the_user_wants_no_examples(roomy_checkpoint, tmp_path):
    data = BiEncoderModelCardData(generate_widget_examples=False)
    model = BiEncoder(roomy_checkpoint, device="cpu", model_card_data=data)
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
    examples = widget_examples([long, alone, {"context": "short", "candidates": ["yes", "no"], "label": 1}], str)
    assert [example["source_sentence"][-9:] for example in examples] == ["short", "s the end"]
    clipped = examples[1]
    assert len(clipped["source_sentence"]) <= MAX_CONTEXT + 4
    assert max(map(len, clipped["sentences"])) <= MAX_CANDIDATE + 4
    assert any(text.startswith("right right") for text in clipped["sentences"])


def test_the_right_candidate_is_among_the_few():
    many = {"context": "which", "candidates": [f"wrong {i}" for i in range(40)] + ["right"], "label": 40}
    (example,) = widget_examples([many], str, shared=["shared"])
    assert "right" in example["sentences"]
    assert len(example["sentences"]) == 5


# --- snippets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_runs_and_prints_what_it_shows(saved, kind):
    for block in python_blocks(text_of(saved(kind))):
        assert "path/to/this/model" in block
        assert_prints_what_it_shows(block, run_block(block.replace("path/to/this/model", str(saved(kind)))))


def test_blocks_of_a_card_run_without_the_package(saved, tmp_path):
    """And the Hub's own snippet for a transformers model, which is all that many will see."""
    card = text_of(saved("poly")).replace("path/to/this/model", str(saved("poly")))
    first, *rest = python_blocks(card)
    assert "poly_encoders" in first
    assert len(rest) == 2
    assert not any("poly_encoders" in block for block in rest)
    of_the_hub = f"""
from transformers import AutoTokenizer, AutoModel

tokenizer = AutoTokenizer.from_pretrained("{saved("poly")}", trust_remote_code=True)
model = AutoModel.from_pretrained("{saved("poly")}", trust_remote_code=True, device_map="auto")
print(type(model).__name__)
"""
    code = "\nprint('=====')\n".join([*rest, of_the_hub])
    *outputs, name = run_without_package(code, cache=tmp_path).split("=====\n")
    for block, output in zip(rest, outputs, strict=True):
        assert_prints_what_it_shows(block, output)
    assert name.strip() == "PolyEncoderModel"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("poly", {"context_vectors": "last_m", "num_codes": 3, "max_turns": 1, "turn_separator": ' | "x" '}),
        ("poly", {"share_encoders": True, "max_context_length": 30, "max_candidate_length": 20}),
        ("poly", {"prompts": {"query": "ask: ", "document": "say: "}}),
        ("bi", {"reduction": "first_m_mean", "m": 3, "max_turns": 1}),
        ("bi", {"share_encoders": True, "max_context_length": 30, "turn_separator": "\\"}),
        ("cross", {"max_turns": 1, "turn_separator": " </s> "}),
    ],
)
def test_blocks_of_other_settings_run(roomy_checkpoint, tmp_path, kind, options):
    KINDS[kind](roomy_checkpoint, device="cpu", **options).save_pretrained(str(tmp_path / "model"))
    card = text_of(tmp_path / "model")
    for block in python_blocks(card):
        assert_prints_what_it_shows(block, run_block(block.replace("path/to/this/model", str(tmp_path / "model"))))
    details = card.split("## Usage")[0]
    shown = {"num_codes": "| Context vectors (m) | {} |", "m": ", m = {} |", "max_context_length": "the last {} |"}
    shown |= {"max_turns": "| Turns kept | the last {} |", "context_vectors": "of the kind `{}` |"}
    for name in options.keys() & shown.keys():
        wanted = shown[name].format(options[name])
        assert wanted.removesuffix(" |") in details if name == "num_codes" else wanted in details
    # One tokenizer for both sides of a Bi-encoder cuts both on the left; the card says so in both of its places.
    end = "last" if kind == "bi" and options.get("share_encoders") else "first"
    assert f"| Tokens kept of a candidate | the {end} " in details
    assert f"of a candidate the {end} " in card


@pytest.mark.parametrize("case", ["poly_codes8", "bi_mean", "cross_first"])
def test_blocks_of_a_converted_model_run(tmp_path, case):
    convert_parlai_checkpoint(FIXTURES / case / "model", tmp_path / "model")
    card = text_of(tmp_path / "model")
    assert check_card(card) == ([], [])
    assert "converted from a checkpoint of [ParlAI]" in card
    assert "Not trained yet" not in card
    ours, *others = python_blocks(card)
    assert_prints_what_it_shows(ours, run_block(ours.replace("path/to/this/model", str(tmp_path / "model"))))
    for block in others:  # pairs that are too long are cut by another rule there
        assert run_block(block.replace("path/to/this/model", str(tmp_path / "model")))


def test_a_new_poly_encoder_says_so_until_it_is_trained(poly_encoder, saved_poly_encoder, tmp_path):
    assert "## Not trained yet" in text_of(saved_poly_encoder)
    again = PolyEncoder(str(saved_poly_encoder), device="cpu")
    again.save_pretrained(str(tmp_path / "again"))
    assert "## Not trained yet" in text_of(tmp_path / "again")
    again.model_card_data.add_tags("generated_from_trainer")  # upstream's mark of a run
    again.save_pretrained(str(tmp_path / "trained"))
    assert "## Not trained yet" not in text_of(tmp_path / "trained")


def test_the_id_of_a_pushed_model_is_in_its_snippets(saved, tmp_path):
    model = PolyEncoder(str(saved("poly")), device="cpu")
    model.model_card_data.set_model_id("acme/poly")
    model.save_pretrained(str(tmp_path / "pushed"))
    assert all('"acme/poly"' in block for block in python_blocks(text_of(tmp_path / "pushed")))
    # A download of it that is saved again is still that model; trained, it is another.
    copy = PolyEncoder(str(tmp_path / "pushed"), device="cpu")
    copy.save_pretrained(str(tmp_path / "copy"))
    assert text_of(tmp_path / "copy") == text_of(tmp_path / "pushed")
    copy.model_card_data.add_tags("generated_from_trainer")
    copy.save_pretrained(str(tmp_path / "trained"))
    assert "acme/poly" not in text_of(tmp_path / "trained")


def test_a_loaded_model_is_not_based_on_itself(saved, tmp_path):
    """Upstream says of a model that was loaded from the Hub that it is its own base model."""
    model = PolyEncoder(str(saved("poly")), device="cpu")
    model.model_card_data.base_model = "acme/this-very-model"
    model.save_pretrained(str(tmp_path / "again"))
    assert text_of(tmp_path / "again") == text_of(saved("poly"))
    model.model_card_data.add_tags("generated_from_trainer")
    model.save_pretrained(str(tmp_path / "trained"))
    card = ModelCard.load(tmp_path / "trained" / "README.md")
    assert card.data.base_model == "acme/this-very-model"
    assert "# Poly-encoder based on acme/this-very-model" in card.text


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_has_the_same_card(saved, kind, tmp_path):
    model = KINDS[kind](str(saved(kind)), device="cpu")
    model.save_pretrained(str(tmp_path))
    assert text_of(tmp_path) == text_of(saved(kind))
    model.save_pretrained(str(tmp_path))
    assert text_of(tmp_path) == text_of(saved(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_that_fails_loses_no_model(saved, kind, tmp_path, monkeypatch, caplog):
    shutil.copytree(saved(kind), tmp_path / "model")
    model = KINDS[kind](str(tmp_path / "model"), device="cpu")
    monkeypatch.setattr(type(model.model_card_data), "lengths", lambda self: 1 / 0)
    with caplog.at_level(logging.ERROR, logger="poly_encoders"):
        model.save_pretrained(str(tmp_path / "model"))
        model.save_pretrained(str(tmp_path / "other"))
    assert "card could not be made" in caplog.text
    assert text_of(tmp_path / "model") == text_of(saved(kind)), "the card that was there stays"
    assert not (tmp_path / "other" / "README.md").exists()
    assert KINDS[kind](str(tmp_path / "other"), device="cpu").rank("a", ["b"])


def test_an_example_that_cannot_be_ranked_costs_its_output_only(saved, tmp_path, monkeypatch):
    model = PolyEncoder(str(saved("poly")), device="cpu")
    monkeypatch.setattr(PolyEncoder, "rank", lambda *args, **options: 1 / 0)
    model.save_pretrained(str(tmp_path))
    assert "model.rank(context, candidates" in text_of(tmp_path)


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


def test_options_that_are_paths_stay_here(poly_encoder, tmp_path):
    data = poly_encoder.model_card_data
    data.add_tags("generated_from_trainer")
    changed = {"max_steps": 3, "resume_from_checkpoint": "runs/x", "my_path": str(tmp_path), "hub_token": "hf_secret"}
    changed["other_path"] = "C:\\Users\\me"
    data.all_hyperparameters = data.non_default_hyperparameters = changed
    poly_encoder.save_pretrained(str(tmp_path / "model"))
    card = text_of(tmp_path / "model")
    assert "| `max_steps` | 3 |" in card
    for secret in (str(tmp_path), "runs/x", "hf_secret", "Users"):
        assert secret not in card
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "poly-encoder"
