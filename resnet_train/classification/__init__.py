"""Image classification: the training step, evaluation and prediction (sections 3 and 4)."""
