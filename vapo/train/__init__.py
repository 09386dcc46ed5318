"""Policy and critic: models, batches, updates."""
