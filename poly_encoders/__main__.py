"""`python -m poly_encoders` is the `poly-encoders` command."""

from poly_encoders.cli import app

app(prog_name="poly-encoders")
