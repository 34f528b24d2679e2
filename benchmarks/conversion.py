"""How closely converted ParlAI checkpoints follow the original, and what converting one of the authors' size takes.

    python benchmarks/conversion.py    # half a minute, 5 GB of temporary files; --fixtures for the first part alone

The first part reads the outputs that ParlAI itself gave for the fixtures; the second writes a random checkpoint of the
released models' sizes (12 layers, 768 wide, 54,944 tokens, float16, with an optimizer's state) and converts it.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from parlai_original import FIXTURES, write_checkpoint
from poly_encoders import CrossEncoder
from poly_encoders.parlai import convert_parlai_checkpoint

RELEASED = {
    "embedding_size": 768,
    "ffn_size": 3072,
    "n_layers": 12,
    "n_heads": 12,
    "n_positions": 1024,
    "rows": 54_944,
    "poly_n_codes": 64,
    "text_truncate": 360,
    "label_truncate": 72,
    "fp16": True,
}


def differences(name: str, folder: Path) -> dict[str, float]:
    """Largest absolute differences of a fixture's scores and vectors from those that ParlAI gave."""
    model = convert_parlai_checkpoint(FIXTURES / name / "model", folder / name)
    largest: dict[str, float] = {}

    def compare(what: str, found: torch.Tensor, expected: list) -> None:
        difference = float((found - torch.tensor(expected).reshape(found.shape)).abs().max())
        largest[what] = max(largest.get(what, 0.0), difference)

    for batch in json.loads((FIXTURES / name / "reference.json").read_text())["batches"]:
        for position, context in enumerate(batch["contexts"]):
            turns = [turn["text"] for turn in context["turns"]]
            own = isinstance(batch["candidates"][0], list)
            texts = [item["text"] for item in (batch["candidates"][position] if own else batch["candidates"])]
            outputs = batch["outputs"]
            if isinstance(model, CrossEncoder):
                pairs = [(turns, text) for text in texts]
                compare("scores", model.predict(pairs, convert_to_tensor=True), outputs["scores"][position])
                continue
            vectors = model.encode_query([turns], convert_to_tensor=True)
            candidates = model.encode_document(texts, convert_to_tensor=True)
            compare("vectors", vectors, outputs["context_vectors"][position])
            expected = outputs["candidate_vectors"][position] if own else outputs["candidate_vectors"]
            compare("vectors", candidates, expected)
            compare("scores", model.similarity(vectors, candidates)[0], outputs["scores"][position])
    return largest


def released_size(folder: Path) -> tuple[float, float]:
    """Seconds and the process's peak memory, GB, of converting a random checkpoint of the released models' size."""
    model_file = write_checkpoint(folder / "parlai", dtype=torch.float16, **RELEASED)
    saved = torch.load(model_file, weights_only=True)
    saved["optimizer"] = {"exp_avg": [tensor.float() for tensor in saved["model"].values()]}
    torch.save(saved, model_file)
    del saved
    before = time.perf_counter()
    convert_parlai_checkpoint(model_file, folder / "converted")
    return time.perf_counter() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    """Measure, and print both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixtures", action="store_true", help="only the comparison with ParlAI's outputs")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        table = Table(title="Largest difference from the original")
        for heading in ("fixture", "scores", "vectors"):
            table.add_column(heading)
        for name in sorted(path.name for path in FIXTURES.iterdir()):
            largest = differences(name, Path(temporary))
            table.add_row(name, *(f"{largest[what]:.1e}" if what in largest else "-" for what in ("scores", "vectors")))
        console.print(table)
        if not options.fixtures:
            with console.status("Converting a checkpoint of the released models' size ..."):
                seconds, gigabytes = released_size(Path(temporary))
            console.print(f"Released size: {seconds:.1f} s, {gigabytes:.1f} GB at most (writing it first included).")


if __name__ == "__main__":
    main()
