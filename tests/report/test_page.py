"""Properties of the page: it needs nothing besides itself, model text stays text, numbers are the tables' own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vapo.errors import UserError
from vapo.recipe import BaseModelSection, Recipe, Report
from vapo.report.credit import HEAD, TAIL, Scale
from vapo.report.curves import curves, history_of, pretraining_curves
from vapo.report.page import report
from vapo.report.responses import read_responses, token_texts
from vapo.report.samples import HEAD as LONG_HEAD
from vapo.report.samples import TAIL as LONG_TAIL
from vapo.report.samples import choose, expected
from vapo.schemas import EVALUATION, EXPERIENCE, HISTORY, PRETRAINING, PROMPTS, REWARDS, ROLLOUTS
from vapo.tables import offsets_of, read_table, write_table

WORDS = ["start", "?", "answer", "no", "~", "=", *(str(d) for d in range(10)), *(f"#{i}" for i in range(1, 41))]
WORDS += [f"{op}{d}" for op in "+-" for d in (1, 2, 3)] + ["*3", "*7", "*9", "<script>alert(1)</script>", "<eos>"]
IDS = {word: i for i, word in enumerate(WORDS)}
HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>'
VOID = {"meta", "input", "img", "br", "hr", "link", "wbr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def find(self, tag: str, name: str = "") -> Iterator[Element]:
        """All elements inside with this tag and class, in order."""
        for child in self.children:
            if child.tag == tag and (not name or name in child.attributes.get("class", "").split()):
                yield child
            yield from child.find(tag, name)

    def all_text(self) -> str:
        return self.text + "".join(child.all_text() for child in self.children)


class Tree(HTMLParser):
    """The page as a browser would see it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def iteration_tables(folder: Path, iteration: int, p_right: float, prompts: list[str], samples: int) -> dict[str, Path]:
    """ROLLOUTS, REWARDS and EXPERIENCE of one iteration, with a critic that notices mistakes."""
    rng = np.random.default_rng(iteration)
    rollouts: dict[str, list[Any]] = {name: [] for name in ROLLOUTS.names}
    rewards: dict[str, list[Any]] = {name: [] for name in REWARDS.names}
    credit: dict[str, list[Any]] = {name: [] for name in EXPERIENCE.names}
    for at, prompt in enumerate(prompts):
        for sample in range(samples):
            right = bool(rng.random() < p_right)
            steps = int(rng.integers(5, 40))
            words = []
            for i in range(steps):
                words += [f"#{i + 1}", "+2", str(rng.choice(["=", "~"])), str(rng.integers(10))]
            words += ["answer", "7" if right else "3", "<eos>"]
            reward = 1.0 if right else -1.0
            slip = int(rng.integers(len(words)))
            values = np.linspace(0.1, 0.4, len(words)) + rng.normal(0, 0.02, len(words))
            values[slip:] = reward * np.linspace(0.3, 0.9, len(words) - slip)
            advantages = np.append(values[1:], reward) - values
            advantages[0] = 0.0
            name = f"{iteration}/p{at}/{sample}"
            for column, value in {
                "rollout_id": name,
                "prompt_id": f"p{at}",
                "sample_index": sample,
                "seed": at * samples + sample,
                "prompt_tokens": [IDS[w] for w in prompt.split()],
                "response_tokens": [IDS[w] for w in words],
                "rollout_logprobs": -rng.exponential(0.2, len(words)),
                "response": " ".join(words[:-1]) + (HOSTILE if at == 0 else ""),
                "finish_reason": "stop",
            }.items():
                rollouts[column].append(value)
            verdict = "matched" if right else "different"
            extracted = words[-2] if at else HOSTILE
            for column, value in zip(REWARDS.names, (name, right, reward, extracted, verdict), strict=True):
                rewards[column].append(value)
            targets = np.full(len(words), reward)
            for column, value in zip(EXPERIENCE.names, (name, True, 0.8, values, advantages, targets), strict=True):
                credit[column].append(value)
    label = f"{iteration}"
    paths = {name: folder / f"{label}.{name}.arrow" for name in ("rollouts", "rewards", "experience")}
    write_table(paths["rollouts"], ROLLOUTS, rollouts)
    write_table(paths["rewards"], REWARDS, rewards)
    write_table(paths["experience"], EXPERIENCE, credit)
    return paths


