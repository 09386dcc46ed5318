"""Accuracy on held-out problems, and how sure it is."""
