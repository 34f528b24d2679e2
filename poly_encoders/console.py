"""What commands share: where they print, and how they show errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

Device = Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda:0.")]


@contextmanager
def clear_errors(device: str | None = None) -> Iterator[None]:
    """Show what a user can mend, a `device` that is not here too, as a message; other errors keep their traceback."""
    try:
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"There is no {device}: PyTorch finds no CUDA device. Leave --device out, or give cpu.")
        yield
    except (ValueError, OSError) as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error) or type(error).__name__)}", highlight=False)
        raise typer.Exit(1) from error
