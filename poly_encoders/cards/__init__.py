"""Model cards: the README.md that is saved beside a model, from the templates in hub_cards/."""

from poly_encoders.cards.card_data import BiEncoderModelCardData, CrossEncoderModelCardData, PolyEncoderModelCardData
from poly_encoders.cards.card_saving import WithCard
from poly_encoders.cards.card_text import CARD

__all__ = ["CARD", "BiEncoderModelCardData", "CrossEncoderModelCardData", "PolyEncoderModelCardData", "WithCard"]
