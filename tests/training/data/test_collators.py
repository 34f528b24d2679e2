"""Pairs for the Cross-encoder: whose candidates they are, and that nothing but seed, epoch and row decides it."""

import pytest

from poly_encoders import CrossEncoder
from poly_encoders.training.data.collators import PairCollator, draw_candidates

POOL = ["a", "b", "c", "d", "a"]


@pytest.fixture
def model(checkpoints):
    return CrossEncoder(checkpoints(), device="cpu")


def collator(model, seen=None, **options):
    def preprocess(pairs, **more):
        if seen is not None:
            seen.extend(pairs)
        return model.preprocess(pairs, **more)

    return PairCollator(preprocess, **{"pool": POOL, "num_negatives": 3, **options})


def test_own_candidates_come_first_and_all_of_them(model):
    rows = [{"context": "x", "positive": "a", "n1": "p", "n2": "a", "n3": "q", "n4": "r"}]
    seen = []
    batch = collator(model, seen)(rows)
    assert [text for _, text in seen] == ["a", "p", "a", "q", "r"]  # more than num_negatives: all, and none drawn
    assert batch["features"]["candidate_mask"].tolist() == [[True, True, False, True, True]]
    assert len(batch["features"]["input_ids"]) == 5


def test_scores_go_with_their_rows(model):
    rows = [{"context": "x", "positive": "a", "negative": "b", "scores": [1.0, 2.0]}] * 2
    batch = collator(model)(rows)
    assert batch["label"].tolist() == [[1.0, 2.0]] * 2
    assert batch["features"]["candidate_mask"].shape == (2, 4)


def test_what_is_drawn_depends_on_seed_epoch_and_row_alone():
    draws = {
        (seed, epoch, context): draw_candidates(POOL, context, "a", 20, seed, epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
        for context in ("x", "y")
    }
    assert len({tuple(texts) for texts in draws.values()}) == len(draws)
    for (seed, epoch, context), texts in draws.items():
        assert texts == draw_candidates(POOL, context, "a", 20, seed, epoch)
        assert set(texts) == {"b", "c", "d"}


def test_the_order_of_the_rows_changes_no_draw(model):
    rows = [{"context": context, "positive": positive} for context, positive in zip("xyz", "abc", strict=True)]
    one, other = [], []
    collator(model, one)(rows)
    collator(model, other)(rows[::-1])
    assert sorted(one) == sorted(other)
    changed = []
    later = collator(model, changed)
    later.epoch = 1
    later(rows)
    assert sorted(changed) != sorted(one)


def test_pools_with_nothing_to_draw():
    assert draw_candidates(["a", "a"], "x", "a", 2, 0) == ["a", "a"]  # masked out of the loss later
    assert draw_candidates([], "x", "a", 0, 0) == []
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_candidates([], "x", "a", 1, 0)