def history_rows(iterations: int) -> list[tuple[int, str, str, float]]:
    """What a run leaves in HISTORY."""
    rng = np.random.default_rng(0)
    rows = [(0, "problems", "seconds", 0.8), (0, "base_model", "seconds", 95.0)]
    rows += [(0, "value_pretraining/rollout", "seconds", 6.0), (0, "value_pretraining", "seconds", 31.0)]
    rows += [(0, "value_pretraining", "explained_variance", 0.31)]
    for i in range(iterations + 1):
        done = i / max(iterations, 1)
        if i % 4 == 0 or i == iterations:
            rows += [(i, "evaluation", "accuracy", 0.312 + 0.266 * done)]
            rows += [(i, "evaluation", "pass_at_k", 0.6 + 0.2 * done)]
            rows += [(i, "evaluation/rollout", "seconds", 4.2), (i, "evaluation/verification", "seconds", 0.1)]
        if not i:
            continue
        for stage, values in {
            "rollout": {"length_mean": 80 + 9 * done, "length_max": 230.0, "truncated_share": 0.012 * (1 - done)},
            "verification": {"accuracy": 0.3 + 0.28 * done, "reward_mean": -0.4 + 0.55 * done},
            "advantages": {
                "explained_variance": 0.3 + 0.2 * done,
                "lambda_policy_mean": 0.86 + 0.01 * done,
                "informative_share": 0.7 - 0.1 * done,
                "trained_share": 0.5,
            },
            "ppo_update": {
                "entropy": 0.22 - 0.1 * done,
                "clip_fraction_low": 0.004,
                "clip_fraction_high": 0.006,
                "approx_kl": 0.002,
                "policy_loss": -0.01,
                "positive_lm_loss": 0.2 - 0.06 * done,
                "value_loss": 0.4 - 0.1 * done,
                "padding_share": 0.04,
                "logprob_gap_mean": 2e-7,
                "logprob_gap_max": 4e-6,
            },
        }.items():
            rows += [(i, stage, name, value * float(1 + rng.normal(0, 0.03))) for name, value in values.items()]
        seconds = {"rollout": 5.1, "verification": 0.1, "advantages": 1.3, "ppo_update": 7.4}
        rows += [(i, stage, "seconds", value * float(1 + rng.normal(0, 0.05))) for stage, value in seconds.items()]
    return rows


def write_rows(path: Path, schema: pa.Schema, *columns: Any) -> None:
    write_table(path, schema, dict(zip(schema.names, columns, strict=True)))


def write_history(path: Path, rows: list[tuple[int, str, str, float]]) -> None:
    write_rows(path, HISTORY, *map(list, zip(*rows, strict=True)))


REASONING_GYM = json.dumps({"dataset": "chain_sum", "entry": {"question": "3 + 4", "answer": "7"}})


