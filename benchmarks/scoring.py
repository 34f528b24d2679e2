"""The best 10 of very many candidates: ours against the usual ways, in one process, and what memory each takes.

    python benchmarks/scoring.py    # all of it, some 10 minutes on two cores
    python benchmarks/scoring.py --n 100000 --m 64 --dim 768 --out figures    # the README's table alone, one minute
    python benchmarks/scoring.py --texts --n 1000 100000    # vectors of real texts, some 15 minutes for encoding them
    python benchmarks/scoring.py --texts --model models/quickstart-poly-encoder    # of a trained model

Without --texts vectors are random, the hardest there are to rank exactly. With it candidates are ChitChat's turns, and
contexts its conversations, as a Poly-encoder encodes them: one vector a turn; and, as m = 64, by learnt codes that
start apart. What goes beyond ChitChat's turns are means of two of them. Writes scoring.json and scoring.png (or
scoring-texts.json) into benchmarks/results/, or the folder that --out names.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from measuring import interleaved, machine, peak_memory, summary
from rich.console import Console
from rich.table import Table
from sentence_transformers.util import maxsim
from torch import Tensor

from poly_encoders import PolyEncoder
from poly_encoders.hardware import has_fast_bf16
from poly_encoders.saving import replace_file
from poly_encoders.scoring import prepare, top_k
from poly_encoders.training.data.chitchat import chitchat_examples
from poly_encoders.training.train import checkpoint_path

K = 10
CONTEXTS = 32
DOCUMENT_TOKENS, TOKEN_DIM = 32, 128
RESULTS = Path(__file__).parent / "results"

REFERENCE = "reference form"
EXACT, FLOAT32, BFLOAT16 = "ours, exact", "ours, float32", "ours, bfloat16"
MANY = f"ours, exact, {CONTEXTS} contexts, each"
BI, BI_LOW = "bi-encoder, float32", "bi-encoder, bfloat16"
PRODUCT, PRODUCT_LOW = "bare product, float32", "bare product, bfloat16"
LATE = "late interaction"
FLAT, FLAT_MANY = "FAISS flat", f"FAISS flat, {CONTEXTS} queries, each"
# (ours, the rival, the most that ours may take of its time: where bfloat16 is fast, and where it is not)
GOALS = [
    (EXACT, REFERENCE, 1 / 20, 1 / 12),
    (EXACT, BI, 1.0, 1.3),
    (EXACT, FLAT, 1.0, 1.3),
    (MANY, EXACT, 0.5, 0.5),
]


def reference(context: Tensor, candidates: Tensor, scale: float) -> Any:
    """The usual implementation: every candidate attends over the context vectors, and meets what it made of them."""
    weights = (candidates @ context.T * scale).softmax(dim=-1)  # (n, m)
    attended = weights @ context  # (n, dim): the context as each candidate sees it
    return (attended * candidates).sum(dim=-1).topk(min(K, len(candidates)))


def random_vectors(n: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    """Candidates `(n, dim)` and contexts `(CONTEXTS, m, dim)`."""
    torch.manual_seed(0)
    return torch.randn(n, dim), torch.randn(CONTEXTS, m, dim)


def text_vectors(
    checkpoint: str, n: int, encoded: int, kept: Path | None = None
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Kind of context vectors, candidates `(n, dim)`, contexts `(CONTEXTS, m, dim)` and the model's final scale.

    Candidates that were encoded are in the file `kept`, or are written there.
    """
    torch.manual_seed(0)
    replies = dict.fromkeys(example.response for example in chitchat_examples("train"))
    conversations = [example.context for example in chitchat_examples("test")[:: 6773 // CONTEXTS]][:CONTEXTS]
    lengths: dict[str, Any] = {"max_context_length": 128, "max_candidate_length": 32}
    model = PolyEncoder(checkpoint, **lengths)
    texts = [*replies][: min(n, encoded)]
    if kept is not None and kept.is_file():
        vectors = torch.from_numpy(np.load(kept)[: len(texts)])
    else:
        vectors = model.encode_document(texts, convert_to_tensor=True, batch_size=128, show_progress_bar=True)
        if kept is not None:
            np.save(kept, vectors)
    pairs = torch.randint(len(vectors), (max(0, n - len(vectors)), 2))
    vectors = torch.cat([vectors, torch.nn.functional.normalize(vectors[pairs].mean(dim=1), dim=1)])
    yield "turns", vectors, model.encode_query(conversations, convert_to_tensor=True), float(model.final_scale)
    if model.model_card_data.is_untrained:  # a checkpoint that both can be built on
        model = PolyEncoder(checkpoint, context_vectors="learnt_codes", normalize=True, **lengths)
        yield "codes", vectors, model.encode_query(conversations, convert_to_tensor=True), float(model.final_scale)


def measure(candidates: Tensor, contexts: Tensor, scale: float, rounds: int, form: Any) -> list[dict[str, Any]]:
    """All methods on the same candidates: one row a method."""
    real = (contexts != 0).any(dim=-1)
    typical = real.sum(dim=1).argsort()[len(contexts) // 2]  # of median length
    context = contexts[typical][real[typical]]
    query, (n, dim), m = context[0], candidates.shape, len(context)
    prepared = prepare(candidates, form=form)
    low = candidates.bfloat16()
    low_columns, low_query = context.bfloat16().T, query.bfloat16()
    methods: dict[str, Callable[[], Any]] = {
        REFERENCE: lambda: reference(context, candidates, scale),
        BI: lambda: (candidates @ query).topk(min(K, n)),
        PRODUCT: lambda: candidates @ context.T,
        EXACT: lambda: top_k(context[None], prepared, K, scale=scale),
        FLOAT32: lambda: top_k(context[None], candidates, K, scale=scale, precision="float32"),
    }
    if has_fast_bf16("cpu"):
        methods |= {
            BI_LOW: lambda: (low @ low_query).topk(min(K, n)),
            PRODUCT_LOW: lambda: low @ low_columns,
            BFLOAT16: lambda: top_k(context[None], prepared, K, scale=scale, precision="bfloat16"),
        }
    with contextlib.suppress(ImportError):
        import faiss

        flat = faiss.IndexFlatIP(dim)
        flat.add(candidates.numpy())
        methods[FLAT] = lambda: flat.search(query[None].numpy(), K)
    times = interleaved(methods, rounds)
    if n <= 100_000:
        methods[MANY] = lambda: top_k(contexts, prepared, K, scale=scale)
        many = {MANY: methods[MANY]}
        if FLAT in methods:
            methods[FLAT_MANY] = many[FLAT_MANY] = lambda: flat.search(contexts[:, 0].contiguous().numpy(), K)
        for name, each in interleaved(many, max(2, rounds // 4)).items():
            times[name] = [time / CONTEXTS for time in each]
    if n <= 100_000 and m == 64:  # a million documents would take 16 GB
        tokens, asked = torch.randn(n, DOCUMENT_TOKENS, TOKEN_DIM), torch.randn(1, DOCUMENT_TOKENS, TOKEN_DIM)
        methods[LATE] = lambda: maxsim(asked, tokens)[0].topk(min(K, n))
        times |= interleaved({LATE: methods[LATE]}, max(2, rounds // 4))
    return [
        {"n": n, "m": m, "dim": dim, "method": name, **summary(times[name]), "peak_mib": peak_memory(method)}
        for name, method in methods.items()
    ]


def show(rows: list[dict[str, Any]], console: Console, kind: str) -> None:
    """One table a shape, with the times as ratios to the exact ranking's."""
    n, m, dim = (rows[0][key] for key in ("n", "m", "dim"))
    ours = next(row["median_ms"] for row in rows if row["method"] == EXACT)
    table = Table(title=f"{n:,} candidates, m = {m} ({kind}), dim {dim}: the best {K}, one context")
    for heading in ("", "median", "quartiles", "over ours, exact", "memory beside the candidates"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.1f} MiB"
        quartiles = f"{row['low_ms']:,.2f} to {row['high_ms']:,.2f}"
        table.add_row(
            row["method"], f"{row['median_ms']:,.2f} ms", quartiles, f"{row['median_ms'] / ours:.2f} x", memory
        )
    console.print(table)


def show_goals(rows: list[dict[str, Any]], console: Console) -> None:
    """The ratios that were aimed at for vectors of texts, and those that were reached, at 100,000 candidates."""
    table = Table(title="100,000 candidates: goals")
    for heading in ("vectors", "", "against", "goal: at most", "reached"):
        table.add_column(heading, justify="right" if "goal" in heading or heading == "reached" else "left")
    for kind in dict.fromkeys(row["vectors"] for row in rows):
        times = {row["method"]: row["median_ms"] for row in rows if row["n"] == 100_000 and row["vectors"] == kind}
        for ours, rival, *goals in GOALS:
            if {ours, rival} <= times.keys():
                goal, reached = goals[BI_LOW not in times], times[ours] / times[rival]
                colour = "green" if reached <= goal else "red"
                table.add_row(kind, ours, rival, f"{goal:.3f} x", f"[{colour}]{reached:.3f} x[/{colour}]")
    if table.rows:
        console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against n, both logarithmic, one panel for each m and dim."""
    shapes = sorted({(row["dim"], row["m"]) for row in rows})
    dims, widths = sorted({dim for dim, _ in shapes}), sorted({m for _, m in shapes})
    figure, panels = plt.subplots(
        len(dims),
        len(widths),
        figsize=(4 * len(widths) + 1, 3.3 * len(dims) + 0.5),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    styles = {
        REFERENCE: ("tab:red", "-"),
        LATE: ("tab:purple", "-"),
        PRODUCT: ("0.6", "--"),
        PRODUCT_LOW: ("0.6", ":"),
        BI: ("tab:orange", "--"),
        BI_LOW: ("tab:orange", ":"),
        FLOAT32: ("tab:blue", "--"),
        EXACT: ("tab:blue", "-"),
    }
    for dim, m in shapes:
        panel = panels[dims.index(dim)][widths.index(m)]
        for method, (colour, line) in styles.items():
            points = sorted(
                (r["n"], r["median_ms"]) for r in rows if (r["dim"], r["m"], r["method"]) == (dim, m, method)
            )
            if points:
                panel.loglog(*zip(*points, strict=True), line, color=colour, marker=".", label=method)
        panel.set_title(f"m = {m}, dim {dim}")
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("candidates")
    for row in panels:
        row[0].set_ylabel("ms for the best 10")
    entries = {
        label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout(rect=(0, 0.16 if len(dims) == 1 else 0.08, 1, 1))
    figure.legend(entries.values(), entries.keys(), loc="lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print tables, write the results and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--m", type=int, nargs="+", default=[16, 64, 360])
    parser.add_argument("--dim", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--rounds", type=int, default=11, help="of each method; fewer from a million candidates on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--texts", action="store_true", help="vectors of real texts in place of random ones")
    parser.add_argument(
        "--model", default="minilm", help="of --texts: a Poly-encoder, or what one is built on (%(default)s)"
    )
    parser.add_argument("--encoded", type=int, default=50_000, help="of --texts: most texts to encode (%(default)s)")
    parser.add_argument("--no_bfloat16", action="store_true", help="as on hardware where it is slow")
    options = parser.parse_args()
    form = "axes" if options.no_bfloat16 else None
    console, rows = Console(width=130), []

    def add(kind: str, candidates: Tensor, contexts: Tensor, scale: float = 1.0) -> None:
        rounds = options.rounds if len(candidates) < 1_000_000 else max(3, options.rounds // 5)
        found = [{"vectors": kind, **row} for row in measure(candidates, contexts, scale, rounds, form)]
        show(found, console, kind)
        rows.extend(found)
        text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
        replace_file(options.out / ("scoring-texts.json" if options.texts else "scoring.json"), text + "\n")

    with torch.no_grad():
        if options.texts:
            for kind, vectors, contexts, scale in text_vectors(
                checkpoint_path(options.model), max(options.n), options.encoded
            ):
                for n in options.n:
                    add(kind, vectors[torch.randperm(len(vectors))[:n]].contiguous(), contexts, scale)
            show_goals(rows, console)
            return
        for dim in options.dim:
            for m in options.m:
                for n in options.n:
                    add("random", *random_vectors(n, m, dim))
    plot(rows, options.out / "scoring.png")


if __name__ == "__main__":
    main()
