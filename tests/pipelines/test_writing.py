"""What is written is what was given, and short things stand on one line."""

from __future__ import annotations

import pytest
import yaml

from pipelines.writing import as_yaml


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"b": {"y": 1, "x": 2}, "a": [1, {"z": ""}]}, "{a: [1, {z: ''}], b: {x: 2, y: 1}}\n"),
        ({"a": {"x": "l" * 60}, "b": {"x": "m" * 60}}, f"a: {{x: {'l' * 60}}}\nb: {{x: {'m' * 60}}}\n"),
        ({"a": "two\nlines", "b": "1.0", "c": "{{$}}"}, "{a: 'two\n\n    lines', b: '1.0', c: '{{$}}'}\n"),
    ],
)
def test_short_mappings_are_one_line(document: dict[str, object], text: str) -> None:
    assert as_yaml([document]) == text
    assert yaml.safe_load(text) == document


def test_all_documents_come_back() -> None:
    shared = {"x": ["v" * 30] * 5}
    documents = [{"a": shared, "b": shared}, {"platforms": {}}]
    text = as_yaml(documents)
    assert list(yaml.safe_load_all(text)) == documents
    assert "&" not in text  # a person would have to look up what *id001 is
