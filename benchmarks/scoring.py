"""The best 10 of very many candidates: ours against the usual ways, in one process, and what memory each takes.

    python benchmarks/scoring.py    # all of it, some 10 minutes on two cores
    python benchmarks/scoring.py --n 100000 --m 64 --dim 768 --out figures    # the README's table alone, one minute

Vectors are random: their values matter little for the time. Writes scoring.json and scoring.png into
benchmarks/results/, or the folder that --out names.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from measuring import interleaved, machine, peak_memory, summary
from rich.console import Console
from rich.table import Table
from sentence_transformers.util import maxsim
from torch import Tensor

from poly_encoders.scoring import prepare, top_k

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
# (ours, the rival, the most that ours may take of its time, where the goals are set)
GOALS = [
    (EXACT, REFERENCE, 1 / 14),
    (EXACT, BI, 1.1),
    (EXACT, BI_LOW, 2.0),
    (EXACT, PRODUCT_LOW, 1.4),
    (EXACT, LATE, 1 / 30),
    (FLOAT32, PRODUCT, 1.2),
    (MANY, EXACT, 0.7),
]


def reference(context: Tensor, candidates: Tensor) -> Any:
    """The usual implementation: every candidate attends over the context vectors, and meets what it made of them."""
    weights = (candidates @ context.T).softmax(dim=-1)  # (n, m)
    attended = weights @ context  # (n, dim): the context as each candidate sees it
    return (attended * candidates).sum(dim=-1).topk(min(K, len(candidates)))


def measure(n: int, m: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    """All methods on the same candidates: one row a method."""
    torch.manual_seed(0)
    candidates, contexts = torch.randn(n, dim), torch.randn(CONTEXTS, m, dim)
    context, query = contexts[0], contexts[0, 0]
    prepared = prepare(candidates)
    low, low_columns, low_query = prepared.low, context.bfloat16().T, query.bfloat16()
    methods: dict[str, Callable[[], Any]] = {
        REFERENCE: lambda: reference(context, candidates),
        BI: lambda: (candidates @ query).topk(K),
        BI_LOW: lambda: (low @ low_query).topk(K),
        PRODUCT: lambda: candidates @ context.T,
        PRODUCT_LOW: lambda: low @ low_columns,
        EXACT: lambda: top_k(context[None], prepared, K, precision="exact"),
        FLOAT32: lambda: top_k(context[None], prepared, K, precision="float32"),
        BFLOAT16: lambda: top_k(context[None], prepared, K, precision="bfloat16"),
    }
    times = interleaved(methods, rounds)
    if n <= 100_000:
        methods[MANY] = lambda: top_k(contexts, prepared, K, precision="exact")
        many = interleaved({MANY: methods[MANY]}, max(2, rounds // 4))
        times[MANY] = [each / CONTEXTS for each in many[MANY]]
    if n <= 100_000 and m == 64:  # a million documents would take 16 GB
        tokens, asked = torch.randn(n, DOCUMENT_TOKENS, TOKEN_DIM), torch.randn(1, DOCUMENT_TOKENS, TOKEN_DIM)
        methods[LATE] = lambda: maxsim(asked, tokens)[0].topk(K)
        times |= interleaved({LATE: methods[LATE]}, max(2, rounds // 4))
    shape = {"n": n, "m": m, "dim": dim}
    return [
        {**shape, "method": name, **summary(times[name]), "peak_mib": peak_memory(method)}
        for name, method in methods.items()
    ]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table a shape, with the times as ratios to the exact ranking's."""
    n, m, dim = (rows[0][key] for key in ("n", "m", "dim"))
    ours = next(row["median_ms"] for row in rows if row["method"] == EXACT)
    table = Table(title=f"{n:,} candidates, m = {m}, dim {dim}: the best {K}, one context")
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
    """The ratios that were aimed at, and those that were reached, at 100,000 x 768 and m = 64."""
    times = {r["method"]: r["median_ms"] for r in rows if (r["n"], r["m"], r["dim"]) == (100_000, 64, 768)}
    if not times:
        return
    table = Table(title="100,000 candidates, m = 64, dim 768: goals")
    for heading in ("", "against", "goal: at most", "reached"):
        table.add_column(heading, justify="right" if "goal" in heading or heading == "reached" else "left")
    for ours, rival, goal in GOALS:
        reached = times[ours] / times[rival]
        colour = "green" if reached <= goal else "red"
        table.add_row(ours, rival, f"{goal:.3f} x", f"[{colour}]{reached:.3f} x[/{colour}]")
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
    options = parser.parse_args()
    console, rows = Console(), []
    with torch.no_grad():
        for dim in options.dim:
            for m in options.m:
                for n in options.n:
                    rounds = options.rounds if n < 1_000_000 else max(3, options.rounds // 5)
                    found = measure(n, m, dim, rounds)
                    show(found, console)
                    rows += found
                    options.out.mkdir(exist_ok=True, parents=True)
                    file = options.out / "scoring.json"
                    file.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    show_goals(rows, console)
    plot(rows, options.out / "scoring.png")


if __name__ == "__main__":
    main()
