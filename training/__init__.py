"""How a checkpoint is made: data, trainers, the training script and the quick start."""
