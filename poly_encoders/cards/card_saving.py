"""Saving a card beside a model: written anew where it is ours, left alone where a person has a hand in it."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.util import load_file_path

from poly_encoders.cards.card_data import CURVE
from poly_encoders.cards.card_text import CARD, is_generated, signed
from poly_encoders.saving import replace_file

logger = logging.getLogger(__name__)


class WithCard:
    """A model that saves a card of ours; goes before upstream's class.

    A card that a person wrote or edited stays: the one in the folder, else the one that the model was loaded with,
    until the model is trained.
    """

    model_card_data_class: Any
    model_card_data: Any
    _model_card_text: str | None  # upstream's: the card of the checkpoint that was loaded
    _curve: str | None  # the picture in it

    def __init__(self, model_name_or_path: str | None = None, **kwargs: Any) -> None:
        self._is_ours, self._curve = False, None
        if kwargs.get("model_card_data") is not None:
            kwargs["model_card_data"] = self.model_card_data_class.of_upstream(kwargs["model_card_data"])
        super().__init__(model_name_or_path, **kwargs)  # type: ignore[call-arg]
        if not self._is_ours or model_name_or_path is None:
            self._model_card_text = None  # another model's card, whose encoder this one only starts from
            return
        card = self._model_card_text or ""
        hub = {
            name: kwargs[name] for name in ("token", "cache_folder", "revision", "local_files_only") if name in kwargs
        }
        with suppress(OSError):  # no model is lost for a picture
            self._curve = load_file_path(model_name_or_path, CURVE, **hub) if f"({CURVE})" in card else None
        self.model_card_data.adopt(card, None if Path(model_name_or_path).is_dir() else model_name_or_path)

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        super()._parse_model_config(model_config)  # type: ignore[misc]
        self._is_ours = model_config.get("model_type") == "PolyEncoder" or "poly_encoders" in model_config

    def _create_model_card(self, path: str, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write README.md to the folder `path`. A card that cannot be made is logged, and the save goes on."""
        data, file = self.model_card_data, Path(path, CARD)
        if model_name and not data.model_id and model_name.count("/") == 1 and not Path(model_name).exists():
            data.set_model_id(model_name)
        card = file.read_text(encoding="utf-8") if file.is_file() else ""
        if not card.strip() and not data.trained:
            card = self._model_card_text or ""
        if card.strip() and not is_generated(card):
            logger.warning("The model's README.md was written or edited by hand, so it stays as it is.")
        else:
            try:
                card = signed(generate_model_card(self))
            except Exception:
                logger.exception("The model's card could not be made; all the rest is saved.")
                return
        replace_file(file, card)
        curve, picture = data.curve if data.trained else self._curve, file.with_name(CURVE)
        if f"({CURVE})" in card and curve is not None and Path(curve).is_file() and not picture.exists():
            shutil.copyfile(curve, picture)
