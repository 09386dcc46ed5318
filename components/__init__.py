"""Kubeflow components, one folder per stage: an interface whose body is an import and one call."""
