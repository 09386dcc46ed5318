"""The first policy, trained here or taken from a local folder."""
