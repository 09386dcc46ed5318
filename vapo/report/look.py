"""How the page looks and moves: its stylesheet and its script, kept in Python so that every package carries them."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c2024; --soft: #59616b; --grid: #e3e5e8;
  --blue: #1f6fb2; --orange: #bf5f00; --green: #14866d; --purple: #8a5aa8; --sky: #62a8d8; --red: #b8473d;
  --yellow: #b99a1c; --grey: #8b929b;
  --up: 70 150 220; --down: 240 145 50;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f23; --ink: #e7e9eb; --soft: #a3abb4; --grid: #333a41;
    --blue: #62a9e6; --orange: #f0994a; --green: #45b99c; --purple: #b995d3; --sky: #9cc9e8; --red: #e27c71;
    --yellow: #d9bd4e; --grey: #8b929b;
    --up: 32 104 176; --down: 178 88 8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 12px; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 1.3rem; margin: 64px 0 4px; font-weight: 620; }
h3 { font-size: 0.95rem; margin: 0; font-weight: 620; }
.lead { font-size: 1.12rem; max-width: 46em; margin: 0; }
.about { color: var(--soft); max-width: 46em; margin: 0 0 20px; }
.grid { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.grid.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
.wide { grid-column: 1 / -1; }
.card {
  min-width: 0; margin: 0; padding: 18px 18px 12px; background: var(--card); border: 1px solid var(--grid);
  border-radius: 8px;
}
figcaption p { margin: 2px 0 8px; color: var(--soft); font-size: 0.84rem; line-height: 1.4; }
figure.card { display: flex; flex-direction: column; }
.plot { width: 100%; min-width: 0; overflow: hidden; margin-top: auto; }
.scroll { overflow-x: auto; margin-top: 20px; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--grid); font-weight: 400; }
thead th { color: var(--soft); font-size: 0.82rem; white-space: nowrap; }
th:first-child { text-align: left; }
thead th:first-child { padding-left: 0; }
tbody th:first-child { padding-left: 18px; text-indent: -18px; }
.interval { color: var(--soft); white-space: nowrap; }
.after { margin-top: 20px; }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 2px; }
.when { position: absolute; opacity: 0; }
.tab {
  display: inline-block; padding: 6px 14px; margin: 0 8px 16px 0; border: 1px solid var(--grid); border-radius: 999px;
  cursor: pointer; font-size: 0.9rem; color: var(--soft);
}
.panel { display: none; }
#when-0:checked ~ .panel-0, #when-1:checked ~ .panel-1 { display: grid; }
#when-0:checked ~ [for="when-0"], #when-1:checked ~ [for="when-1"] {
  background: var(--ink); border-color: var(--ink); color: var(--page);
}
.when:focus-visible + .tab { outline: 2px solid var(--blue); outline-offset: 2px; }
.legend {
  display: flex; align-items: center; gap: 10px; margin: 0 0 16px; font-size: 0.84rem; color: var(--soft);
  font-variant-numeric: tabular-nums;
}
.legend i {
  width: 160px; height: 12px; border-radius: 2px; border: 1px solid var(--grid);
  background: linear-gradient(to right, rgb(var(--down)), transparent, rgb(var(--up)));
}
.response header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; margin-bottom: 8px; }
.verdict { font-weight: 620; }
.verdict.right { color: var(--blue); }
.verdict.wrong { color: var(--orange); }
.id { color: var(--soft); font-size: 0.76rem; overflow-wrap: anywhere; }
code, pre, .prompt, .tokens { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
dl { display: flex; flex-wrap: wrap; gap: 4px 15px; margin: 0 0 12px; font-size: 0.84rem; }
dl div { display: flex; gap: 6px; min-width: 0; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.prompt, .tokens { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem; }
.prompt {
  margin: 0 0 10px; padding-left: 10px; border-left: 3px solid var(--grid); color: var(--soft); line-height: 1.5;
  max-height: 9em; overflow-y: auto;
}
.tokens { margin: 0 0 14px; line-height: 1.85; max-height: 34em; overflow-y: auto; }
.t { padding: 2px 0; border-radius: 2px; cursor: default; }
.t.up { background: rgb(var(--up) / var(--a)); }
.t.down { background: rgb(var(--down) / var(--a)); }
.t.at { outline: 1.5px solid var(--ink); }
.gap { color: var(--soft); }
.curve { display: flex; gap: 6px; }
.labels { position: relative; flex: 0 0 34px; height: 84px; }
.labels span {
  position: absolute; right: 0; transform: translateY(-50%); font-size: 0.72rem; color: var(--soft); line-height: 1;
  font-variant-numeric: tabular-nums;
}
.area { position: relative; flex: 1; min-width: 0; }
svg { display: block; width: 100%; height: 84px; overflow: visible; }
svg.bars { height: 30px; margin-top: 6px; }
svg line, svg polyline { fill: none; vector-effect: non-scaling-stroke; }
.zero { stroke: var(--grid); }
polyline.value { stroke: var(--ink); stroke-width: 1.5; }
polyline.target { stroke: var(--green); stroke-width: 1.5; stroke-dasharray: 5 4; }
path.up { fill: rgb(var(--up)); }
path.down { fill: rgb(var(--down)); }
.cursor {
  position: absolute; inset: 0 auto 0 calc(var(--at, 0) * 100%); width: 1px; background: var(--soft); opacity: 0;
  pointer-events: none;
}
.pointed .cursor { opacity: 1; }
.key { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 8px 40px; font-size: 0.74rem; color: var(--soft); }
.key span::before {
  content: ""; display: inline-block; width: 16px; margin-right: 5px; vertical-align: middle;
  border-top: 1.5px solid var(--ink);
}
.key .target::before { border-top: 1.5px dashed var(--green); }
.key .bars::before {
  height: 8px; border: 0; background: linear-gradient(to right, rgb(var(--down)) 50%, rgb(var(--up)) 50%);
}
details summary { cursor: pointer; color: var(--soft); font-size: 0.84rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem; margin: 10px 0 0; }
#tip {
  position: fixed; z-index: 9; padding: 8px 10px; border-radius: 6px; background: var(--ink); color: var(--page);
  font-size: 0.78rem; line-height: 1.45; white-space: pre; pointer-events: none; font-variant-numeric: tabular-nums;
}
#tip[hidden] { display: none; }
footer { margin-top: 64px; color: var(--soft); font-size: 0.84rem; }
@media (max-width: 560px) {
  main { padding: 28px 14px 64px; }
  h1 { font-size: 1.6rem; }
  h2 { margin-top: 48px; }
  .card { padding: 14px 12px 10px; }
  table { font-size: 0.82rem; }
  th, td { padding-left: 4px; padding-right: 4px; }
}
"""

