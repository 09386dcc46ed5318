"""A lineage as one HTML page: stages in the order they ran, their artifacts, who used them; a click shows a record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from vapo.lineage.graph import Graph, Node

ROW, COLUMN, LEFT, TOP = 44, 134, 104, 64  # pixels: of a stage's row, of a column, of the margin for iterations
BOX = 116  # width of a stage
SHARED = ("section", "libraries", "host", "metrics")  # of a record: equal ones of several stages are written once
ORDER = (
    *("problems", "base_model", "rollout", "verification", "value_pretraining", "advantages", "ppo_update"),
    *("evaluation", "history", "report"),
)

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #1c2024; --soft: #59616b; --line: #c3c9d0;
  --blue: #1f6fb2; --tint: #e4eff8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1b1f23; --ink: #e7e9eb; --soft: #a3abb4;
  --line: #47505a; --blue: #62a9e6; --tint: #20364a; } }
* { box-sizing: border-box; }
body { margin: 0; height: 100vh; display: grid; grid-template-rows: auto minmax(0, 1fr); background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
header { padding: 20px 24px 12px; }
h1 { font-size: 1.4rem; margin: 0 0 4px; font-weight: 640; }
header p { margin: 0; color: var(--soft); }
main { display: grid; grid-template-columns: minmax(0, 3fr) minmax(280px, 2fr); min-height: 0;
  border-top: 1px solid var(--line); }
.graph { overflow: auto; }
aside { overflow: auto; padding: 16px 20px; background: var(--card); border-left: 1px solid var(--line); }
aside h2 { font-size: 1rem; margin: 0 0 8px; }
pre { font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
text { fill: var(--ink); font: 12px system-ui, sans-serif; }
.head, .when { fill: var(--soft); }
.edge { fill: none; stroke: var(--line); stroke-width: 1; }
.stage rect { fill: var(--card); stroke: var(--line); }
.stage, .artifact { cursor: pointer; }
.artifact circle { fill: var(--soft); }
.led rect { fill: var(--tint); stroke: var(--blue); }
.led circle { fill: var(--blue); }
.edge.led { stroke: var(--blue); stroke-width: 1.5; }
.chosen rect { stroke-width: 3; }
.chosen circle { r: 6px; }
.faint { opacity: 0.25; }
:focus-visible { outline: 2px solid var(--blue); }
@media (max-width: 800px) { main { grid-template-columns: 1fr; grid-template-rows: 3fr 2fr; }
  aside { border-left: 0; border-top: 1px solid var(--line); } }
"""

SCRIPT = """
const {shared, records} = JSON.parse(document.getElementById("records").textContent);
for (const record of Object.values(records)) {
  for (const [name, number] of Object.entries(record.shared)) record[name] = shared[number];
  delete record.shared;
}
const parents = Object.fromEntries(Object.entries(records).map(
  ([digest, record]) => [digest, Object.values(record.inputs).map(source => source.record)]));
function led(digest) {
  const found = new Set(), left = [digest];
  while (left.length) {
    const next = left.pop();
    if (!(next in records) || found.has(next)) continue;
    found.add(next);
    left.push(...parents[next]);
  }
  return found;
}
function choose(element) {
  const digest = element.dataset.record, output = element.dataset.output, record = records[digest];
  const all = led(digest);
  document.querySelectorAll("[data-record]").forEach(e => {
    e.classList.toggle("led", all.has(e.dataset.record));
    e.classList.toggle("faint", !all.has(e.dataset.record));
    e.classList.toggle("chosen", e === element);
  });
  document.querySelectorAll(".edge").forEach(e => {
    const through = all.has(e.dataset.to) && all.has(e.dataset.from);
    e.classList.toggle("led", through);
    e.classList.toggle("faint", !through);
  });
  const shown = output ? record.outputs[output] : record;
  document.getElementById("name").textContent = (output ? output + ", made by " : "") + element.dataset.name;
  document.getElementById("record").textContent = JSON.stringify(shown, null, 2);
}
document.querySelectorAll("[data-record]").forEach(element => {
  element.addEventListener("click", () => choose(element));
  element.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") choose(element); });
});
"""