def build(folder: Path, iterations: int = 4, problems: int = 6, samples: int = 2) -> dict[str, Any]:
    """All inputs of the report in `folder`, as its keyword arguments."""
    ids, family, truth = [f"p{at}" for at in range(problems)], ["chain"] * problems, ["7", REASONING_GYM] * problems
    truth = truth[:problems]
    steps = [5 + 3 * at % 35 for at in range(problems)]
    prompts = [f"start 4 {' '.join(f'#{i + 1} +2' for i in range(step))} ?" for step in steps]
    write_rows(folder / "prompts", PROMPTS, ids, prompts, truth, family, steps)
    correct, length = [max(0, 4 - step // 9) for step in steps], [4.0 * step for step in steps]
    majority = ["7" if count > 1 else "" for count in correct]
    drawn = [4] * problems, correct, [0] * problems, majority, length
    write_rows(folder / "evaluation", EVALUATION, ids, family, steps, *drawn)
    write_history(folder / "history", history_rows(iterations))
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    arguments: dict[str, Any] = {name: folder / name for name in ("history", "prompts", "evaluation")}
    for label, iteration, p_right in (("first", 1, 0.3), ("last", iterations, 0.6)):
        for name, path in iteration_tables(folder, iteration, p_right, prompts, samples).items():
            arguments[f"{label}_{name}"] = path
    (folder / "evaluated").mkdir(exist_ok=True)
    evaluated = iteration_tables(folder / "evaluated", 0, 0.5, prompts, 4)
    arguments |= {f"evaluation_{name}": evaluated[name] for name in ("rollouts", "rewards")}
    arguments["evaluation_prompts"] = folder / "prompts"
    recipe = Recipe(base_model=BaseModelSection(path="base")).model_dump_json()
    return {**arguments, "tokenizer": folder / "tokenizer.json", "recipe": recipe, "page": folder / "report.html"}


def render(arguments: dict[str, Any], **section: Any) -> Element:
    found = report(Report(**section), **arguments)
    assert found == {"bytes": float(arguments["page"].stat().st_size)}
    return Tree(arguments["page"].read_text(encoding="utf-8")).root


def figures_of(root: Element) -> dict[str, list[str]]:
    """Title of every chart -> names of its traces."""
    drawn = json.loads(next(s.text for s in root.find("script") if s.attributes.get("id") == "figures"))
    titles = {}
    for figure in root.find("figure"):
        plot = next(figure.find("div", "plot"))
        traces = drawn[int(plot.attributes["data-figure"])]["data"]
        titles[next(figure.find("h3")).text] = [trace.get("name", "") for trace in traces]
    assert len(titles) == len(drawn)
    return titles


NAN = float("nan")
MEASURES = [  # step, rows, value loss, explained variance
    (0, "held-out", 0.52, NAN),
    (0, "mini-batch", 0.51, NAN),
    (1, "mini-batch", 0.48, -0.02),
    (2, "held-out", 0.45, 0.1),
    (2, "mini-batch", 0.44, NAN),
    (3, "held-out", 0.46, 0.08),
]
LOSS, VARIANCE = "Value-pretraining: value loss", "Value-pretraining: explained variance"


def measures(rows: list[tuple[int, str, float, float]] = MEASURES) -> list[dict[str, Any]]:
    return [dict(zip(PRETRAINING.names, row, strict=True)) for row in rows]


def points_of(figure: Any) -> dict[str, list[tuple[int, float]]]:
    """Curve -> its points."""
    return {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in figure.traces}


def test_curves_of_value_pretraining() -> None:
    loss, variance = pretraining_curves(measures())
    assert (loss.title, variance.title) == (LOSS, VARIANCE)
    assert points_of(loss) == {
        "held-out": [(0, 0.52), (2, 0.45), (3, 0.46)],
        "mini-batch": [(0, 0.51), (1, 0.48), (2, 0.44)],
    }
    for figure in (loss, variance):
        assert figure.layout["xaxis"]["title"]["text"] == "optimiser step"
        assert figure.layout["showlegend"] is True
        assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in figure.traces}) == 2


def test_undefined_explained_variance_is_no_point() -> None:
    """Where all rewards are equal: NaN in PRETRAINING, and nothing that JSON could not hold."""
    _, variance = pretraining_curves(measures())
    assert points_of(variance) == {"held-out": [(2, 0.1), (3, 0.08)], "mini-batch": [(1, -0.02)]}
    never = [(step, rows, loss, NAN) for step, rows, loss, _ in MEASURES]
    assert [figure.title for figure in pretraining_curves(measures(never))] == [LOSS]
    held_out = [(step, rows, loss, v if rows == "held-out" else NAN) for step, rows, loss, v in MEASURES]
    assert set(points_of(pretraining_curves(measures(held_out))[1])) == {"held-out"}
    assert pretraining_curves([]) == []


def test_a_critic_that_was_not_pretrained_has_no_curves() -> None:
    """With max_steps 0 it was measured once."""
    assert pretraining_curves(measures([(0, "held-out", 0.5, -0.1)])) == []
    assert len(pretraining_curves(measures([(0, "held-out", 0.5, -0.1), (1, "held-out", 0.4, 0.1)]))) == 2


