"""avg@k, pass@k and cons@k on held-out problems, with confidence intervals."""
