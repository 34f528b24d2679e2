"""Hard negatives, against an obvious loop over all scores, and the script as a user starts it."""

import json
import random
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from poly_encoders import BiEncoder, CrossEncoder, poly_score
from poly_encoders.training import mining
from poly_encoders.training.data_sources import load_examples
from poly_encoders.training.mine_negatives import main
from poly_encoders.training.mining import mine_negatives
from poly_encoders.training.negative_rules import MiningOptions, is_near_duplicate, select_negatives

ROOT = Path(__file__).parent.parent.parent
WORDS = ["red", "blue", "green", "tall", "small", "cat", "dog", "tree"]
DRAW = random.Random(0)
ANSWERS = [" ".join(DRAW.sample(WORDS, 3)) for _ in range(40)]
ROWS = [{"context": [f"say {i % 30}", "and?"], "reply": answer} for i, answer in enumerate(ANSWERS)]
DATA = Dataset.from_list(ROWS)


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
        if not any(is_near_duplicate(text, right, options.max_positive_similarity) for right in own)
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
        MiningOptions(num_negatives=3, margin=-float("inf")),
        MiningOptions(num_negatives=2, depth=1, skip_top=2),
        MiningOptions(num_negatives=1, depth=3, relative_margin=0.05, max_positive_similarity=0.5),
        MiningOptions(num_negatives=4, depth=7, margin=0.01, skip_top=1),
    ],
)
@pytest.mark.parametrize("kind", ["poly", "bi"])
def test_against_a_loop_over_all_scores(kind, options, poly_encoder, bi_encoder):
    model = poly_encoder if kind == "poly" else bi_encoder
    result, report = mine_negatives(model, DATA, options, show_progress_bar=False)
    pool = list(dict.fromkeys(ANSWERS))
    filled = 0
    rankings = slow_rankings(model, DATA["context"][:], pool)
    for row, ranking, mined in zip(ROWS, rankings, result, strict=True):
        own = {other["reply"] for other in ROWS if other["context"] == row["context"]}
        expected = slow_selection(ranking, own, dict(ranking)[row["reply"]], options)[: options.num_negatives]
        negatives = [mined[f"negative_{place + 1}"] for place in range(options.num_negatives)]
        # Batches of other sizes round differently, so neighbours within that rounding may change places.
        score = dict(ranking)
        for one, two in zip(negatives, expected, strict=False):
            assert score[one] == pytest.approx(score[two], abs=1e-5)
        assert len(set(negatives)) == options.num_negatives
        assert not own & set(negatives)
        assert mined["context"] == row["context"]
        assert mined["reply"] == row["reply"]
        filled += options.num_negatives - len(expected)
    assert report.filled == pytest.approx(filled, abs=2)
    assert (report.rows, report.dropped_rows) == (len(ROWS), 0)


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(
    ranking=st.dictionaries(texts, st.integers(-3, 3), min_size=1, max_size=12),
    own=st.sets(texts, min_size=1, max_size=2),
    positive=st.integers(-3, 3),
    margin=st.sampled_from([-float("inf"), 0.0, 1.0, 2.5]),
    relative=st.sampled_from([None, 0.0, 0.5]),
    skip=st.integers(0, 3),
    number=st.integers(1, 4),
    similarity=st.sampled_from([0.3, 0.9, 1.0]),
)
def test_selection_against_the_loop(ranking, own, positive, margin, relative, skip, number, similarity):
    """Scores are whole numbers, so that many are tied, with each other and with the margin."""
    options = MiningOptions(
        number, skip_top=skip, margin=margin, relative_margin=relative, max_positive_similarity=similarity
    )
    ordered = sorted(ranking.items(), key=lambda pair: -pair[1])
    names, scores = zip(*ordered, strict=True)
    expected = slow_selection(ordered, own, positive, options)
    selection = select_negatives(names, scores, own, positive, options, "0", complete=True)
    assert [names[position] for position in selection.chosen] == expected[:number]
    looked_at = select_negatives(names, scores, own, positive, options, "0", complete=False)
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
    assert MiningOptions(margin=-float("inf")).highest_score(10.0) == float("inf")
    assert MiningOptions(margin=2.0, relative_margin=0.1).highest_score(10.0) == 8.0


