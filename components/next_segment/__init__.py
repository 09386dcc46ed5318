"""Who starts the next run of a chain."""
