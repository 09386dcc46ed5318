"""The command of a task without a shell: what kfp has `sh` do, Python does, which is there anyway.

kfp's command is `sh -ec SCRIPT SOURCE --executor_input ...`: the script writes the component's source into a temporary
folder and starts kfp's executor on it. An image needs no shell for ours; the folder goes when the task ends; and a
signal reaches the stage, where a shell between would keep it for itself.
"""

from collections.abc import Sequence

LIGHTWEIGHT = "kfp.dsl.executor_main"  # also what kfp.local knows the command by
PROGRAM = f"""\
import os, sys, tempfile
from pathlib import Path
os.environ["_KFP_RUNTIME"] = "true"
from {LIGHTWEIGHT} import executor_main
with tempfile.TemporaryDirectory() as folder:
    module = Path(folder, "ephemeral_component.py")
    module.write_text(sys.argv[1], encoding="utf-8")
    sys.argv[1:2] = ["--component_module_path", str(module)]
    executor_main()
"""


def without_shell(command: Sequence[str]) -> list[str]:
    """The command that does the same with Python alone; it takes the same arguments.

    Raises:
        ValueError: it is not kfp's for a lightweight Python component, or one that installs packages first.
    """
    match command:
        case ["sh", "-ec", script, source] if LIGHTWEIGHT in script and "pip install" not in script:
            return ["python3", "-c", PROGRAM, source]
    raise ValueError(f"not the command of a lightweight component that installs nothing: {command}")
