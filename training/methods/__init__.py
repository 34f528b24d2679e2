"""How a model learns: losses, pre-training, hard negatives, teachers, low-rank adapters."""
