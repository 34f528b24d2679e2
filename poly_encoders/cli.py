"""The `poly-encoders` command."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poly_encoders.evaluation import CandidateRankingEvaluator
from poly_encoders.loading import load_model
from poly_encoders.parlai import convert_parlai_checkpoint
from poly_encoders.tasks import TASKS, RankingTask, read_task

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Poly-encoders: convert and evaluate models.")

TaskName = Enum("TaskName", {name: name for name in TASKS}, type=str)  # type: ignore[misc]  # what typer makes choices of


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Show what a user can mend as a message without a traceback; every other error is ours and keeps its own."""
    try:
        yield
    except (ValueError, OSError) as error:
        message = escape(str(error) or type(error).__name__)
        Console(stderr=True).print(f"[bold red]Error:[/] {message}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.command("convert-parlai")
def convert_parlai(
    model_file: Annotated[Path, typer.Argument(help="The file `model` of a ParlAI checkpoint, or its folder.")],
    output: Annotated[Path, typer.Argument(help="The folder to write the converted model to.")],
    push_to_hub: Annotated[str | None, typer.Option(help="Push the model to this Hub id as well.")] = None,
    private: Annotated[bool, typer.Option(help="Make a new repository on the Hub private.")] = False,
) -> None:
    """Convert a checkpoint of ParlAI's Poly-, Bi- or Cross-encoder to Hugging Face."""
    if private and push_to_hub is None:
        raise typer.BadParameter("it concerns the Hub: give --push-to-hub ID as well.", param_hint="--private")
    console = Console()
    with _clear_errors():
        with console.status(f"Converting {escape(str(model_file))} ..."):
            model = convert_parlai_checkpoint(model_file, output)
        name = type(model).__name__
        folder, loads = escape(str(output)), escape(f"{name}({str(output)!r})")
        console.print(f"[green]Saved a {name} to[/] {folder}. Load it with [bold]{loads}[/].", soft_wrap=True)
        if push_to_hub is not None:
            with console.status(f"Pushing to {escape(push_to_hub)} ..."):
                url = model.push_to_hub(push_to_hub, private=private or None)
            console.print(f"[green]Pushed to[/] {escape(url)}", soft_wrap=True)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A saved model: a folder or a Hub id.")],
    task: Annotated[TaskName, typer.Argument(help="What to rank.")],
    files: Annotated[list[Path], typer.Argument(help="The task's files, in the order named above.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 64,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda:0.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file as well.")] = None,
) -> None:
    """Measure R@k/C and MRR of a model on one of the paper's tasks.

    convai2: valid_self_original.txt (C = 20). dstc7: ubuntu_test_subtask_1.json ubuntu_responses_subtask_1.tsv (100).
    ubuntu-v2: test.csv (10). wikipedia: wikipedia_test10k.txt wikipedia_test_basedocs.txt (10,001). jsonl: your own
    {"context": ..., "candidates": [...], "label": index} lines.
    """
    with _clear_errors():
        sets = read_task(task.value, files, max_examples)
        settings = TASKS[task.value]
        evaluator = CandidateRankingEvaluator(
            sets.samples,
            at_k=settings.at_k,
            batch_size=batch_size,
            shared_candidates=sets.shared_candidates,
        )
        results = evaluator(load_model(model, device=_checked_device(device)))
        sizes = {len(sample["candidates"]) + len(sets.shared_candidates) for sample in sets.samples}
        console = Console()
        console.print(_table(model, settings, len(sets.samples), sizes, results))
        if settings.num_candidates is not None and sizes != {settings.num_candidates}:
            console.print(
                f"[yellow]The sets have {_counted(sizes)} candidates, {settings.title}'s have "
                f"{settings.num_candidates:,}: these figures do not compare with the paper's.[/]",
                soft_wrap=True,
            )
        if output is not None:
            about = {"model": model, "task": task.value, "examples": len(sets.samples), "candidates": sorted(sizes)}
            _write_json(output, {**about, **results})


def _checked_device(device: str | None) -> str | None:
    """`device`, if it names one that is here."""
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"There is no {device}: PyTorch finds no CUDA device here. Leave --device out, or give cpu.")
    return device


def _counted(sizes: set[int]) -> str:
    return f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"


def _table(model: str, task: RankingTask, num_examples: int, sizes: set[int], results: dict[str, Any]) -> Table:
    table = Table(title=f"{escape(model)} on {task.title}, examples: {num_examples:,}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in results.items():
        shown = name.replace("recall@", "R@").replace("mrr", "MRR")
        if shown.startswith("R@") and len(sizes) == 1:
            shown += f"/{min(sizes):,}"
        table.add_row(shown, f"{value:.4f}")
    return table


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)
