"""What training tells a card: data, losses, figures, the curve; and that none of it is lost later."""

import json
import re

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModel

import tiny
from card_snippets import assert_prints_what_it_shows, python_blocks, run_block
from hub_metadata import check_card
from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder
from poly_encoders.cards.results import MAX_ROWS, training_table
from poly_encoders.training.arguments import DataArguments, ModelArguments, PolyEncoderTrainingArguments
from poly_encoders.training.cards import describe_run, ranking_samples
from poly_encoders.training.train import main
from poly_encoders.training.trainers import PolyEncoderTrainer

KINDS = {"poly-encoder": PolyEncoder, "bi-encoder": BiEncoder, "cross-encoder": CrossEncoder}
ROWS = [{"context": f"what is {i}", "right": f"it is {i}"} for i in range(24)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder with room for the snippets' texts."""
    folder = tmp_path_factory.mktemp("encoder")
    config = tiny.family_config("bert")
    config.max_position_embeddings = 256
    torch.manual_seed(3)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(encoder, tmp_path):
    """A function that trains from the command line and gives the output folder."""
    data, validation = tmp_path / "animals.jsonl", tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    validation.write_text("".join(json.dumps({"context": f"q {i}", "right": f"a {i}"}) + "\n" for i in range(8)))
    options = {
        "model_name_or_path": encoder,
        "dataset": data,
        "eval_dataset": validation,
        "eval_set_size": 4,
        "output_dir": tmp_path / "out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
    }

    def train(architecture="poly-encoder", **changes):
        merged = {**options, **changes, "architecture": architecture}
        if architecture == "cross-encoder":
            merged["num_negatives"] = 2
        main([part for name, value in merged.items() for part in (f"--{name}", str(value))])
        return merged["output_dir"]

    return train


def text_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def table_of(text, heading):
    """The table whose first row has `heading`, as rows of cells."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and heading in line)
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


@pytest.mark.parametrize("architecture", KINDS)
def test_a_run(run, encoder, tmp_path, architecture):
    out = run(architecture, card_license="mit", card_language="en")
    text, card = text_of(out), ModelCard.load(out / "README.md")
    assert check_card(text) == ([], [])
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert "dataset_size:24" in card.data.tags
    for private in (str(tmp_path), encoder, "{{", "None"):
        assert private not in text

    evaluations = json.loads((out / "evaluation.json").read_text())
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures.keys() == {"R@1/4", "R@2/4", "MRR"}
    assert figures["MRR"] == pytest.approx(evaluations[-1]["eval_validation_mrr"], abs=1e-4)
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {
        ("held-out.jsonl", "validation")
    }

    heading, *steps = table_of(text, "Training loss")
    assert heading[:4] == ["Epoch", "Step", "Training loss", "Validation loss"]
    assert [row[1] for row in steps] == ["1", "2", "3", "4"]
    mrr = heading.index("validation MRR")
    ranked = [f"{entry['eval_validation_mrr']:.4f}" for entry in evaluations]
    assert [row[mrr] for row in steps] == ["", ranked[0], "", ranked[1]]
    assert all(row[2] for row in steps)
    loss = "SampledNegativesLoss" if architecture == "cross-encoder" else "InBatchNegativesLoss"
    assert table_of(text, "Used for")[1:] == [
        ["animals.jsonl, train", "training", "24", f"`{loss}`"],
        ["held-out.jsonl, validation", "validation", "8", f"`{loss}`"],
    ]
    options = dict(table_of(text, "Option")[1:])
    assert (options["`per_device_train_batch_size`"], options["`learning_rate`"]) == ("4", "5e-05")
    assert "output_dir" not in text
    assert re.search(r"Training took [\d.]+ (seconds|minutes)\.", text)

    assert "(evaluation.png)" in text
    for folder in (out, out / "checkpoint-2"):
        assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    if architecture == "cross-encoder":
        assert "widget" not in card.data
    else:
        sources = {example["source_sentence"] for example in card.data["widget"]}
        assert sources
        assert all(source.startswith("q ") for source in sources), "examples are not of the training data"
    for block in python_blocks(text):
        assert_prints_what_it_shows(block, run_block(block.replace("path/to/this/model", str(out))))

    KINDS[architecture](str(out), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert text_of(tmp_path / "again") == text, "what training told is lost on saving again"
    assert (tmp_path / "again" / "evaluation.png").is_file()


def test_a_second_run_in_the_same_folder_keeps_what_a_user_wrote(run):
    out = run()
    text = text_of(out)
    (out / "README.md").write_text(text.replace("## Training", "## My notes\n\nMine.\n\n## Training"))
    run(max_steps=2)
    again = text_of(out)
    assert "## My notes\n\nMine.\n\n## Training" in again
    assert [row[1] for row in table_of(again, "Training loss")[1:]] == ["1", "2"]


def test_a_run_that_goes_on_shows_all_of_its_steps(run, tmp_path):
    run(max_steps=2)
    out = run(max_steps=4, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2")
    text = text_of(out)
    assert [row[1] for row in table_of(text, "Training loss")[1:]] == ["1", "2", "3", "4"]
    assert str(tmp_path) not in text


def test_no_examples_where_the_user_wants_none(run):
    text = text_of(run(card_examples=False))
    assert "widget:" not in text
    assert "source_sentence" not in text
    assert not re.search(r"\bq \d\b", text)


def make_trainer(encoder, tmp_path, **options):
    args = PolyEncoderTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    model = PolyEncoder(encoder, num_codes=4, device="cpu")
    return PolyEncoderTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), **options)


def test_examples_of_validation_data_where_nothing_is_ranked(encoder, tmp_path):
    data = Dataset.from_list([{"context": f"q {i}", "right": f"a {i}"} for i in range(6)])
    trainer = make_trainer(encoder, tmp_path, eval_dataset=data)
    example, *_ = trainer.model.model_card_data.widget
    assert example == {"source_sentence": "q 0", "sentences": ["a 0", "a 1", "a 2", "a 3", "a 4"]}
    assert make_trainer(encoder, tmp_path).model.model_card_data.widget == [], "training data are nobody's examples"
    assert ranking_samples(data.to_iterable_dataset()) == []


def test_examples_come_from_the_evaluator_before_the_validation_data(encoder, tmp_path):
    ranked = CandidateRankingEvaluator([{"context": "c", "candidates": ["x", "y"]}], show_progress_bar=False)
    for evaluator in (ranked, [ranked]):
        trainer = make_trainer(encoder, tmp_path, eval_dataset=Dataset.from_list(ROWS), evaluator=evaluator)
        assert trainer.model.model_card_data.widget == [{"source_sentence": "c", "sentences": ["x", "y"]}]


def test_what_a_run_is_made_of(encoder, tmp_path):
    card = PolyEncoder(encoder, num_codes=4, device="cpu").model_card_data
    describe_run(card, ModelArguments(model_name_or_path="minilm"), DataArguments())
    assert card.train_datasets == [{"name": "chitchat", "split": "train"}]
    assert card.eval_datasets == [{"name": "chitchat", "split": "validation"}]
    assert (card.language, card.base_model) == (["en"], "sentence-transformers/all-MiniLM-L6-v2")
    file = tmp_path / "mine.jsonl"
    file.write_text("")
    describe_run(card, ModelArguments(), DataArguments(dataset=str(file), eval_dataset="org/data"))
    assert card.train_datasets == [{"name": "mine.jsonl", "split": "train"}]
    assert card.eval_datasets == [{"name": "org/data", "split": "validation", "id": "org/data"}]


def test_long_tables_keep_evaluations_and_the_end():
    history = [{"step": step, "epoch": step / 1000, "loss": 1.0} for step in range(1, 1001)]
    history += [{"step": step, "epoch": step / 1000, "eval_mrr": 0.5, "eval_runtime": 3.0} for step in (250, 500, 750)]
    heading, *rows = training_table(history, best_step=500)
    assert heading == ["Epoch", "Step", "Training loss", "MRR"]
    assert len(rows) == MAX_ROWS
    assert rows[-1][1] == "1,000"
    assert [row[1] for row in rows if row[3]] == ["250", "**500**", "750"]
    assert training_table([]) == []
    assert training_table([{"step": 1, "epoch": 0.1, "train_runtime": 2.0}]) == []
