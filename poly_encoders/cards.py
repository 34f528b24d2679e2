"""Model cards: the README.md that is saved beside a model, from the templates in hub_cards/."""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

_PAPER_TAGS = ["poly-encoder", "arxiv:1905.01969"]

_CONTEXT = ["Hi! Have you been here before?", "No, it's my first time. Is the coffee any good?"]
_CANDIDATES = ["The best in town, try the espresso.", "My brother works as a plumber.", "It opens at nine on Sundays."]


@dataclass
class PolyEncoderModelCardData(SentenceTransformerModelCardData):
    """Card data of a `PolyEncoder`; parameters as for `SentenceTransformerModelCardData`."""

    task_name: str = "ranking replies, passages or labels for a context"
    tags: list[str] = field(default_factory=lambda: [*_PAPER_TAGS, "sentence-transformers", "sentence-similarity"])
    template_path: Path = field(
        default=Path(str(files("poly_encoders.hub_cards") / "poly_encoder.md")), init=False, repr=False
    )

    def run_usage_snippet(self) -> None:
        """Rank the example, so that the card shows what its snippet prints."""
        ranking = self.model.rank(_CONTEXT, _CANDIDATES)
        self.similarities = "\n".join(f"# {entry['score']:.2f}  {_CANDIDATES[entry['corpus_id']]}" for entry in ranking)

    def generate_usage_snippet(self) -> str:
        """The Python block of the card; it runs as printed."""
        lines = [
            "from poly_encoders import PolyEncoder",
            "",
            f'model = PolyEncoder("{self.model_id or "path/to/this/model"}")',
            f"context = {_CONTEXT!r}",
            f"candidates = {_CANDIDATES!r}",
            "for entry in model.rank(context, candidates, return_documents=True):",
            "    print(f\"{entry['score']:.2f}  {entry['text']}\")",
            self.similarities or "",
        ]
        return "```python\n" + "\n".join(lines).rstrip() + "\n```"

    def get_model_specific_metadata(self) -> dict[str, Any]:
        metadata = super().get_model_specific_metadata()
        config = self.model[0].config
        return metadata | {"config": config, "similarity_fn_name": "attention over the context vectors"}
