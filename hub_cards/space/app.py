"""A Space with poly-encoders' demo. It shows MODEL, or the model that the Space's variable MODEL_ID names."""

import os

from poly_encoders.cli import app

MODEL = "org/poly-encoder"

if __name__ == "__main__":
    app(["demo", os.environ.get("MODEL_ID", MODEL)])
