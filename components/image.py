"""The image that components name until a recipe's own replaces it in the compiled pipeline."""

IMAGE = "python-vapo"
