"""Card templates: data files, rendered by poly_encoders.cards."""
