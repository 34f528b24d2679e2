"""The page that ranks candidates for a dialogue and shows what a Poly-encoder looks at."""
