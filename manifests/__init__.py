"""What a cluster needs, as kustomize; `python -m manifests.check` renders and checks it without one."""
