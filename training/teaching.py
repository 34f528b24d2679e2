"""A teacher's scores beside the data: computed once, learnt from by any student in any number of epochs."""

import itertools
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from poly_encoders import CrossEncoder
from poly_encoders.training.collators import draw_candidates
from poly_encoders.training.data_sources import SCORES, text_columns
from poly_encoders.training.mining import process_state

ROWS_AT_ONCE = 256


def add_teacher_scores(
    teacher: Any,
    data: Dataset,
    num_negatives: int,
    seed: int = 0,
    batch_size: int = 64,
    show_progress_bar: bool = True,
) -> Dataset:
    """Score every row's candidates with a teacher; all processes call it together and all get the result.

    Args:
        teacher: A `CrossEncoder`; a `PolyEncoder` or a `BiEncoder` will do too.
        data: Contexts in the first column, right candidates in the second, wrong ones in further columns, if any.
        num_negatives: Wrong candidates of each row: its own first, all of them, the rest drawn from the right ones of
            other rows.
        seed: Of the draw.
        batch_size: Texts, or pairs, read at once.
        show_progress_bar: Show a bar, in the main process.

    Returns:
        The data with a column `negative_...` for each of those drawn and `scores`, `(1 + n)` floats a row in
        the order of the candidate columns: what a trainer with `distillation` takes.

    Raises:
        ValueError: no wrong candidate in a row, or `scores` there already.
    """
    if SCORES in data.column_names:
        raise ValueError(f"The data has a column {SCORES} already; remove it to score anew.")
    data = data.select_columns(text_columns(data))  # labels would be taken for the teacher's scores
    context_column, right_column, *own = data.column_names
    drawn = max(0, num_negatives - len(own))
    if drawn + len(own) < 1:
        raise ValueError("A teacher compares candidates, so each row needs a wrong one: raise num_negatives above 0.")
    pool = list(data[right_column])
    state = process_state()
    rows = range(state.process_index, len(data), state.num_processes)
    found: list[tuple[int, list[str], list[float]]] = []
    bar = tqdm(total=len(rows), desc="Teacher", unit="row", disable=not (show_progress_bar and state.is_main_process))
    with bar:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            numbers = rows[first : first + ROWS_AT_ONCE]
            few = [data[number] for number in numbers]
            contexts = [row[context_column] for row in few]
            new = [draw_candidates(pool, row[context_column], row[right_column], drawn, seed) for row in few]
            texts = [
                [row[right_column], *(row[name] for name in own), *more] for row, more in zip(few, new, strict=True)
            ]
            scores = score_rows(teacher, contexts, texts, batch_size)
            found += zip(numbers, new, scores.tolist(), strict=True)
            bar.update(len(few))
    found = sorted(gather_object(found))
    free = (name for name in map("negative_{}".format, itertools.count(1)) if name not in own)
    for place, name in zip(range(drawn), free, strict=False):
        data = data.add_column(name, [texts[place] for _, texts, _ in found])
    return data.add_column(SCORES, [scores for _, _, scores in found])


def score_rows(model: Any, contexts: list[Any], candidates: list[list[str]], batch_size: int = 64) -> torch.Tensor:
    """Scores of each context's own candidates by any of the three encoders: `(n, c)` float32 for n lists of c texts."""
    shape = (len(contexts), len(candidates[0]))
    pairs = [(context, text) for context, texts in zip(contexts, candidates, strict=True) for text in texts]
    options: dict[str, Any] = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    if isinstance(model, CrossEncoder):
        return model.predict(pairs, **options).float().view(shape).cpu()
    texts = list(dict.fromkeys(text for _, text in pairs))
    place = {text: position for position, text in enumerate(texts)}
    vectors = model.encode_document(texts, **options)[[place[text] for _, text in pairs]]
    encoded = model.encode_query(contexts, **options).repeat_interleave(shape[1], dim=0)
    return model.similarity_pairwise(encoded, vectors).float().view(shape).cpu()
