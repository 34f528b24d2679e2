"""Training the context side alone, against candidate vectors that stay.

The vectors are those of the model's own candidate side, computed once, or any others of the right width: those of an
index that somebody has, also of a model or an API that nobody here has. Afterwards they still are the candidates'.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from sentence_transformers.util import all_gather
from torch import Tensor, nn
from torch.nn.functional import normalize

from poly_encoders import PolyEncoder
from poly_encoders.modeling.text_poly_encoder import checked_count
from poly_encoders.saving import staged_folder
from poly_encoders.training.data.checks import cells, checked_examples, text_columns
from poly_encoders.training.data.collators import context_key
from poly_encoders.training.methods.fingerprints import hashed, weights_fingerprint
from poly_encoders.training.methods.losses import InBatchNegativesLoss, is_training, text_keys
from poly_encoders.two_sided import has_length_1, refuse_other_lengths

logger = logging.getLogger(__name__)

ALL = -1  # rows of the index as negatives
FOLDER = "candidate_vectors"  # in output_dir; a data set of the columns below
TEXT, VECTOR = "text", "vector"
NOTE = "made_of.json"  # in that folder


class CandidateIndex(NamedTuple):
    """The candidates of the data, and what is known of them."""

    rows: dict[str, int]  # by text, the training data's first
    vectors: Tensor  # (n, dim) float32
    num_trained: int  # of the training data
    positives: dict[bytes, tuple[int, ...]]  # as `positives_of_contexts`


def make_index(model: Any, train: Any, evaluation: Any, args: Any, given: Any = None) -> CandidateIndex:
    """The index of a run with these options; all processes call it together, and the first one encodes.

    Errors are those of `candidate_texts_of` and `candidate_vectors`; a ValueError for columns of different prompts.
    """
    data = [part for part in (train, evaluation) if part is not None]
    texts = texts_in_order(data)
    prompts = {
        args.prompts if isinstance(args.prompts, str) else (args.prompts or {}).get(name)
        for part in data
        for name in text_columns(part)[1:]
    }
    if len(prompts) != 1:
        raise ValueError(f"A candidate has one vector whatever its column, but the prompts are {args.prompts}.")
    options = {"prompt": prompts.pop(), "batch_size": args.eval_batch_size, "show_progress_bar": not args.disable_tqdm}
    with args.main_process_first(local=False, desc="candidate vectors"):
        vectors = candidate_vectors(model, texts, Path(args.output_dir, FOLDER), given, **options)
    rows = {text: row for row, text in enumerate(texts)}
    several = positives_of_contexts(data, rows) if args.num_index_negatives else {}
    return CandidateIndex(rows, vectors, len(texts if train is None else texts_in_order([train])), several)


def freeze_candidate_encoder(model: Any) -> None:
    """Take all that candidates go through out of training; a ValueError where contexts go through it too."""
    if model[0].config.share_encoders if isinstance(model, PolyEncoder) else model.share_encoders:
        raise ValueError(
            f"This {type(model).__name__} has one encoder for both sides, so its candidate side cannot stay as it is "
            "while the context side trains. Build it on an encoder checkpoint with share_encoders=False."
        )
    for module in candidate_modules(model):
        module.requires_grad_(False)


def candidate_modules(model: Any) -> list[nn.Module]:
    """The modules that candidates go through, in a model with an encoder for each side."""
    if isinstance(model, PolyEncoder):
        return [model[0].model.candidate_encoder]
    return [*model[0].sub_modules["document"], *list(model)[1:]]


# --- texts -----------------------------------------------------------------------------------------------------------


def candidate_texts_of(*data: Any) -> list[str]:
    """The different candidate texts of data sets in the order of their first appearance, as one reads: row after row.

    This is the order of a trainer's `candidate_vectors`, for `candidate_texts_of(train_dataset, eval_dataset)`. Of a
    row the positive comes first, then its negatives. Rows that are labelled 0 do not count, as in training.

    Raises:
        ValueError: data that cannot be trained on, or that is streamed or a dict of data sets.
    """
    parts = [part for part in data if part is not None]
    return texts_in_order([checked_examples(part, f"data set {number}") for number, part in enumerate(parts, 1)])


def texts_in_order(data: list[Any]) -> list[str]:
    """As `candidate_texts_of`, of data that were checked."""
    return list(dict.fromkeys(chain.from_iterable(map(_candidates, data))))


def _candidates(data: Any) -> Iterator[str]:
    if not isinstance(data, Dataset):
        raise ValueError(
            f"Candidates that stay are those of one Dataset, not of a {type(data).__name__}: their vectors are "
            "computed before training. Concatenate the data sets, or read a streamed one into memory."
        )
    return chain.from_iterable(zip(*(cells(data, name) for name in text_columns(data)[1:]), strict=True))


def positives_of_contexts(data: list[Dataset], rows: dict[str, int]) -> dict[bytes, tuple[int, ...]]:
    """By `context_key`, the rows of the positives of every context that has several in the data."""
    found: dict[bytes, tuple[int, ...]] = {}
    for part in data:
        context, positive = text_columns(part)[:2]
        for cell, text in zip(cells(part, context), cells(part, positive), strict=True):
            known = found.get(key := context_key(cell), ())
            found[key] = known if rows[text] in known else (*known, rows[text])
    return {key: known for key, known in found.items() if len(known) > 1}


# --- vectors ---------------------------------------------------------------------------------------------------------


def candidate_vectors(model: Any, texts: list[str], folder: str | Path, given: Any = None, **options: Any) -> Tensor:
    """`(n, dim)` float32 vectors of the texts on the CPU: those given, those that the folder has, or the model's.

    What the folder has is taken where texts and candidate side are those that it was made of.

    Args:
        model: A `PolyEncoder` or a `BiEncoder`.
        texts: Different ones.
        folder: Where they are stored, as a data set of texts and vectors.
        given: `(n, dim)` numbers in the order of the texts: a tensor, an array, an Arrow column or one of a data set;
            or a data set of at least these texts with the columns `text` and `vector`, in any order.
        **options: For `encode_document`, where the model is to encode.

    Raises:
        ValueError: vectors of another width, number or dtype, not finite, not of length 1 where scores are cosines; or
            what the folder has was given for other texts.
    """
    folder = Path(folder)
    made = {"texts": hashed(json.dumps(text).encode() for text in texts)}
    found = json.loads((folder / NOTE).read_text(encoding="utf-8")) if (folder / NOTE).is_file() else {}
    vectors = None if given is None else checked_vectors(model, given, texts)
    if vectors is not None:
        made["given"] = hashed([vectors.numpy()])
        if found.get("given") == made["given"] and found != made:
            raise ValueError(
                f"The candidate vectors are those in {folder}, but the candidates' texts are others. Encode the texts "
                "of candidate_texts_of(train_dataset, eval_dataset) anew, or delete the folder if these are theirs."
            )
    elif "given" in found:
        raise ValueError(
            f"The candidate vectors in {folder} were given. Give them again as candidate_vectors=, for instance "
            f"load_from_disk({str(folder)!r}), or delete the folder to have the model encode its own."
        )
    else:
        prompt = options.get("prompt") or getattr(model, "prompts", {}).get("document")
        made["model"] = candidate_fingerprint(model, prompt)
    if found == made:
        logger.info("The vectors of %d candidates in %s are there already.", len(texts), folder)
        return _as_tensor(load_from_disk(str(folder))[VECTOR])
    if found:
        what = "texts" if found.get("texts") != made["texts"] else "candidate side or vectors"
        logger.info("The candidate vectors in %s were made of other %s: making them anew.", folder, what)
        shutil.rmtree(folder)
    if vectors is None:
        vectors = model.encode_document(texts, convert_to_tensor=True, **options).float().cpu()
        if model.scores_are_cosines and not has_length_1(vectors):
            vectors = normalize(vectors, dim=-1)  # a Bi-encoder whose similarity does that
    _store(folder, texts, vectors, made)
    return vectors


def candidate_fingerprint(model: Any, prompt: str | None = None) -> str:
    """A hash of all that a candidate's vector depends on: weights, how a text is cut, what is made of its tokens."""
    settings: Any
    if isinstance(model, PolyEncoder):
        config = model[0].config
        settings = [config.reduction, config.normalize, config.output_scaling]
        settings += [config.num_codes] if config.reduction == "first_m_mean" else []
    else:
        modules: list[Any] = candidate_modules(model)
        settings = [(type(module).__name__, module.get_config_dict()) for module in modules]
    said = json.dumps([settings, model.length_limits()[1], prompt], default=str, sort_keys=True)
    return hashed([said.encode(), *(weights_fingerprint(module).encode() for module in candidate_modules(model))])


