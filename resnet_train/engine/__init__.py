"""The engine: a run's directory from its first file to its last, the loop around a task's step, and what they need."""
