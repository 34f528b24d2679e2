"""The card of a pre-trained encoder, which is no sentence-transformers model and so has none of its own."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from poly_encoders.cards.data import PLACEHOLDER
from poly_encoders.model_files import CARD

_TAGS = ["poly-encoder", "arxiv:1905.01969", "pre-training"]


def write_card(
    folder: str | Path,
    model_id: str | None,
    base_model: str | None,
    cross_encoder: str,
    language: str | Sequence[str] | None = None,
    license: str | None = None,  # noqa: A002 - the key's name
    tags: str | Sequence[str] | None = None,
) -> None:
    """Write README.md, unless there is one: it holds no figures that could be out of date.

    Args:
        folder: Where the encoder is saved.
        model_id: What its snippets load.
        base_model: The checkpoint that it was trained from; named where it is no folder.
        cross_encoder: Name of the folder within that has the Cross-encoder.
        language, license, tags: For the metadata.
    """
    path = Path(folder, CARD)
    if path.exists():
        return
    if base_model is not None and (not base_model or Path(base_model).exists()):
        base_model = None
    data = ModelCardData(
        language=language if language is None or isinstance(language, str) else list(language),
        license=license,
        library_name="transformers",
        pipeline_tag="fill-mask",
        base_model=base_model,
        tags=[*_TAGS, *([tags] if isinstance(tags, str) else tags or [])],
    )
    template = str(files("poly_encoders.hub_cards") / "pretrained_encoder.md")
    card = ModelCard.from_template(
        data, template_path=template, model_id=model_id or PLACEHOLDER, cross_encoder=cross_encoder
    )
    path.write_text(str(card), encoding="utf-8")
