"""Training and held-out prompts, and worked examples for the base model."""
