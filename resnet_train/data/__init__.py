"""The data sets, and their batches on the training device."""