def page(graph: Graph) -> str:
    """The page as text; it needs nothing besides itself. Newest at the bottom, a column for each stage."""
    nodes = sorted(graph.nodes, key=lambda node: (node.record.started, node.digest))
    columns = [s for s in ORDER if any(n.record.stage == s for n in nodes)]
    columns += sorted({n.record.stage for n in nodes} - set(columns))
    at = {
        node.digest: (LEFT + COLUMN * columns.index(node.record.stage), TOP + ROW * i) for i, node in enumerate(nodes)
    }
    heads = "".join(
        f'<text class="head" x="{LEFT + COLUMN * i}" y="28">{escape(stage)}</text>' for i, stage in enumerate(columns)
    )
    edges = "".join(_edges(node, at, {n.digest: n for n in nodes}) for node in nodes)
    drawn = "".join(_stage(node, at[node.digest]) for node in nodes)
    marks, before = "", None
    for node in nodes:
        when = node.record.iteration if "iteration" in node.record.parameters else None
        if when is not None and when != before:
            y = at[node.digest][1]
            marks += f'<text class="when" x="12" y="{y + 5}">iteration {when}</text>'
            before = when
    width, height = LEFT + COLUMN * len(columns) + 20, TOP + ROW * len(nodes)
    records = json.dumps(_compact(nodes), separators=(",", ":")).replace("<", "\\u003c")
    unknown = f" {len(graph.unknown)} inputs come from elsewhere." if graph.unknown else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Lineage of {escape(graph.target)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>Lineage of {escape(graph.target)} {graph.sha256[:12]}</h1>"
        f"<p>{len(nodes)} stages led to it. A box is a stage, a dot an artifact of it: click one to see its record "
        f"and, in blue, all that led to it.{unknown}</p></header>"
        f'<main><div class="graph"><svg width="{width}" height="{height}" role="group" aria-label="the graph">'
        f"{heads}{marks}{edges}{drawn}</svg></div>"
        '<aside><h2 id="name">Nothing chosen yet</h2><pre id="record"></pre></aside></main>'
        f'<script type="application/json" id="records">{records}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _compact(nodes: Iterable[Node]) -> dict[str, Any]:
    """The records by digest; what SHARED names stands once in a list, and each record's `shared` says where."""
    shared: dict[str, int] = {}
    records = {}
    for node in nodes:
        record = node.record.model_dump(mode="json", exclude={"parents"})  # the inputs say them
        for part in (*record["inputs"].values(), *record["outputs"].values()):
            if part["uri"]:
                del part["path"]
        parts = {name: json.dumps(record.pop(name), separators=(",", ":")) for name in SHARED}
        record["shared"] = {name: shared.setdefault(text, len(shared)) for name, text in parts.items()}
        records[node.digest] = record
    return {"shared": [json.loads(text) for text in shared], "records": records}


def _dots(node: Node, x: int, y: int) -> dict[str, tuple[int, int]]:
    """Where the artifacts of a stage stand: below its box, from left to right."""
    return {name: (x + 10 + 16 * i, y + 22) for i, name in enumerate(sorted(node.record.outputs))}


def _stage(node: Node, place: tuple[int, int]) -> str:
    x, y = place
    data = f'data-record="{node.digest}" data-name="{escape(node.name)}" tabindex="0" role="button"'
    label = node.record.purpose or node.record.stage.replace("_", " ")
    dots = "".join(
        f'<g class="artifact" {data} data-output="{escape(name)}"><title>{escape(name)}</title>'
        f'<circle cx="{cx}" cy="{cy}" r="4"/></g>'
        for name, (cx, cy) in _dots(node, x, y).items()
    )
    return (
        f'<g class="stage" {data}><title>{escape(node.name)}</title>'
        f'<rect x="{x}" y="{y - 12}" width="{BOX}" height="26" rx="6"/>'
        f'<text x="{x + 9}" y="{y + 5}">{escape(label[:17])}</text></g>{dots}'
    )


def _edges(node: Node, at: Mapping[str, tuple[int, int]], by_digest: Mapping[str, Node]) -> str:
    drawn = ""
    for source in node.record.inputs.values():
        maker = by_digest.get(source.record)
        if maker is None:
            continue
        dots = _dots(maker, *at[maker.digest])
        name = next((n for n, p in maker.record.outputs.items() if p.sha256 == source.sha256), next(iter(dots)))
        (x1, y1), (x2, y2) = dots[name], at[node.digest]
        x2 += BOX // 2
        drawn += (
            f'<path class="edge" data-from="{maker.digest}" data-to="{node.digest}" '
            f'd="M{x1} {y1} C{x1} {y1 + 26} {x2} {y2 - 40} {x2} {y2 - 12}"/>'
        )
    return drawn
