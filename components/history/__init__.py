"""The metrics of every stage so far, handed on from iteration to iteration."""
