"""What may be asked for, and whether it can be had; checked before torch is imported."""
