"""Prompts and graders."""
