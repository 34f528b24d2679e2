"""Saving a card beside a model without losing what a user wrote into it."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.util import load_file_path

from poly_encoders.cards.data import CURVE
from poly_encoders.cards.user_text import with_user_text
from poly_encoders.model_files import CARD

logger = logging.getLogger(__name__)


class WithCard:
    """A model that saves a card of ours; goes before upstream's class.

    The card that is saved is what the template makes of the model, with all that a user changed in the README.md of the
    folder or, where there is none, in that of the checkpoint that the model was loaded from.
    """

    model_card_data_class: Any
    model_card_data: Any
    _model_card_text: str | None  # upstream's: the card of the checkpoint that was loaded

    def __init__(self, model_name_or_path: str | None = None, **kwargs: Any) -> None:
        self._is_ours = False
        if kwargs.get("model_card_data") is not None:
            kwargs["model_card_data"] = self.model_card_data_class.of_upstream(kwargs["model_card_data"])
        super().__init__(model_name_or_path, **kwargs)  # type: ignore[call-arg]
        if not self._is_ours or model_name_or_path is None:
            self._model_card_text = None  # another model's card, whose encoder this one only starts from
            return
        folder = Path(model_name_or_path)
        is_local = folder.is_dir()
        self._revision = kwargs.get("revision")
        self.model_card_data.adopt(
            self._model_card_text, None if is_local else model_name_or_path, folder / CURVE if is_local else None
        )

    def _parse_model_config(self, model_config: dict[str, Any]) -> None:
        super()._parse_model_config(model_config)  # type: ignore[misc]
        self._is_ours = model_config.get("model_type") == "PolyEncoder" or "poly_encoders" in model_config

    def _create_model_card(self, path: str, model_name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Write README.md to the folder `path`. A card that cannot be made is logged, and the save goes on."""
        data, folder = self.model_card_data, Path(path)
        if model_name and not data.model_id and model_name.count("/") == 1 and not Path(model_name).exists():
            data.set_model_id(model_name)
        try:
            old = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else self._model_card_text
            notes = {"id": data.model_id or (None if data.trained else data.loaded_id)}
            notes |= {} if data.generate_widget_examples else {"examples": False}
            card = with_user_text(
                generate_model_card(self),
                old,
                trained=data.trained,
                said=data.said(),
                notes={name: value for name, value in notes.items() if value is not None},
            )
        except Exception:
            logger.exception("The model's card could not be made; all the rest is saved.")
            return
        beside = folder / f".{CARD}.{os.getpid()}"  # so that no failure leaves half a card
        beside.write_text(card, encoding="utf-8", newline="\n")
        beside.replace(folder / CARD)
        if f"({CURVE})" in card:
            self._save_curve(folder)

    def _save_curve(self, folder: Path) -> None:
        """Put the plot that the card shows beside it."""
        data = self.model_card_data
        source = data.curve
        if source is None and data.loaded_id is not None:
            try:
                source = load_file_path(data.loaded_id, CURVE, revision=self._revision)
            except Exception as error:  # whatever a network may have
                logger.info("The curve of the evaluations could not be fetched from %s: %s", data.loaded_id, error)
        if source is not None and Path(source).is_file() and not (folder / CURVE).exists():
            shutil.copyfile(source, folder / CURVE)
