"""Weights from elsewhere and for elsewhere: import and export."""
