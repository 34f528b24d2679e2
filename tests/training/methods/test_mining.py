"""Hard negatives, against an obvious loop over all scores, and the script as a user starts it."""

import json
import random
from copy import deepcopy

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

import forks
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder, poly_score
from poly_encoders.training.data.sources import DataSource
from poly_encoders.training.methods import mining
from poly_encoders.training.methods.negative_rules import MiningOptions, is_near_duplicate, select_negatives
from poly_encoders.training.methods.teaching import add_teacher_scores
from poly_encoders.training.mine_negatives import main

WORDS = ["red", "blue", "green", "tall", "small", "cat", "dog", "tree"]
DRAW = random.Random(0)
ANSWERS = [" ".join(DRAW.sample(WORDS, 3)) for _ in range(40)]
ROWS = [{"context": [f"say {i % 30}", "and?"], "reply": answer} for i, answer in enumerate(ANSWERS)]
DATA = Dataset.from_list(ROWS)
ANY = -float("inf")  # the margin that leaves no candidate out


def mine_negatives(model, data, options, **more):
    return mining.mine_negatives(model, data, options, show_progress_bar=False, **more)


@pytest.fixture(scope="module")
def bi_encoder(checkpoints):
    torch.manual_seed(0)
    return BiEncoder(checkpoints(), device="cpu")


def slow_selection(ranking, own, positive, options):
    """All candidates in order with their scores, thrown out one reason after the other."""
    foreign = [(text, score) for text, score in ranking if text not in own]
    distinct = [
        (text, score)
        for text, score in foreign
        if not any(is_near_duplicate(text, positive_text, options.max_positive_similarity) for positive_text in own)
    ]
    return [
        text
        for text, score in distinct[options.skip_top :]
        if score <= positive - options.margin
        and (options.relative_margin is None or score <= positive - options.relative_margin * abs(positive))
    ]


def slow_rankings(model, contexts, pool):
    vectors = model.encode_document(pool, convert_to_tensor=True).double()
    queries = model.encode_query(contexts, convert_to_tensor=True).double()
    queries = queries if queries.dim() == 3 else queries[:, None]
    scores = poly_score(queries, vectors, getattr(model, "final_scale", 1.0)).float().tolist()
    return [sorted(zip(pool, row, strict=True), key=lambda pair: -pair[1]) for row in scores]


@pytest.mark.parametrize(
    "options",
    [
        MiningOptions(num_negatives=3, margin=ANY),
        MiningOptions(num_negatives=2, depth=1, skip_top=2),
        MiningOptions(num_negatives=1, depth=3, relative_margin=0.05, max_positive_similarity=0.5),
        MiningOptions(num_negatives=4, depth=7, margin=0.01, skip_top=1),
    ],
)
@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_against_a_loop_over_all_scores(kind, options, poly_encoder, bi_encoder):
    model = poly_encoder if kind == "poly" else bi_encoder
    result, report = mine_negatives(model, DATA, options)
    pool = list(dict.fromkeys(ANSWERS))
    unsure = filled = 0
    for row, ranking, mined in zip(ROWS, slow_rankings(model, DATA["context"][:], pool), result, strict=True):
        own = {other["reply"] for other in ROWS if other["context"] == row["context"]}
        score = dict(ranking)
        expected = slow_selection(ranking, own, score[row["reply"]], options)[: options.num_negatives]
        negatives = [mined[f"negative_{place + 1}"] for place in range(options.num_negatives)]
        # Batches of other sizes round differently, so neighbours within that rounding may change places.
        for one, two in zip(negatives, expected, strict=False):
            assert score[one] == pytest.approx(score[two], abs=1e-5)
        assert len(set(negatives)) == options.num_negatives
        assert not own & set(negatives)
        assert (mined["context"], mined["reply"]) == (row["context"], row["reply"])
        missing = options.num_negatives - len(expected)
        highest = options.highest_score(score[row["reply"]])
        close = any(abs(value - highest) < 1e-5 for text, value in ranking if text not in own)
        filled, unsure = filled + missing, unsure + (close and missing > 0)
    assert unsure == 0  # then rounding decides nothing, and the count is exact
    assert report.filled == filled
    assert (report.rows, report.dropped_rows) == (len(ROWS), 0)


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


