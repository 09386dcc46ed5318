"""What the next segment starts from."""
