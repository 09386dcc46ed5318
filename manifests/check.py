"""`make manifests`: renders every overlay offline and says what a cluster would refuse, or what would never work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from manifests.network import network_faults
from manifests.pod_security import pod_faults
from manifests.references import reference_faults
from manifests.render import ROOT, Object, kustomizations, rendered
from manifests.schemas import schema_faults


def faults(objects: list[Object], alone: bool = True) -> Iterator[str]:
    """All that is wrong with objects that are applied together; alone: nothing else is there already."""
    wrong = [fault for thing in objects for fault in schema_faults(thing)]
    yield from wrong
    if not wrong:  # the other checks read fields that a schema promises
        for thing in objects:
            yield from pod_faults(thing)
        yield from reference_faults(objects, alone=alone)
        yield from network_faults(objects)


def main(root: Path = ROOT) -> int:
    """Exit code: 0 all is well, 1 what is wrong was said, a line for each fault."""
    status = 0
    for folder in kustomizations(root):
        try:
            objects = rendered(folder)
            wrong = list(faults(objects, alone=folder.name != "files"))
        except RuntimeError as error:
            objects, wrong = [], [str(error)]
        sys.stdout.write(f"{folder.relative_to(root)}: {len(objects)} objects, {len(wrong)} faults\n")
        sys.stdout.writelines(f"  {fault}\n" for fault in wrong)
        status |= bool(wrong)
    return status


if __name__ == "__main__":
    sys.exit(main())
