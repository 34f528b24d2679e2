"""Templates of cards, rendered by poly_encoders.cards, and the Space in space/."""
