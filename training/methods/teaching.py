"""A teacher's scores beside the data: computed once, learnt from by any student in any number of epochs."""

import itertools
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm

from poly_encoders import CrossEncoder
from poly_encoders.training.data.checks import SCORES, checked_examples, settled
from poly_encoders.training.data.collators import draw_candidates
from poly_encoders.training.methods.losses import default_logit_scale
from poly_encoders.training.methods.mining import process_state

ROWS_AT_ONCE = 256


def add_teacher_scores(
    teacher: Any, data: Dataset, num_negatives: int, seed: int = 0, batch_size: int = 64, show_progress_bar: bool = True
) -> Dataset:
    """Score every row's candidates with a teacher, of any of the three classes; all processes call it together.

    Args:
        data: Contexts in the first column, positives in the second, negatives in further columns, if any.
        num_negatives: Negatives of each row: its own first, all of them, the rest drawn from other rows' positives.
        seed: Of the draw.
        batch_size: Texts, or pairs, read at once.
        show_progress_bar: Show a bar, in the main process.

    Returns:
        In every process: the data with a column `negative_...` for each of those drawn and `scores`, `(1 + n)` floats a
        row in the order of the candidate columns, which a trainer with `distillation` takes. They are logits: cosines
        come times 20, as the losses have them.

    Raises:
        ValueError: no negative in a row, `scores` there already, or data that cannot be read.
    """
    if SCORES in data.column_names:
        raise ValueError(f"The data has a column {SCORES} already; remove it to score anew.")
    data = settled(checked_examples(data, "The data set"))
    context_column, positive_column, *own = data.column_names
    drawn = max(0, num_negatives - len(own))
    if not drawn and not own:
        raise ValueError("A teacher compares candidates, so each row needs a negative: raise num_negatives above 0.")
    pool, state = list(data[positive_column]), process_state()
    rows = range(state.process_index, len(data), state.num_processes)
    found: list[tuple[int, list[str], list[float]]] = []
    scale = default_logit_scale(teacher)
    with tqdm(total=len(rows), desc="Teacher", disable=not (show_progress_bar and state.is_main_process)) as bar:
        for first in range(0, len(rows), ROWS_AT_ONCE):
            numbers = rows[first : first + ROWS_AT_ONCE]
            few = [data[number] for number in numbers]
            new = [draw_candidates(pool, row[context_column], row[positive_column], drawn, seed) for row in few]
            texts = [
                [*(row[name] for name in (positive_column, *own)), *more] for row, more in zip(few, new, strict=True)
            ]
            scores = score_rows(teacher, [row[context_column] for row in few], texts, batch_size)
            found += zip(numbers, new, (scale * scores).tolist(), strict=True)
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