def checked_vectors(model: Any, given: Any, texts: list[str]) -> Tensor:
    """The given vectors as `(n, dim)` float32 in the order of the texts, or an error as `candidate_vectors` says."""
    if isinstance(given, Dataset):
        given = _in_order(given, texts)
    vectors = _as_tensor(given)
    if not vectors.is_floating_point():
        raise ValueError(
            f"candidate_vectors are {vectors.dtype}; expected floating-point numbers. Quantised ones give no scores: "
            "encode with precision='float32'."
        )
    wanted = (len(texts), *model.vector_shape("document"))
    if vectors.shape != wanted:
        raise ValueError(
            f"candidate_vectors have the shape {tuple(vectors.shape)}; expected {wanted}: a vector as wide as the "
            "model's for each text of candidate_texts_of(train_dataset, eval_dataset), in that order."
        )
    vectors = vectors.float().cpu().contiguous()
    if bad := (~vectors.isfinite().all(dim=1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"candidate_vectors have NaN or infinite numbers in {len(bad)} rows, the first in row {bad[0]}, that of "
            f"{texts[bad[0]]!r:.80}. Encode these texts anew."
        )
    if model.scores_are_cosines:
        refuse_other_lengths(vectors, "candidate_vectors")
    return vectors


def _in_order(data: Dataset, texts: list[str]) -> Any:
    if not {TEXT, VECTOR} <= set(data.column_names):
        raise ValueError(
            f"A data set of candidate vectors has columns {TEXT!r} and {VECTOR!r}; got {data.column_names}."
        )
    rows = {text: row for row, text in enumerate(data[TEXT])}
    if missing := [text for text in texts if text not in rows]:
        raise ValueError(
            f"The candidate vectors lack {len(missing)} of {len(texts)} texts, the first {missing[0]!r:.80}. Encode "
            "all of candidate_texts_of(train_dataset, eval_dataset)."
        )
    order = [rows[text] for text in texts]
    return data[VECTOR] if order == list(range(len(data))) else _as_tensor(data[VECTOR])[order]


def _as_tensor(vectors: Any) -> Tensor:
    """Numbers in any of the containers as one tensor."""
    if isinstance(vectors, Tensor):
        return vectors.detach()
    if isinstance(getattr(vectors, "source", None), Dataset):  # a column of a data set
        name = vectors.column_name
        vectors = vectors.source.select_columns(name).with_format("arrow")[:][name]
    if isinstance(vectors, pa.ChunkedArray):
        vectors = vectors.combine_chunks()
    if isinstance(vectors, pa.Array):
        kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        if not any(is_kind(vectors.type) for is_kind in kinds) or len(pc.list_value_length(vectors).unique()) != 1:
            raise ValueError(f"candidate_vectors, {vectors.type}, are no lists of one length; expected (n, dim).")
        vectors = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1)
    try:
        return torch.from_numpy(np.array(vectors))  # a copy, which is writable
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"candidate_vectors, a {type(vectors).__name__}, are no (n, dim) numbers ({error}). Give a tensor, an "
            "array or an Arrow column."
        ) from error


