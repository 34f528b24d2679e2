"""What a user writes into a card stays there, wherever the model is saved next."""

import shutil

import pytest
from huggingface_hub import ModelCard

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.cards.user_text import Card, with_user_text

NEW = """---
tags:
- poly-encoder
pipeline_tag: sentence-similarity
---

# Title

Intro.

## Usage

```python
## not a heading
print("hello")
```

## Training

Three steps.

## Citation

A paper.
"""


def written(new=NEW, **options):
    return with_user_text(new, None, trained=False, **options)


def saved_again(old, new=NEW, trained=False, said=()):
    return with_user_text(new, old, trained=trained, said=said)


# --- sections --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Intro.", "My intro."),
        ('print("hello")', 'print("mine")'),
        ("A paper.", "A paper.\n\nAnd a word after it."),
        ("## Citation", "## My section\n\nMy words.\n\n## Citation"),
        ("## Usage", "## How to use it"),
    ],
    ids=["introduction", "section", "end", "new section", "heading"],
)
def test_an_edited_section_stays(before, after, trained):
    edited = written().replace(before, after)
    assert after in edited
    again = saved_again(edited, trained=trained)
    assert after in again
    assert saved_again(again, trained=trained) == again


def test_the_rest_is_written_anew():
    edited = written().replace("A paper.", "My paper.")
    again = saved_again(edited, NEW.replace("Three steps.", "Nine steps."), trained=True)
    assert "Nine steps." in again
    assert "Three steps." not in again
    assert "My paper." in again


def test_text_after_the_record_stays():
    again = saved_again(written() + "\n## Notes\n\nWritten at the very end.\n", trained=True)
    assert "## Notes\n\nWritten at the very end." in again


def test_a_new_section_keeps_its_place():
    edited = written().replace("## Training", "## Data\n\nMine.\n\n## Training")
    sections = list(Card.parse(saved_again(edited)).sections)
    assert sections == ["", "Usage", "Data", "Training", "Citation"]


@pytest.mark.parametrize("trained", [False, True])
def test_a_removed_section_stays_away(trained):
    edited = written().replace("## Training\n\nThree steps.\n\n", "")
    again = saved_again(edited, trained=trained)
    assert "Three steps." not in again
    assert "Three steps." not in saved_again(again, trained=trained)


def test_what_only_the_old_card_knows_stays_until_the_model_is_trained():
    """A model that was loaded knows nothing of its training."""
    without = NEW.replace("## Training\n\nThree steps.\n\n", "")
    kept = saved_again(written(), without)
    assert list(Card.parse(kept).sections) == ["", "Usage", "Training", "Citation"]
    assert kept == written()
    assert "Three steps." not in saved_again(written(), without, trained=True)
    # And then the next training's section is no section that a user removed.
    assert "Three steps." in saved_again(saved_again(written(), without, trained=True), trained=True)


def test_headings_in_code_are_no_headings():
    assert list(Card.parse(NEW).sections) == ["", "Usage", "Training", "Citation"]
    nested = "## A\n\n````\n```\n## no\n````\n\n## B"
    assert list(Card.parse(nested).sections) == ["", "A", "B"]


def test_two_sections_of_one_name():
    edited = written().replace("## Citation", "## Notes\n\nOne.\n\n## Notes\n\nTwo.\n\n## Citation")
    again = saved_again(edited, trained=True)
    assert again.index("One.") < again.index("Two.")


def test_windows_line_ends_are_no_edit():
    edited = written().replace("A paper.", "My paper.").replace("\n", "\r\n")
    again = saved_again(edited, NEW.replace("Intro.", "New intro."))
    assert "New intro." in again
    assert "My paper." in again


@pytest.mark.parametrize("own", ["# All mine\n", "---\nlicense: mit\n---\n# All mine\n", "---\n- a\n- b\n---\n# x\n"])
def test_a_card_without_a_record_stays_whole(own):
    assert saved_again(own, trained=True) == own


@pytest.mark.parametrize("broken", ["---\nlicense: [mit\n---\n", "---\njust text\n---\n"])
def test_a_card_whose_metadata_are_broken_stays_whole(broken):
    own = broken + "\n<!-- poly-encoders wrote {} -->\n"
    assert saved_again(own) == own


def test_a_record_that_was_tampered_with_is_none():
    for record in ("{}", "{nonsense}", '{"metadata": [], "sections": 3}'):
        own = f"# x\n\n<!-- poly-encoders wrote {record} -->\n"
        assert saved_again(own) == own


# --- metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_edited_metadata_stay(trained):
    edited = written().replace("pipeline_tag: sentence-similarity", "pipeline_tag: feature-extraction\nlicense: mit")
    again = saved_again(edited, trained=trained)
    assert Card.parse(again).metadata == {
        "tags": ["poly-encoder"],
        "pipeline_tag": "feature-extraction",
        "license": "mit",
    }
    assert saved_again(again, trained=trained) == again


def test_removed_metadata_stay_away():
    edited = written().replace("pipeline_tag: sentence-similarity\n", "")
    assert "pipeline_tag" not in Card.parse(saved_again(saved_again(edited))).metadata


