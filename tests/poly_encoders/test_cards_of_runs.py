"""What training tells a card: data, losses, figures, the curve; and that none of it is lost later."""

import json
import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard

from card_snippets import assert_prints_what_it_shows, python_blocks, run_block
from hub_metadata import check_card
from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder
from poly_encoders.cards.results import MAX_ROWS, training_table
from poly_encoders.training.runs.arguments import DataArguments, ModelArguments, PolyEncoderTrainingArguments
from poly_encoders.training.runs.run_cards import describe_run, ranking_samples
from poly_encoders.training.runs.trainers import PolyEncoderTrainer
from poly_encoders.training.train import main

KINDS = {"poly-encoder": PolyEncoder, "bi-encoder": BiEncoder, "cross-encoder": CrossEncoder}
ROWS = [{"context": f"what is {i}", "positive": f"it is {i}"} for i in range(24)]
QUESTIONS = [{"context": f"q {i}", "positive": f"a {i}"} for i in range(8)]


@pytest.fixture(scope="module")
def encoder(checkpoints):
    """A tiny encoder with room for the snippets' texts."""
    return checkpoints("bert", max_position_embeddings=256)


@pytest.fixture
def run(encoder, tmp_path):
    """A function that trains from the command line and gives the output folder."""
    data, validation = tmp_path / "animals.jsonl", tmp_path / "held-out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    validation.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
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
        main([part for name, value in merged.items() if value is not None for part in (f"--{name}", str(value))])
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
    assert check_card(text) == []
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    assert "dataset_size:24" in card.data.tags
    for private in (str(tmp_path), encoder, "output_dir", "{{", "None"):
        assert private not in text

    evaluations = json.loads((out / "evaluation.json").read_text())
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures.keys() == {"R@1/4", "R@2/4", "MRR"}
    assert figures["MRR"] == pytest.approx(evaluations[-1]["eval_validation_mrr"], abs=1e-4)
    of = {(result.dataset_name, result.dataset_split) for result in card.data.eval_results}
    assert of == {("held-out.jsonl", "validation")}

    heading, *steps = table_of(text, "Training loss")
    assert heading[:4] == ["Epoch", "Step", "Training loss", "Validation loss"]
    assert [row[1] for row in steps] == ["1", "2", "3", "4"]
    ranked = [f"{entry['eval_validation_mrr']:.4f}" for entry in evaluations]
    assert [row[heading.index("validation MRR")] for row in steps] == ["", ranked[0], "", ranked[1]]
    assert all(row[2] for row in steps)
    loss = "SampledNegativesLoss" if architecture == "cross-encoder" else "InBatchNegativesLoss"
    assert table_of(text, "Used for")[1:] == [
        ["animals.jsonl, train", "training", "24", f"`{loss}`"],
        ["held-out.jsonl, validation", "validation", "8", f"`{loss}`"],
    ]
    options = dict(table_of(text, "Option")[1:])
    assert (options["`per_device_train_batch_size`"], options["`learning_rate`"]) == ("4", "5e-05")
    assert re.search(r"Training took [\d.]+ (seconds|minutes)\.", text)

    assert "(evaluation.png)" in text
    for folder in (out, out / "checkpoint-2"):
        assert (folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    if architecture != "cross-encoder":
        sources = {example["source_sentence"] for example in card.data["widget"]}
        assert sources
        assert all(source.startswith("q ") for source in sources), "examples are not of the training data"
    for block in python_blocks(text):
        assert_prints_what_it_shows(block, run_block(block.replace("path/to/this/model", str(out))))

    KINDS[architecture](str(out), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert text_of(tmp_path / "again") == text, "what training told is lost on saving again"
    assert (tmp_path / "again" / "evaluation.png").is_file()


def test_a_run_that_goes_on_shows_all_of_its_steps_and_the_next_one_its_own(run, tmp_path):
    run(max_steps=2, card_examples=False)
    out = run(max_steps=4, resume_from_checkpoint=tmp_path / "out" / "checkpoint-2", card_examples=False)
    text = text_of(out)
    assert [row[1] for row in table_of(text, "Training loss")[1:]] == ["1", "2", "3", "4"]
    assert str(tmp_path) not in text
    assert "source_sentence" not in text  # the user wants none
    assert not re.search(r"\bq \d\b", text)
    run(max_steps=1, eval_strategy="no", eval_dataset=None)
    again = text_of(out)
    assert [row[1] for row in table_of(again, "Training loss")[1:]] == ["1"]
    assert "evaluation.png" not in again
    (out / "README.md").write_text(again + "\nMine.\n")
    run(max_steps=1, eval_strategy="no", eval_dataset=None)
    assert text_of(out) == again + "\nMine.\n"


def widget_of(encoder, tmp_path, **options):
    """The examples of a new trainer's card."""
    args = PolyEncoderTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    model = PolyEncoder(encoder, num_codes=4, device="cpu")
    trainer = PolyEncoderTrainer(model=model, args=args, train_dataset=Dataset.from_list(ROWS), **options)
    return trainer.model.model_card_data.widget


def test_where_examples_come_from(encoder, tmp_path):
    data = Dataset.from_list(QUESTIONS[:6])
    first = {"source_sentence": "q 0", "sentences": ["a 0", "a 1", "a 2", "a 3", "a 4"]}
    assert widget_of(encoder, tmp_path, eval_dataset=data)[0] == first
    assert widget_of(encoder, tmp_path) == [], "training data are nobody's examples"
    assert ranking_samples(data.to_iterable_dataset()) == []
    renamed = data.with_transform(lambda rows: {"question": rows["context"], "answer": rows["positive"]})
    assert ranking_samples(renamed) == ranking_samples(data)
    # The evaluator's before the validation data's.
    ranked = CandidateRankingEvaluator([{"context": "c", "candidates": ["x", "y"]}], show_progress_bar=False)
    for evaluator in (ranked, [ranked]):
        examples = widget_of(encoder, tmp_path, eval_dataset=Dataset.from_list(ROWS), evaluator=evaluator)
        assert examples == [{"source_sentence": "c", "sentences": ["x", "y"]}]


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


def test_long_tables_keep_evaluations_or_else_evenly_spaced_losses():
    history = [{"step": step, "epoch": step / 1000, "loss": 1.0} for step in range(1, 1001)]
    heading, *rows = training_table(history)
    assert heading == ["Epoch", "Step", "Training loss"]
    assert MAX_ROWS - 1 <= len(rows) <= MAX_ROWS
    assert [row[1] for row in rows[-2:]] == ["966", "1,000"]
    history += [{"step": step, "epoch": step / 1000, "eval_mrr": 0.5, "eval_runtime": 3.0} for step in (250, 500, 750)]
    heading, *rows = training_table(history, best_step=500)
    assert heading == ["Epoch", "Step", "Training loss", "MRR"]
    assert [(row[1], row[3]) for row in rows] == [("250", "0.5000"), ("**500**", "**0.5000**"), ("750", "0.5000")]
    assert training_table([]) == training_table([{"step": 1, "epoch": 0.1, "train_runtime": 2.0}]) == []