@given(
    ranking=st.dictionaries(texts, st.integers(-3, 3), min_size=1, max_size=12),
    own=st.sets(texts, min_size=1, max_size=2),
    positive=st.integers(-3, 3),
    margin=st.sampled_from([ANY, 0.0, 1.0, 2.5]),
    relative=st.sampled_from([None, 0.0, 0.5]),
    skip=st.integers(0, 3),
    number=st.integers(1, 4),
    similarity=st.sampled_from([0.3, 0.9, 1.0]),
)
def test_selection_against_the_loop(ranking, own, positive, margin, relative, skip, number, similarity):
    """Scores are whole numbers, so that many are tied, with each other and with the margin."""
    options = MiningOptions(number, 100, skip, margin, relative, max_positive_similarity=similarity, too_few="drop")
    ordered = sorted(ranking.items(), key=lambda pair: -pair[1])
    expected = slow_selection(ordered, own, positive, options)
    selection = select_negatives(ordered, own, positive, options, 0, complete=True)
    found = [ordered[position][0] for position in selection.chosen]
    assert found == (expected[:number] if len(expected) >= number else [])
    looked_at = select_negatives(ordered, own, positive, options, 0, complete=False)
    assert (looked_at is None) == (len(expected) < number)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Yes, I do!", "yes i do", True),
        ("yes i do", "i do yes", True),
        ("yes i do", "yes you do", False),
        (":-)", ":-(", False),
        (":-)", " :-) ", True),
        ("a b c d e f g h i j", "a b c d e f g h i", True),
    ],
)
def test_near_duplicates(first, second, expected):
    assert is_near_duplicate(first, second, 0.9) is expected
    assert is_near_duplicate(second, first, 0.9) is expected


def test_margins_of_negative_scores():
    """The product alone would let in candidates above the right one."""
    assert MiningOptions(relative_margin=0.1).highest_score(-10.0) == -11.0
    assert MiningOptions(relative_margin=0.1).highest_score(10.0) == 9.0
    assert MiningOptions(margin=ANY).highest_score(10.0) == float("inf")
    assert MiningOptions(margin=2.0, relative_margin=0.1).highest_score(10.0) == 8.0


def test_random_sampling_is_seeded_and_among_the_first(poly_encoder):
    def mined(**options):
        found, _ = mine_negatives(poly_encoder, DATA, MiningOptions(2, margin=ANY, **options))
        return [(row["negative_1"], row["negative_2"]) for row in found]

    chosen = mined(sampling="random", depth=12)
    assert chosen == mined(sampling="random", depth=12)
    assert chosen != mined(sampling="random", depth=12, seed=1)
    best, _ = mine_negatives(poly_encoder, DATA, MiningOptions(12, margin=ANY))
    for pair, row in zip(chosen, best, strict=True):
        assert set(pair) <= {row[f"negative_{place}"] for place in range(1, 13)}


def test_rows_without_hard_negatives(poly_encoder):
    """No candidate keeps such a margin: rows are filled, or dropped."""
    filled, report = mine_negatives(poly_encoder, DATA, MiningOptions(2, margin=1e6))
    assert report.filled == 2 * len(filled) == 2 * len(ROWS)
    again, _ = mine_negatives(poly_encoder, DATA, MiningOptions(2, margin=1e6))
    assert filled[:] == again[:]
    with pytest.raises(ValueError, match="Every row was dropped"):
        mine_negatives(poly_encoder, DATA, MiningOptions(2, margin=1e6, too_few="drop"))
    some, report = mine_negatives(poly_encoder, DATA, MiningOptions(2, too_few="drop"))
    assert report.rows == len(some) < len(ROWS)
    assert report.rows + report.dropped_rows == len(ROWS)
    assert report.filled == 0


def test_one_row_and_its_own_negative(bi_encoder):
    data = Dataset.from_dict({"question": ["a"], "reply": ["b"], "wrong": ["c"]})
    result, _ = mine_negatives(bi_encoder, data, MiningOptions(1, margin=ANY))
    assert result[:] == {"question": ["a"], "reply": ["b"], "negative_1": ["c"]}


