"""Rewards from a grader that reads the responses."""
