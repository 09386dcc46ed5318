"""The metrics of a run as TensorBoard events, without torch or TensorFlow."""

import logging
from pathlib import Path
from typing import Any


class EventFile:
    """One event file in `folder`, in place of those that were there: tag "stage/name", step = iteration."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        for old in folder.glob("events.*"):
            old.unlink()
        self._writer = EventFileWriter(str(folder), flush_secs=10)

    def add(self, row: dict[str, Any]) -> None:
        """Add one row of HISTORY: iteration, stage, name, value."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        value = Summary.Value(tag=f"{row['stage']}/{row['name']}", simple_value=row["value"])
        self._writer.add_event(Event(step=row["iteration"], summary=Summary(value=[value])))

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


def write_events(folder: Path, history: list[dict[str, Any]]) -> None:
    """Replace the event files in `folder` by one that holds all rows of HISTORY, cached stages included."""
    events = EventFile(folder)
    for row in history:
        events.add(row)
    events.close()