def _store(folder: Path, texts: list[str], vectors: Tensor, made: dict[str, str]) -> None:
    width = vectors.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.flatten().numpy()), width)
    features = Features({TEXT: Value("string"), VECTOR: List(Value("float32"), length=width)})
    with staged_folder(folder) as staging:
        Dataset.from_dict({TEXT: texts, VECTOR: column}, features=features).save_to_disk(staging)
        Path(staging, NOTE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


# --- the loss --------------------------------------------------------------------------------------------------------


class FrozenCandidatesLoss(InBatchNegativesLoss):
    """As `InBatchNegativesLoss`, with candidates that are rows of an index of vectors, and more of its rows.

    Args:
        model: As there.
        candidates: `(n, dim)` vectors, on the model's device in training.
        num_index_negatives: Further rows that each batch is scored against, drawn anew for each; -1 for all.
        num_trained: So many first rows are the training data's, which alone are drawn in training.
        seed: Of the draw, which otherwise depends on the batch and on `epoch` alone.
        **options: As there.

    Inputs: the contexts' features, and `candidate_rows` and `known_positives` as `FrozenCandidatesCollator` makes them;
        labels as there.
    """

    candidates: Tensor

    def __init__(
        self,
        model: Any,
        candidates: Tensor,
        num_index_negatives: int = 0,
        num_trained: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if num_index_negatives != ALL:
            checked_count(num_index_negatives, "num_index_negatives", 0)
        # What `encode_document` gives is for inference alone.
        candidates = candidates.clone() if candidates.is_inference() else candidates
        self.register_buffer("candidates", candidates, persistent=False)
        self.num_index_negatives = num_index_negatives
        self.num_trained = len(candidates) if num_trained is None else num_trained
        self.seed, self.epoch = seed, 0
        self._known = candidates.new_zeros((0, 0), dtype=torch.long)

    def forward(self, sentence_features: Any, labels: Tensor | None = None) -> Tensor:
        contexts, rows = sentence_features
        keys = text_keys(contexts["input_ids"], contexts["attention_mask"])
        self._keys = [keys, *rows["candidate_rows"].unbind(dim=1)]
        self._known = rows.get("known_positives", rows["candidate_rows"][:, :1])
        return self._loss_of([contexts], labels)

    def _loss(self, vectors: list[Tensor], teacher: Tensor | None, further: Any = None) -> Tensor:
        (contexts,), (keys, *columns) = vectors, self._keys
        index = self.candidates[: self.num_trained] if is_training(self.model) else self.candidates
        if self.num_index_negatives == ALL:
            own = torch.stack(columns, dim=1)
            same = torch.zeros((len(own), len(index)), dtype=torch.bool, device=own.device).scatter_(
                1, self._known, True
            )
            one, other = (keys[:, None] == keys).nonzero(as_tuple=True)
            same[one, own[other, 0]] = True
            return self._loss_of_scores(contexts, self.similarity(contexts, index), same, own, teacher)
        if self.num_index_negatives:
            drawn = self._draw(len(index), keys, torch.cat(columns))
            same = torch.stack([(drawn == known[:, None]) for known in self._known.unbind(dim=1)]).any(dim=0)
            further = (self.candidates[drawn], same)
        return super()._loss([contexts, *(self.candidates[rows] for rows in columns)], teacher, further)

    def _draw(self, size: int, keys: Tensor, rows: Tensor) -> Tensor:
        """Different rows of the first `size`, none of them the batch's."""
        of = (self.seed, self.epoch if is_training(self.model) else 0, keys.tolist(), rows.tolist())
        digest = hashlib.blake2b(repr(of).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        order = torch.randperm(size, generator=generator).to(rows.device)
        taken = all_gather(rows) if self.gather_across_devices else rows
        return order[~torch.isin(order, taken)][: self.num_index_negatives]

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        more = {"num_index_negatives": self.num_index_negatives, "candidates": len(self.candidates)}
        return {**super().get_config_dict(), **more}
