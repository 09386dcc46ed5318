"""Accuracy on held-out problems."""
