"""The card of a pre-trained encoder, which is no sentence-transformers model and so has none of its own."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from poly_encoders.cards.card_text import CARD, PLACEHOLDER, is_generated, signed


def write_card(
    folder: str | Path,
    model_id: str | None,
    base_model: str | None,
    cross_encoder: str,
    language: Any = None,
    license: str | None = None,  # noqa: A002 - the key's name
    tags: Any = None,
) -> None:
    """Write README.md, unless a person wrote or edited the one that is there.

    Args:
        folder: Where the encoder is saved.
        model_id: What its snippets load.
        base_model: The checkpoint that it was trained from; named where it is no folder.
        cross_encoder: Name of the folder within that has the Cross-encoder.
        language, license, tags: For the metadata; a text, or a list where there are several.
    """
    path = Path(folder, CARD)
    if path.exists() and not is_generated(path.read_text(encoding="utf-8")):
        return
    base_model = None if not base_model or Path(base_model).exists() else base_model
    all_tags = ["poly-encoder", "arxiv:1905.01969", "pre-training", *([tags] if isinstance(tags, str) else tags or [])]
    data = ModelCardData(language=language, license=license, library_name="transformers", pipeline_tag="fill-mask")
    data.base_model, data.tags = base_model, all_tags
    text = (files("poly_encoders.hub_cards") / "pretrained_encoder.md").read_text(encoding="utf-8")
    values: dict[str, Any] = {"model_id": model_id or PLACEHOLDER, "cross_encoder": cross_encoder}
    card = ModelCard.from_template(data, template_str=text, base_model=base_model, **values)
    path.write_text(signed(str(card)), encoding="utf-8")
