"""The first critic, trained on the fixed policy."""
