"""The pipelines, how they are compiled, and how one is run on this machine."""
