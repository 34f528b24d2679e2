"""`poly-encoders index`: build, change, search and publish an index of candidates."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from poly_encoders.console import Device, clear_errors, console
from poly_encoders.index.candidate_index import CandidateIndex
from poly_encoders.index.row_batches import BUILDERS
from poly_encoders.loading import load_model

index_app = typer.Typer(no_args_is_help=True, help="Candidates on disk: build, change, search and publish an index.")

Folder = Annotated[Path, typer.Argument(help="The index's folder.")]
Candidates = Annotated[
    str, typer.Argument(help=f"A file ({', '.join(BUILDERS)}) or a Hub data set: id, text, metadata.")
]
Model = Annotated[str | None, typer.Option(help="The model; the one that it was built with if left out.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts encoded at once.")]


@index_app.command()
def build(
    model: Annotated[str, typer.Argument(help="A saved Poly- or Bi-encoder: a folder or a Hub id.")],
    candidates: Candidates,
    index: Folder,
    float32: Annotated[bool, typer.Option(help="Store vectors in float32, not float16.")] = False,
    batch_size: BatchSize = 32,
    ray: Annotated[bool, typer.Option(help="Encode on a Ray cluster: that of RAY_ADDRESS, or one here.")] = False,
    device: Device = None,
) -> None:
    """Encode candidates into an index. Run it again after a kill, or when some have changed: it encodes only those."""
    with clear_errors(device):
        dtype: Any = "float32" if float32 else "float16"
        loaded: Any = load_model(model, device=device)
        built = CandidateIndex.build(loaded, candidates, index, dtype=dtype, batch_size=batch_size, ray=ray)
        console.print(f"[green]{len(built):,} candidates in[/] {escape(str(index))}")


@index_app.command()
def add(
    index: Folder,
    candidates: Candidates,
    replace: Annotated[bool, typer.Option(help="Replace those of the same ids.")] = False,
    model: Model = None,
    batch_size: BatchSize = 32,
    device: Device = None,
) -> None:
    """Add candidates; with --replace in place of those of the same ids."""
    with clear_errors(device):
        opened = _opened(index, model, device)
        write = opened.upsert if replace else opened.add
        written = write(candidates, batch_size=batch_size, show_progress_bar=True)
        console.print(f"[green]{written:,} new or changed;[/] {len(opened):,} candidates")


@index_app.command()
def delete(
    index: Folder,
    ids: Annotated[list[str] | None, typer.Argument(help="Of the candidates to delete.")] = None,
    where: Annotated[str | None, typer.Option(help="Delete those that meet this condition in SQL.")] = None,
) -> None:
    """Delete candidates by their ids, or by a condition such as --where "year < 2000"."""
    with clear_errors():
        opened = CandidateIndex.load(index)
        are_numbers = "int" in str(opened.store.dataset.schema.field("id").type)
        listed: Any = [int(id_) if are_numbers else id_ for id_ in ids] if ids else None
        gone = opened.delete(listed, filter=where)
        console.print(f"[green]{gone:,} deleted;[/] {len(opened):,} candidates")


@index_app.command()
def search(
    index: Folder,
    turns: Annotated[list[str], typer.Argument(help="The context: a text, or its turns, oldest first.")],
    top_k: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    where: Annotated[str | None, typer.Option(help="Only those that meet this condition in SQL.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="exact, ann or milvus; exact for up to 300,000 if left out.")
    ] = None,
    milvus: Annotated[str | None, typer.Option(help="Search in Milvus: its address, or a file name in .db.")] = None,
    certify: Annotated[bool, typer.Option(help="A proven answer at any rate.")] = False,
    model: Model = None,
    device: Device = None,
) -> None:
    """The best candidates for a context."""
    with clear_errors(device):
        opened = _opened(index, model, device)
        chosen: Any = {"engine": engine, "milvus": milvus, "certify": certify}
        [hits] = opened.search([turns], top_k, where, show_progress_bar=True, **chosen)
        table = Table("score", "id", "text", *opened.store.metadata_columns)
        for hit in hits:
            rest = (str(hit[name]) for name in opened.store.metadata_columns)
            table.add_row(f"{hit['score']:.4f}", *map(escape, (str(hit["id"]), str(hit["text"]), *rest)))
        console.print(table, soft_wrap=False)
        console.print("Proven: none is better." if hits.proven else f"Not proven: {hits.looked_at:.1%} were looked at.")


@index_app.command()
def info(
    index: Folder,
    verify: Annotated[bool, typer.Option(help="Read everything, and compare it with its checksums.")] = False,
) -> None:
    """What is in an index."""
    with clear_errors():
        opened = CandidateIndex.load(index)
        table = Table(show_header=False)
        for name, value in opened.info().items():
            size = f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else value
            shown = ", ".join(value) if isinstance(value, list) else f"{size:,}" if isinstance(size, int) else str(size)
            table.add_row(name.removesuffix("_bytes").replace("_", " "), escape(shown))
        console.print(table, soft_wrap=False)
        if verify:
            with console.status("Reading ..."):
                opened.verify()
            console.print("[green]All is as it was written.[/]")


@index_app.command()
def compact(
    index: Folder,
    keep_days: Annotated[float, typer.Option(min=0, help="Forget versions that are older.")] = 7.0,
) -> None:
    """Merge small files, drop deleted rows and old versions, make the files again that searching reads."""
    with clear_errors():
        opened = CandidateIndex.load(index)
        opened.compact(timedelta(days=keep_days), show_progress_bar=True)
        console.print(f"[green]{len(opened):,} candidates,[/] version {opened.store.version}")


@index_app.command("push")
def push_index(
    index: Folder,
    repo_id: Annotated[str, typer.Argument(help="A data set on the Hub: organisation/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
) -> None:
    """Upload an index to the Hub as a data set, with a card."""
    with clear_errors():
        url = CandidateIndex.load(index).push_to_hub(repo_id, private=private or None)
        console.print(f"[green]Pushed to[/] {escape(url)}")


def _opened(index: Path, model: str | None, device: str | None) -> CandidateIndex:
    """With its model."""
    known = model or CandidateIndex.load(index).store.model
    if known is None:
        raise ValueError("The index does not say which model it was built with: name it with --model.")
    loaded: Any = load_model(known, device=device)
    return CandidateIndex.load(index, loaded)