def test_what_cannot_be_mined(poly_encoder, bi_encoder, checkpoints):
    with pytest.raises(ValueError, match=r"different candidates.*Lower num_negatives"):
        mine_negatives(poly_encoder, DATA, MiningOptions(len(set(ANSWERS))))
    near = Dataset.from_dict({"context": ["a", "b"], "reply": ["yes!", "Yes."]})
    with pytest.raises(ValueError, match="Row 0 has only 0 candidates"):
        mine_negatives(poly_encoder, near, MiningOptions(1))
    with pytest.raises(TypeError, match="Give one Dataset, not a DatasetDict"):
        mine_negatives(poly_encoder, DatasetDict(train=DATA), MiningOptions(1))
    with pytest.raises(TypeError, match="CrossEncoder cannot mine"):
        mine_negatives(CrossEncoder(checkpoints(), device="cpu"), DATA, MiningOptions(1))
    manhattan = deepcopy(bi_encoder)
    manhattan.similarity_fn_name = "manhattan"
    with pytest.raises(ValueError, match="'manhattan'"):
        mine_negatives(manhattan, DATA, MiningOptions(1))


def test_cosine_is_scored_as_the_model_does(bi_encoder):
    model = deepcopy(bi_encoder)
    model.similarity_fn_name = "cosine"
    result, report = mine_negatives(model, DATA, MiningOptions(1, margin=ANY))
    contexts = model.encode_query(result["context"], convert_to_tensor=True)
    best = model.encode_document(result["negative_1"], convert_to_tensor=True)
    mean = model.similarity_pairwise(contexts, best).mean().item()
    assert report.negative_score == pytest.approx(mean, abs=1e-4)
    assert report.negative_score <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_negatives": 0},
        {"depth": 0},
        {"skip_top": -1},
        {"margin": float("nan")},
        {"relative_margin": -0.1},
        {"max_positive_similarity": 0.0},
        {"sampling": "best"},
    ],
)
def test_senseless_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MiningOptions(**options)


@pytest.fixture
def arguments(saved_poly_encoder, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["--model", str(saved_poly_encoder), "--dataset", str(file), "--num_negatives", "3", "--margin=-inf"]


def test_the_script(arguments, tmp_path, capsys):
    report = main([*arguments, "--output", str(tmp_path / "mined"), "--jsonl"])
    data = load_from_disk(str(tmp_path / "mined"))
    assert data.column_names == ["context", "reply", "negative_1", "negative_2", "negative_3"]
    assert len(data) == report.rows == len(ROWS)
    assert [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()] == list(data)
    assert DataSource(str(tmp_path / "mined")).examples()[:] == data[:]
    assert "hard negatives" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="Name another --output"):
        main([*arguments, "--output", str(tmp_path / "mined")])


TWO = """
import sys
from datasets import load_from_disk
from poly_encoders import PolyEncoder
from poly_encoders.training import mine_negatives
from poly_encoders.training.methods import mining, teaching

mining.TEXTS_AT_ONCE, mining.CONTEXTS_AT_ONCE, teaching.ROWS_AT_ONCE = 7, 4, 5
scores_to, model, data, *arguments = sys.argv[1:]
scored = teaching.add_teacher_scores(PolyEncoder(model, device="cpu"), load_from_disk(data), 2)
if mining.process_state().is_main_process:
    scored.save_to_disk(scores_to)
mine_negatives.main(arguments)
"""


def test_two_processes_find_the_same(arguments, saved_poly_encoder, tmp_path, monkeypatch):
    """Small blocks, so that each process has several; the last of the candidates' is a short one."""
    assert len(set(ANSWERS)) % 7
    monkeypatch.setattr(mining, "TEXTS_AT_ONCE", 7)
    monkeypatch.setattr(mining, "CONTEXTS_AT_ONCE", 4)
    main([*arguments, "--output", str(tmp_path / "mined-1")])
    DATA.save_to_disk(str(tmp_path / "data"))
    before = [tmp_path / "scored-2", saved_poly_encoder, tmp_path / "data"]
    forks.run(["-c", TWO, *before, *arguments, "--output", tmp_path / "mined-2"], ranks=2)
    one, two = (load_from_disk(str(tmp_path / f"mined-{number}")) for number in (1, 2))
    assert len(one) == len(ROWS)
    assert one[:] == two[:]
    one = add_teacher_scores(PolyEncoder(str(saved_poly_encoder), device="cpu"), DATA, 2, show_progress_bar=False)
    two = load_from_disk(str(tmp_path / "scored-2"))
    assert one.remove_columns("scores")[:] == two.remove_columns("scores")[:]
    torch.testing.assert_close(torch.tensor(one["scores"][:]), torch.tensor(two["scores"][:]), atol=1e-5, rtol=1e-5)