SCRIPT = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];

  // A string "--name" in a figure is a CSS variable, so charts and page share one palette in light and dark.
  const painted = (part, style) =>
    typeof part === "string" ? (part.startsWith("--") ? style.getPropertyValue(part).trim() : part)
    : Array.isArray(part) ? part.map(item => painted(item, style))
    : part && typeof part === "object"
      ? Object.fromEntries(Object.entries(part).map(([key, value]) => [key, painted(value, style)]))
    : part;
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const plot of plots) {
      const figure = painted(figures[plot.dataset.figure], style);
      Plotly.react(plot, figure.data, figure.layout, {responsive: true, displayModeBar: false});
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  // Token and curve point at each other: the tip shows a token's numbers, the cursor its place on the curve.
  const tip = document.getElementById("tip");
  let pointed = null;
  const leave = () => {
    if (pointed) { pointed.classList.remove("at"); pointed.closest(".response").classList.remove("pointed"); }
    pointed = null;
    tip.hidden = true;
  };
  const point = (token, x, y) => {
    if (token !== pointed) {
      leave();
      pointed = token;
      // The title serves readers without this script; beside the tip it would be shown twice.
      if (token.title) { token.dataset.tip = token.title; token.removeAttribute("title"); }
      token.classList.add("at");
      const card = token.closest(".response");
      card.style.setProperty("--at", (Number(token.dataset.i) + 0.5) / Number(card.dataset.n));
      card.classList.add("pointed");
      tip.textContent = token.dataset.tip;
      tip.hidden = false;
    }
    const left = Math.min(x + 14, innerWidth - tip.offsetWidth - 8);
    const above = y - tip.offsetHeight - 14;
    tip.style.left = `${Math.max(left, 8)}px`;
    tip.style.top = `${above < 8 ? y + 18 : above}px`;
  };
  const follow = event => {
    const near = event.target.closest?.(".t, .area");
    if (!near) return leave();
    if (near.classList.contains("t")) return point(near, event.clientX, event.clientY);
    const box = near.getBoundingClientRect(), card = near.closest(".response"), total = Number(card.dataset.n);
    const at = Math.min(Math.max(Math.floor((event.clientX - box.left) / box.width * total), 0), total - 1);
    const token = card.querySelector(`[data-i="${at}"]`);
    if (token) point(token, event.clientX, event.clientY); else leave();
  };
  document.addEventListener("pointermove", follow);
  document.addEventListener("pointerdown", follow);
  document.addEventListener("scroll", leave, {passive: true});
})();
"""
