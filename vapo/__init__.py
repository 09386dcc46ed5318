"""VAPO (Value-based Augmented PPO, arXiv 2504.05118) as a declarative Kubeflow pipeline."""

__version__ = "0.1.0"
