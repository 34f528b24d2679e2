"""`encode_document` against `SentenceTransformer.encode` on the same weights, and the padding in the batches of either.

    python benchmarks/encoding.py    # some 3 minutes on two cores

Texts are ChitChat's turns, one to eight of them joined. Writes encoding.json into benchmarks/results/, or the folder
that --out names.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import numpy as np
from measuring import interleaved, machine, summary
from rich.console import Console
from sentence_transformers import SentenceTransformer

from poly_encoders import PolyEncoder
from poly_encoders.saving import replace_file
from poly_encoders.training.data.chitchat import chitchat_examples
from poly_encoders.training.train import checkpoint_path

BATCH = 32


def mixed_texts(number: int) -> list[str]:
    """Texts of mixed length."""
    choose = random.Random(0)
    turns = [*dict.fromkeys(example.response for example in chitchat_examples("train"))]
    return [" ".join(choose.sample(turns, choose.choice([1, 1, 1, 2, 4, 8]))) for _ in range(number)]


def padding(tokens: np.ndarray, sizes: list[int]) -> float:
    """The tokens of batches that are sorted by these sizes, padding included, over the texts' own."""
    batches = np.array_split(tokens[np.argsort(-np.array(sizes), kind="stable")], range(BATCH, len(tokens), BATCH))
    return round(float(sum(batch.max() * len(batch) for batch in batches) / tokens.sum()), 3)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="a SentenceTransformer (%(default)s)")
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    path, texts = checkpoint_path(options.model), mixed_texts(options.texts)
    ours, theirs = PolyEncoder(path), SentenceTransformer(path)
    theirs.max_seq_length = ours.length_limits()[1]
    methods = {"ours": lambda: ours.encode_document(texts), "sentence-transformers": lambda: theirs.encode(texts)}
    times = interleaved(methods, options.rounds)
    tokens = np.array([min(theirs.max_seq_length, ours._input_length(text) + 2) for text in texts])
    pairs = zip(times["sentence-transformers"], times["ours"], strict=True)
    found = {
        "machine": machine(),
        "texts": len(texts),
        **{name: summary(each) for name, each in times.items()},
        "times_as_fast": round(statistics.median(their / our for their, our in pairs), 3),
        "largest_difference": float(np.abs(methods["ours"]() - methods["sentence-transformers"]()).max()),
        "padding_by_tokens": padding(tokens, tokens.tolist()),
        "padding_by_characters": padding(tokens, [len(text) for text in texts]),
    }
    Console().print(found)
    replace_file(options.out / "encoding.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