def test_random_sampling_is_seeded_and_among_the_first(poly_encoder):
    def mined(**options):
        found, _ = mine_negatives(
            poly_encoder, DATA, MiningOptions(2, margin=-float("inf"), **options), show_progress_bar=False
        )
        return [(row["negative_1"], row["negative_2"]) for row in found]

    chosen = mined(sampling="random", depth=12)
    assert chosen == mined(sampling="random", depth=12)
    assert chosen != mined(sampling="random", depth=12, seed=1)
    best, _ = mine_negatives(poly_encoder, DATA, MiningOptions(12, margin=-float("inf")), show_progress_bar=False)
    for pair, row in zip(chosen, best, strict=True):
        assert set(pair) <= {row[f"negative_{place}"] for place in range(1, 13)}


def test_rows_without_hard_negatives(poly_encoder):
    """No candidate keeps such a margin: rows are filled, or dropped."""
    filled, report = mine_negatives(poly_encoder, DATA, MiningOptions(2, margin=1e6), show_progress_bar=False)
    assert report.filled == 2 * len(filled) == 2 * len(ROWS)
    again, _ = mine_negatives(poly_encoder, DATA, MiningOptions(2, margin=1e6), show_progress_bar=False)
    assert filled[:] == again[:]
    with pytest.raises(ValueError, match="Every row was dropped"):
        mine_negatives(poly_encoder, DATA, MiningOptions(2, margin=1e6, too_few="drop"), show_progress_bar=False)
    some, report = mine_negatives(poly_encoder, DATA, MiningOptions(2, too_few="drop"), show_progress_bar=False)
    assert report.rows == len(some) < len(ROWS)
    assert report.rows + report.dropped_rows == len(ROWS)
    assert report.filled == 0


def test_one_row_and_its_own_wrong_candidate(bi_encoder):
    data = Dataset.from_dict({"question": ["a"], "right": ["b"], "wrong": ["c"]})
    result, _ = mine_negatives(bi_encoder, data, MiningOptions(1, margin=-float("inf")), show_progress_bar=False)
    assert result[:] == {"question": ["a"], "right": ["b"], "negative_1": ["c"]}


def test_what_cannot_be_mined(poly_encoder, bi_encoder, checkpoints):
    with pytest.raises(ValueError, match=r"different candidates.*Lower num_negatives"):
        mine_negatives(poly_encoder, DATA, MiningOptions(len(set(ANSWERS))), show_progress_bar=False)
    near = Dataset.from_dict({"context": ["a", "b"], "reply": ["yes!", "Yes."]})
    with pytest.raises(ValueError, match="Row 0 has only 0 candidates"):
        mine_negatives(poly_encoder, near, MiningOptions(1), show_progress_bar=False)
    with pytest.raises(TypeError, match="CrossEncoder cannot mine"):
        mine_negatives(CrossEncoder(checkpoints(), device="cpu"), DATA, MiningOptions(1))
    manhattan = deepcopy(bi_encoder)
    manhattan.similarity_fn_name = "manhattan"
    with pytest.raises(ValueError, match="'manhattan'"):
        mine_negatives(manhattan, DATA, MiningOptions(1))


def test_cosine_is_scored_as_the_model_does(bi_encoder):
    model = deepcopy(bi_encoder)
    model.similarity_fn_name = "cosine"
    result, report = mine_negatives(model, DATA, MiningOptions(1, margin=-float("inf")), show_progress_bar=False)
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
    assert load_examples(str(tmp_path / "mined"))[:] == data[:]
    assert "hard negatives" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="Name another --output"):
        main([*arguments, "--output", str(tmp_path / "mined")])


def test_two_processes_find_the_same(arguments, tmp_path, monkeypatch):
    """Small blocks, so that each process has several."""
    monkeypatch.setattr(mining, "TEXTS_AT_ONCE", 7)
    monkeypatch.setattr(mining, "CONTEXTS_AT_ONCE", 4)
    main([*arguments, "--output", str(tmp_path / "by-one")])
    script = tmp_path / "small_blocks.py"
    script.write_text(
        "import sys\n"
        "from poly_encoders.training import mine_negatives, mining\n"
        "mining.TEXTS_AT_ONCE, mining.CONTEXTS_AT_ONCE = 7, 4\n"
        "mine_negatives.main(sys.argv[1:])\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        *arguments,
    ]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "by-two")], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_from_disk(str(tmp_path / name)) for name in ("by-one", "by-two"))
    assert len(one) == len(ROWS)
    assert one[:] == two[:]