def test_tags_of_a_run_stay_until_the_next_one():
    first = written(NEW.replace("- poly-encoder", "- poly-encoder\n- loss:Old"))
    assert Card.parse(saved_again(first)).metadata["tags"] == ["poly-encoder", "loss:Old"]
    assert Card.parse(saved_again(first, trained=True)).metadata["tags"] == ["poly-encoder"]


def test_order_and_comments_of_the_metadata_stay():
    edited = written().replace("tags:\n", "# my comment\nlicense: mit\ntags:\n")
    assert "# my comment\nlicense: mit\ntags:\n" in saved_again(edited)


def test_what_the_program_says_comes_before_an_older_edit_and_after_a_newer_one():
    licensed = NEW.replace("tags:", "license: apache-2.0\ntags:")
    edited = written().replace("tags:", "license: mit\ntags:")
    again = saved_again(edited, licensed, said={"license"})
    assert Card.parse(again).metadata["license"] == "apache-2.0"
    edited = again.replace("apache-2.0", "bsd-3-clause")
    assert Card.parse(saved_again(edited, licensed, said={"license"})).metadata["license"] == "bsd-3-clause"


def test_what_lasts_is_kept_through_training():
    first = written(NEW.replace("tags:", "base_model: org/encoder\nwidget: [1]\ntags:"))
    metadata = Card.parse(saved_again(first, trained=True)).metadata
    assert metadata["base_model"] == "org/encoder"
    assert "widget" not in metadata


def test_a_record_cannot_end_its_comment():
    heading = "## a --> b"
    again = saved_again(written(NEW.replace("## Usage", heading)))
    assert again.count("-->") == 2  # the heading's own, and the comment's end
    assert heading in again


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[PolyEncoder, BiEncoder, CrossEncoder], ids=["poly", "bi", "cross"])
def edited(request, checkpoints, tmp_path):
    """A kind, and a folder that it was saved to, whose card was then edited."""
    folder = tmp_path / "model"
    request.param(checkpoints(), device="cpu").save_pretrained(str(folder))
    edit(folder)
    return request.param, folder


def edit(folder):
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    assert text.count("## Model details") == 1
    text = text.replace("tags:\n", "license: mit\nextra_gated_prompt: please\ntags:\n- mine\n", 1)
    card.write_text(
        text.replace("## Model details", "## From me\n\nMy own words, with {{ braces }}.\n\n## Model details")
    )


def assert_mine(folder):
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data["extra_gated_prompt"]) == ("mit", "please")
    assert {"mine", "poly-encoder"} <= set(card.data.tags)
    assert "## From me\n\nMy own words, with {{ braces }}.\n\n## Model details" in card.text


def test_a_loaded_card_is_saved_in_place_and_elsewhere(edited, tmp_path):
    kind, folder = edited
    model = kind(str(folder), device="cpu")
    model.save_pretrained(str(folder))
    assert_mine(folder)
    model.save_pretrained(str(tmp_path / "elsewhere"))
    assert_mine(tmp_path / "elsewhere")


def test_a_card_edited_after_loading_counts(checkpoints, tmp_path):
    model = PolyEncoder(checkpoints(), device="cpu")
    model.save_pretrained(str(tmp_path))
    edit(tmp_path)  # while the model is still in memory
    model.save_pretrained(str(tmp_path))
    assert_mine(tmp_path)


def test_it_stays_when_the_model_is_trained(edited, tmp_path):
    kind, folder = edited
    model = kind(str(folder), device="cpu")
    model.model_card_data.add_tags("generated_from_trainer")  # upstream's mark of a run
    model.save_pretrained(str(tmp_path / "trained"))
    assert_mine(tmp_path / "trained")
    assert "## Training" in (tmp_path / "trained" / "README.md").read_text()


def test_a_license_set_in_the_program_counts(edited, tmp_path):
    kind, folder = edited
    model = kind(str(folder), device="cpu")
    model.model_card_data.set_license("apache-2.0")
    model.save_pretrained(str(tmp_path / "again"))
    card = ModelCard.load(tmp_path / "again" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "My own words" in card.text


def test_a_settings_change_reaches_the_card_all_the_same(edited, tmp_path):
    kind, folder = edited
    model = kind(str(folder), device="cpu", max_turns=7)
    model.save_pretrained(str(tmp_path / "again"))
    assert_mine(tmp_path / "again")
    assert "| Turns kept | the last 7 |" in (tmp_path / "again" / "README.md").read_text()


def test_a_curve_goes_where_its_card_goes(checkpoints, tmp_path):
    model = PolyEncoder(checkpoints(), device="cpu")
    model.model_card_data.add_tags("generated_from_trainer")
    (tmp_path / "evaluation.png").write_bytes(b"a picture")
    model.model_card_data.curve = tmp_path / "evaluation.png"
    model.save_pretrained(str(tmp_path / "model"))
    assert "(evaluation.png)" in (tmp_path / "model" / "README.md").read_text()
    PolyEncoder(str(tmp_path / "model"), device="cpu").save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "evaluation.png").read_bytes() == b"a picture"
    # A card that shows none has none beside it.
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "evaluation.png").unlink()
    model.save_pretrained(str(tmp_path / "again"))
    assert "(evaluation.png)" not in (tmp_path / "again" / "README.md").read_text()