def test_page_with_and_without_value_pretraining(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    without = figures_of(render(arguments))
    assert figures_of(render({**arguments, "pretraining": None})) == without
    write_rows(tmp_path / "pretraining", PRETRAINING, *map(list, zip(*MEASURES, strict=True)))
    shown = figures_of(render({**arguments, "pretraining": tmp_path / "pretraining"}))
    both = ["held-out", "mini-batch"]
    assert shown == {**without, LOSS: both, VARIANCE: both}
    assert not {LOSS, VARIANCE} & set(without)


def test_credit_says_what_the_tokens_are_compared_with(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    write_rows(tmp_path / "pretraining", PRETRAINING, *map(list, zip(*MEASURES, strict=True)))
    for pretraining, said, unsaid in (
        (tmp_path / "pretraining", "than the critic expected", "did better than the others to their prompt"),
        (None, "did better than the others to their prompt", "critic"),
    ):
        root = render({**arguments, "pretraining": pretraining})
        about = next(p.text for p in root.find("p", "about") if "coloured by its advantage" in p.text)
        assert said in about
        assert unsaid not in about


def test_every_chart_is_drawn_from_its_own_figure(tmp_path: Path) -> None:
    """Those that follow the curves of value-pretraining are counted on."""
    arguments = build(tmp_path)
    write_rows(tmp_path / "pretraining", PRETRAINING, *map(list, zip(*MEASURES, strict=True)))
    root = render({**arguments, "pretraining": tmp_path / "pretraining"})
    places = [int(plot.attributes["data-figure"]) for plot in root.find("div", "plot")]
    assert places == list(range(len(places)))
    drawn = json.loads(next(s.text for s in root.find("script") if s.attributes.get("id") == "figures"))
    headings = [next(figure.find("h3")).text for figure in root.find("figure")]
    x_titles = [found["layout"]["xaxis"].get("title", {}).get("text", "") for found in drawn]
    wanted = ("optimiser step" if heading in (LOSS, VARIANCE) else "iteration" for heading in headings[:-2])
    assert x_titles[:-2] == list(wanted)
    assert headings[-2:] == ["Held-out accuracy by difficulty", "Seconds per iteration"]


def test_a_foreign_table_is_no_pretraining(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    with pytest.raises(UserError, match="PRETRAINING"):
        render({**arguments, "pretraining": arguments["history"]})


def test_groups_and_padding_are_shares(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    rows = [
        (1, "advantages", "informative_share", 0.5),
        (2, "advantages", "informative_share", 0.25),
        (1, "advantages", "trained_share", 1.0),
        (1, "ppo_update", "padding_share", 0.03),
        (1, "value_pretraining", "padding_share", 0.9),
    ]
    write_history(arguments["history"], rows)
    found = figures_of(render(arguments))
    assert found["Groups with correct and wrong responses"] == ["informative", "trained on"]
    assert found["Padding"] == ["padding"]
    history = history_of({"iteration": i, "stage": s, "name": n, "value": v} for i, s, n, v in rows)
    groups, padding = curves(history)
    assert points_of(groups) == {"informative": [(1, 0.5), (2, 0.25)], "trained on": [(1, 1.0)]}
    assert points_of(padding) == {"padding": [(1, 0.03)]}
    for figure in (groups, padding):
        assert figure.layout["yaxis"]["tickformat"].endswith("%")
        assert all("%" in trace["hovertemplate"] for trace in figure.traces)


def test_page_needs_nothing_besides_itself(tmp_path: Path) -> None:
    root = render(build(tmp_path))
    tags = [element for tag in ("script", "link", "img", "iframe", "object", "a") for element in root.find(tag)]
    assert {element.tag for element in tags} == {"script"}
    assert not [element for element in tags if {"src", "href"} & set(element.attributes)]
    style = next(root.find("style")).text
    assert "url(" not in style
    assert "@import" not in style
    policy = next(m.attributes["content"] for m in root.find("meta") if "http-equiv" in m.attributes)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    arguments["recipe"] = json.dumps({"name": HOSTILE})
    write_history(arguments["history"], [*with_evaluation(), (4, "evaluation", f"problems/{HOSTILE}", 1.0)])
    root = render(arguments, title=HOSTILE, samples=12)
    assert len(list(root.find("script"))) == 3  # the data, Plotly, the page's own: nothing that a model wrote
    assert not list(root.find("img"))
    assert next(root.find("h1")).text == HOSTILE
    assert any(pre.text.endswith(HOSTILE) for pre in root.find("pre"))
    assert any(dd.text == HOSTILE for dd in root.find("dd"))


def test_figures_cannot_end_their_script_element(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    write_history(arguments["history"], [(1, "</script><img src=x>", "seconds", 1.0)])
    root = render(arguments)
    assert figures_of(root)["Seconds per iteration"] == ["</script><img src=x>"]
    assert not list(root.find("img"))


def test_every_token_has_a_span_and_its_colour_the_sign_of_the_advantage(tmp_path: Path) -> None:
    root = render(build(tmp_path), samples=8)
    cards = list(root.find("article", "response"))
    assert len(cards) == 8 + 4  # of the last iteration, and half as many of the first
    for card in cards:
        spans = list(card.find("span", "t"))
        length = next(dd.text for dd in card.find("dd") if dd.text.endswith(" tokens"))
        assert len(spans) == int(card.attributes["data-n"]) == int(length.removesuffix(" tokens"))
        assert spans[-1].text == "<eos>"
        for span in spans:
            advantage = float(re.search(r"advantage (\S+)", span.attributes["title"])[1])  # type: ignore[index]
            sign = {"up": 1, "down": -1, "even": 0}[span.attributes["class"].split()[1]]
            assert sign == np.sign(advantage) or abs(advantage) < 1e-4
            assert 0 <= float(span.attributes["style"].removeprefix("--a:")) <= 1
        points = [next(card.find("polyline", name)).attributes["points"].split() for name in ("value", "target")]
        assert [len(p) for p in points] == [len(spans)] * 2


def test_depth_of_colour_is_symmetric_and_robust(tmp_path: Path) -> None:
    a = build(tmp_path)
    words, prompts = Tokenizer.from_file(str(a["tokenizer"])), read_table(a["prompts"], PROMPTS)
    shown = read_responses(a["last_rollouts"], a["last_rewards"], a["last_experience"], prompts, words, 6)
    scale = Scale.of(shown)
    sizes = np.abs(np.concatenate([response.advantages for response in shown]))
    assert 0 < scale.advantage < sizes.max()  # a few outliers do not wash out the rest
    assert (sizes <= scale.advantage).mean() >= 0.95
    assert scale.low <= 0 <= scale.high
    assert Scale.of([]) == Scale(1.0, 0.0, 1.0)


def test_outcome_has_the_numbers_of_the_history(tmp_path: Path) -> None:
    root = render(build(tmp_path))
    lead = next(root.find("p", "lead")).text
    seconds = sum(value for _, _, name, value in history_rows(4) if name == "seconds")
    assert lead == (
        "Held-out accuracy rose from 31.2% to 57.8%, 26.6 points gained (avg@4 over 6 held-out problems), "
        f"in 4 iterations and {seconds:,.0f} seconds of work."
    )


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ([0.5, 0.4], "fell from 50.0% to 40.0%, 10.0 points lost"),
        ([0.4, 0.7, 0.4], "stayed at 40.0%"),
        ([0.4], "is 40.0% (avg@4 over 6 held-out problems), measured once"),
        ([], "not measured"),
    ],
)
def test_outcome_says_what_happened(tmp_path: Path, accuracies: list[float], words: str) -> None:
    arguments = build(tmp_path)
    rows = [(i, "evaluation", "accuracy", value) for i, value in enumerate(accuracies)]
    write_history(arguments["history"], [*rows, (1, "rollout", "seconds", 2.0)])
    assert words in next(render(arguments).find("p", "lead")).text


def test_curves_without_rows_are_left_out(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    full = figures_of(render(arguments))
    assert full["Accuracy"] == ["held-out avg@k", "held-out pass@k", "training"]
    rows = [row for row in history_rows(4) if row[2] not in ("pass_at_k", "entropy", "seconds")]
    write_history(arguments["history"], rows)
    fewer = figures_of(render(arguments))
    assert fewer["Accuracy"] == ["held-out avg@k", "training"]
    assert set(full) - set(fewer) == {"Entropy, nats per token", "Seconds per iteration"}


EVALUATED = {  # the last evaluation's metrics, with two families
    "samples_per_prompt": 4.0,
    "confidence": 0.9,
    "problems": 6.0,
    "accuracy_low": 0.5,
    "accuracy_high": 0.65,
    "pass_at_1": 0.578,
    "pass_at_4": 0.8,
    "cons_at_4": 0.7,
    "cons_at_4_low": 0.6,
    "cons_at_4_high": 0.75,
    "length_mean": 97.25,
    "truncated_share": 0.0,
    "problems/chain": 4.0,
    "accuracy/chain": 0.25,
    "problems/<b>": 2.0,
    "accuracy/<b>": 1.0,
}


def with_evaluation(iterations: int = 4) -> list[tuple[int, str, str, float]]:
    rows = [row for row in history_rows(iterations) if row[2] != "pass_at_k"]
    rows += [(0, "evaluation", "pass_at_4", 0.6), (0, "evaluation", "accuracy_low", 0.3)]
    rows += [(0, "evaluation", "accuracy_high", 0.35), (0, "evaluation", "problems", 6.0)]
    return rows + [(iterations, "evaluation", name, value) for name, value in EVALUATED.items()]


def test_last_evaluation_stands_in_a_table_with_its_intervals(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    write_history(arguments["history"], with_evaluation())
    root = render(arguments)
    section = next(s for s in root.find("section") if next(s.find("h2")).text == "Held-out problems")
    rows = [[cell.all_text() for cell in [*row.find("th"), *row.find("td")]] for row in section.find("tr")]
    assert rows[0] == ["family", "problems", "avg@4", "pass@4", "cons@4", "truncated", "mean length"]
    assert rows[1] == ["all", "6", "57.8% [50.0, 65.0]", "80.0%", "70.0% [60.0, 75.0]", "0.0%", "97.2"]
    assert rows[2] == ["chain", "4", "25.0%", "", "", "", ""]
    assert rows[3] == ["<b>", "2", "100.0%", "", "", "", ""]
    assert "90% confidence interval" in next(section.find("p", "about")).text
    lead = next(root.find("p", "lead")).text
    assert "rose from 31.2% to 57.8% (90% confidence interval 50.0% to 65.0%), 26.6 points gained (avg@4" in lead


def test_accuracy_has_whiskers_and_k_is_the_largest(tmp_path: Path) -> None:
    history = history_of({"iteration": i, "stage": s, "name": n, "value": v} for i, s, n, v in with_evaluation(4))
    chart = next(figure for figure in curves(history) if figure.title == "Accuracy")
    named = {trace["name"]: trace for trace in chart.traces}
    assert set(named) == {"held-out avg@k", "held-out pass@k", "held-out cons@k", "training"}
    assert (named["held-out pass@k"]["x"], named["held-out pass@k"]["y"]) == ([0, 4], [0.6, 0.8])
    whiskers = named["held-out avg@k"]["error_y"]
    assert whiskers["array"] == pytest.approx([0.35 - 0.312, 0.65 - 0.578])
    assert whiskers["arrayminus"] == pytest.approx([0.312 - 0.3, 0.578 - 0.5])
    assert not [name for name, trace in named.items() if "error_y" in trace and name != "held-out avg@k"]


def test_at_k_1_there_is_one_curve() -> None:
    rows = [("accuracy", 0.5), ("pass_at_1", 0.5), ("cons_at_1", 0.5)]
    (chart,) = curves({("evaluation", name): [(0, value)] for name, value in rows})
    assert [trace["name"] for trace in chart.traces] == ["held-out avg@k"]


def heldout_cards(root: Element) -> list[Element]:
    return [card for card in root.find("article") if "data-n" not in card.attributes]


@pytest.mark.parametrize("samples", [0, 1, 6])
def test_heldout_responses_are_shown(tmp_path: Path, samples: int) -> None:
    arguments = build(tmp_path)
    write_history(arguments["history"], with_evaluation())
    root = render(arguments, samples=samples)
    cards = heldout_cards(root)
    assert len(cards) == samples
    rewards = {row["rollout_id"]: row for row in read_table(arguments["evaluation_rewards"], REWARDS).to_pylist()}
    problems = {row["prompt_id"]: row for row in read_table(arguments["evaluation"], EVALUATION).to_pylist()}
    texts = {row["rollout_id"]: row for row in read_table(arguments["evaluation_rollouts"], ROLLOUTS).to_pylist()}
    for card in cards:
        row = next(card.find("code", "id")).text
        facts = {next(div.find("dt")).text: next(div.find("dd")).text for div in card.find("div")}
        assert facts["answer"] == rewards[row]["extracted"]
        assert facts["expected"] == "7"
        assert facts["length"] == f"{len(texts[row]['response_tokens'])} tokens"
        problem = problems[row.split("/")[1]]
        assert facts["correct"] == f"{problem['correct']} of 4 responses"
        assert facts["majority"] == (problem["majority"] or "none")
        assert next(card.find("p", "tokens")).text == texts[row]["response"]
        assert ("\u2713 matched" if rewards[row]["correct"] else "\u2717 different") in card.all_text()
    if samples == 6:
        assert len({next(card.find("span", "verdict")).text for card in cards}) == 2


@pytest.mark.parametrize(
    ("ground_truth", "shown"),
    [
        ("7", "7"),
        ("[1, 2]", "[1, 2]"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ('{"entry": {"answer": 12, "question": "?"}, "dataset": "chain_sum"}', "12"),
        ('{"entry": {"question": "?"}}', '{"entry": {"question": "?"}}'),
    ],
)
def test_the_right_answer_is_shown_without_what_its_grader_needs(ground_truth: str, shown: str) -> None:
    assert expected(ground_truth) == shown


def test_an_evaluation_alone_has_no_training_on_its_page(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    training = {"prompts", *(name for name in arguments if name.startswith(("first_", "last_")))}
    assert len(training) == 7
    rows = [(0, "evaluation", name, value) for name, value in {**EVALUATED, "accuracy": 0.578}.items()]
    write_history(arguments["history"], [*rows, (0, "evaluation/rollout", "seconds", 2.5)])
    root = render({name: value for name, value in arguments.items() if name not in training})
    headings = [heading.text for heading in root.find("h2")]
    assert headings == ["Held-out problems", "Time", "Recipe"]
    assert list(figures_of(root)) == ["Held-out accuracy by difficulty"]
    assert len(heldout_cards(root)) == len(list(root.find("article"))) == 12
    assert next(root.find("p", "lead")).text == (
        "Accuracy is 57.8% (avg@4 over 6 held-out problems, 90% confidence interval 50.0% to 65.0%), "
        "measured in 2.5 seconds of work."
    )


def test_a_long_heldout_response_shows_its_ends(tmp_path: Path) -> None:
    arguments = build(tmp_path, problems=1, samples=1)
    write_history(arguments["history"], with_evaluation())
    text = "a" * LONG_HEAD + "b" * 100 + "c" * LONG_TAIL
    rollout = ["0/p0/0"], ["p0"], [0], [1], [[0]], [[0]], [[0.0]], [text], ["length"]
    write_rows(arguments["evaluation_rollouts"], ROLLOUTS, *rollout)
    write_rows(arguments["evaluation_rewards"], REWARDS, ["0/p0/0"], [False], [-1.0], [""], ["truncated"])
    (card,) = heldout_cards(render(arguments))
    shown = next(card.find("p", "tokens"))
    assert shown.text == "a" * LONG_HEAD + "c" * LONG_TAIL
    assert "100 characters not shown" in next(shown.find("em", "gap")).text
    assert "none" in [dd.text for dd in card.find("dd")]


def test_heldout_tables_that_do_not_join(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    write_history(arguments["history"], with_evaluation())
    with pytest.raises(UserError, match="rollout_id"):
        render({**arguments, "evaluation_rewards": arguments["last_rewards"]})
    write_rows(arguments["evaluation"], EVALUATION, ["x"], ["file"], [0], [4], [1], [0], ["7"], [3.0])
    with pytest.raises(UserError, match=r"0/p0/\d is of a problem that is not in the table EVALUATION"):
        render(arguments)


def test_undefined_values_are_absent_and_a_repeated_stage_replaces_its_result() -> None:
    rows = [(1, 0.2), (0, 0.1), (1, 0.3), (2, float("nan"))]
    history = history_of(
        {"iteration": i, "stage": "advantages", "name": "explained_variance", "value": value} for i, value in rows
    )
    assert history == {("advantages", "explained_variance"): [(0, 0.1), (1, 0.3)]}
    (figure,) = curves(history)
    assert figure.traces[0]["x"] == [0, 1]


def test_training_curves_are_not_mixed_with_evaluation(tmp_path: Path) -> None:
    rows = [("verification", 0.25), ("evaluation/verification", 0.75), ("value_pretraining/verification", 0.5)]
    history = history_of({"iteration": 1, "stage": s, "name": "reward_mean", "value": v} for s, v in rows)
    (figure,) = curves(history)
    assert figure.traces[0]["y"] == [0.25]


def test_difficulty_is_left_out_when_unknown(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    title = "Held-out accuracy by difficulty"
    assert title in figures_of(render(arguments))
    write_rows(arguments["evaluation"], EVALUATION, ["p0"], ["file"], [0], [4], [1], [0], ["7"], [3.0])
    assert title not in figures_of(render(arguments))


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    render(arguments)
    first = arguments["page"].read_bytes()
    render(arguments)
    assert arguments["page"].read_bytes() == first


def test_one_iteration_is_shown_once(tmp_path: Path) -> None:
    root = render(build(tmp_path, iterations=1), samples=4)
    assert [label.text for label in root.find("label")] == ["last iteration (1)"]
    assert len(list(root.find("article"))) == 4


def test_no_samples_no_credit_view(tmp_path: Path) -> None:
    assert not list(render(build(tmp_path), samples=0).find("article"))


def test_a_long_response_shows_its_ends(tmp_path: Path) -> None:
    arguments = build(tmp_path, problems=1, samples=1)
    n = HEAD + TAIL + 100
    values = (np.zeros(n, np.float32), offsets_of([n]))
    tokens = (np.full(n, IDS["no"], np.int32), offsets_of([n]))
    rollout = ["4/p0/0"], ["p0"], [0], [1], [[IDS["?"]]], tokens, values, ["no"], ["length"]
    write_rows(arguments["last_rollouts"], ROLLOUTS, *rollout)
    write_rows(arguments["last_experience"], EXPERIENCE, ["4/p0/0"], [True], [0.9], values, values, values)
    card = next(render(arguments).find("article"))
    assert len(list(card.find("span", "t"))) == HEAD + TAIL
    assert "100 tokens not shown" in next(card.find("em", "gap")).text
    assert len(next(card.find("polyline", "value")).attributes["points"].split()) <= 1000


def test_rows_that_do_not_join_are_the_users_to_cure(tmp_path: Path) -> None:
    arguments = build(tmp_path)
    with pytest.raises(UserError, match="rollout_id: row 0: expected 4/p0/0, found 1/p0/0"):
        render({**arguments, "last_rewards": arguments["first_rewards"]})
    with pytest.raises(UserError, match="rollout_id"):
        render({**arguments, "first_experience": arguments["last_experience"]})


def test_unknown_prompt_and_ragged_lengths_are_named(tmp_path: Path) -> None:
    arguments = build(tmp_path, problems=1, samples=1)
    write_table(arguments["prompts"], PROMPTS, {name: [] for name in PROMPTS.names})
    with pytest.raises(UserError, match="'p0' is not in the table PROMPTS"):
        render(arguments)
    arguments = build(tmp_path, problems=1, samples=1)
    write_rows(arguments["last_experience"], EXPERIENCE, ["4/p0/0"], [True], [0.9], [[0.0]], [[0.0]], [[0.0]])
    with pytest.raises(UserError, match=r"column values: 4/p0/0: expected .* found 1"):
        render(arguments)


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a tokenizer\.json"):
        render({**build(tmp_path), "tokenizer": tmp_path / "none.json"})


def test_choose_mixes_right_and_wrong() -> None:
    correct = np.array([True] * 10 + [False] * 30)
    rows = choose(correct, 6)
    assert [bool(correct[row]) for row in rows] == [True, False] * 3
    assert len(set(rows)) == 6
    assert len(choose(np.array([True, True, False]), 12)) == 3
    assert choose(np.array([False, False]), 1) == [0]
    assert len(choose(np.array([True] + [False] * 9), 4)) == 4
    assert choose(np.zeros(0, bool), 4) == []


def test_token_texts_join_to_the_whole_and_never_vanish(tmp_path: Path) -> None:
    build(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [IDS[word] for word in ("#1", "+2", "=", "7", "<eos>")]
    assert token_texts(tokenizer, ids) == ["#1", " +2", " =", " 7", " <eos>"]
    assert token_texts(tokenizer, [999]) == ["[999]"]
