"""docs/guide-checked.md and its Chinese twin, both from the claims in *.yaml and the figures of figures.py.

A row holds what the guide says, a verdict, what we found and what to do instead; `{name}` in a text stands for a figure.
How each row is known follows from the figures in it, and `how` adds what is no figure: a test, a source that was read.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from tools.guide_checked.figures import PICTURES, PLANS, Source, all_figures, plan_command, results

Language = Literal["en", "zh"]
Verdict = Literal["holds", "partly", "fails", "unmeasured"]

FOLDER = Path(__file__).parent
FILES = ("names", "tokens", "memory", "training", "grpo", "pitfalls")
"""In the order of the page."""
PAGES: dict[Language, str] = {"en": "guide-checked.md", "zh": "guide-checked.zh.md"}
GENERATED = (
    "<!-- Written by tools/write_docs.py from tools/guide_checked and benchmarks/results; edit those instead. -->"
)
PLACE = re.compile(r"\{([a-z0-9_.]+)\}")
_BETWEEN_CHINESE = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])")

WORDS: dict[Language, dict[str, str]] = {
    "en": {
        "holds": "holds",
        "partly": "holds partly",
        "fails": "does not hold",
        "unmeasured": "not measured",
        "head": "| The guide says | Verdict | What we found | How we know |",
        "instead": "Instead",
        "measured": "measured",
        "planned": "planned, not measured",
        "computed": "computed",
        "tokens": "| Picture, px | Qwen3-VL, limits as shipped | `data.image.max_tokens={cap.setting}` | Qwen2.5-VL, 28 px |",
        "results": "| Result | On | Date | Command |",
        "colon": ": ",
        "comma": "; ",
        "usable": "{card} GiB ({usable} usable)",
        "reserved": "{gib} GiB, measured ({gpu})",
    },
    "zh": {
        "holds": "成立",
        "partly": "部分成立",
        "fails": "不成立",
        "unmeasured": "未实测",
        "head": "| 指南的说法 | 结论 | 我们的结果 | 依据 |",
        "instead": "建议",
        "measured": "实测",
        "planned": "规划值，非实测",
        "computed": "计算",
        "tokens": "| 图片（px） | Qwen3-VL，出厂上下限 | `data.image.max_tokens={cap.setting}` | Qwen2.5-VL，28 px |",
        "results": "| 结果文件 | 硬件 | 日期 | 命令 |",
        "colon": "：",
        "comma": "；",
        "usable": "{card} GiB（可用 {usable}）",
        "reserved": "{gib} GiB，实测（{gpu}）",
    },
}


@dataclass(frozen=True, slots=True)
class Claim:
    """One row in both languages."""

    says: dict[Language, str]
    verdict: Verdict
    found: dict[Language, str]
    instead: dict[Language, str]
    how: dict[Language, str]

    def figures(self, language: Language) -> list[str]:
        """Names of the figures in the order in which they are read."""
        return PLACE.findall(self.found[language] + self.instead.get(language, ""))


@dataclass(frozen=True, slots=True)
class Topic:
    """One table with its heading and a few words before it."""

    name: str
    title: dict[Language, str]
    before: dict[Language, str]
    claims: tuple[Claim, ...]


@functools.cache
def read_topics() -> tuple[Topic, ...]:
    """All claims.

    Raises:
        ValueError: a row lacks something, or has a verdict or key that is none.
    """
    return tuple(_to_topic(name, _read(name)) for name in FILES)


def draw_page(language: Language) -> str:
    """The whole page."""
    frame = _read("frame")[language]
    parts = [f"# {frame['title']}\n\n{GENERATED}\n\n{_fill(frame['start'], language)}\n\n{_count_verdicts(language)}"]
    for topic in read_topics():
        parts.append(f"## {topic.title[language]}")
        if before := topic.before.get(language):
            parts.append(_fill(before, language))
        if topic.name == "tokens":
            parts.append(_token_table(language))
        parts.append("\n".join([WORDS[language]["head"], "|---|---|---|---|", *draw_rows(topic, language)]))
    parts += [f"## {frame['advice_title']}\n\n{_fill(frame['advice'], language)}", _advice_table(frame, language)]
    parts.append(_fill(frame["advice_end"], language))
    parts += _sources(frame, language)
    return "\n\n".join(parts) + "\n"


def draw_rows(topic: Topic, language: Language) -> Iterator[str]:
    """One line of a table per claim."""
    words = WORDS[language]
    for claim in topic.claims:
        found = claim.found[language]
        if instead := claim.instead.get(language):
            found += f"<br>**{words['instead']}{words['colon'].strip()}** {instead}"
        cells = (
            _fill(claim.says[language], language),
            words[claim.verdict],
            _fill(found, language),
            _how(claim, language),
        )
        yield "| " + " | ".join(cell.replace("|", chr(92) + "|") for cell in cells) + " |"


def _read(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _to_topic(name: str, content: dict[str, Any]) -> Topic:
    claims = tuple(_to_claim(name, number, row) for number, row in enumerate(content["claims"], 1))
    return Topic(name, content["title"], content.get("before", {}), claims)


def _to_claim(name: str, number: int, row: dict[str, Any]) -> Claim:
    where = f"{name}.yaml, claim {number}"
    if unknown := row.keys() - {"says", "verdict", "found", "instead", "how"}:
        raise ValueError(f"{where}: {', '.join(sorted(unknown))} is no part of a claim")
    if row.get("verdict") not in get_args(Verdict):
        raise ValueError(f"{where}: verdict {row.get('verdict')} is none of {', '.join(get_args(Verdict))}")
    for part in ("says", "found"):
        if set(row.get(part, {})) != set(PAGES):
            raise ValueError(f"{where}: {part} must be in {' and '.join(PAGES)}")
    return Claim(row["says"], row["verdict"], row["found"], row.get("instead", {}), row.get("how", {}))


def _fill(text: str, language: Language) -> str:
    """The text with its figures, on one line per line of the source's own."""
    filled = PLACE.sub(lambda place: all_figures()[place[1]].text, text).strip()
    # YAML folds lines with a space, which does not belong between Chinese characters.
    return _BETWEEN_CHINESE.sub("", filled) if language == "zh" else filled


def _how(claim: Claim, language: Language) -> str:
    words = WORDS[language]
    sources = dict.fromkeys(source for name in claim.figures(language) for source in all_figures()[name].sources)
    told = []
    for kind in ("measured", "planned", "computed"):
        if names := [_name_source(source) for source in sources if source.kind == kind]:
            told.append(f"{words[kind]}{words['colon']}{', '.join(names)}")
    told += [_fill(claim.how[language], language)] if claim.how else []
    return words["comma"].join(told)


def _name_source(source: Source) -> str:
    if source.kind == "measured":
        result = results()[source.name]
        return f"[{source.name}](../{result['file']}) ({_short(result['gpu_or_cpu'])})"
    if source.kind == "planned":
        return f"P{list(PLANS).index(source.name) + 1}"
    return f"`{source.name}`"


def _short(gpu: str) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`; the whole name stands in the list of results."""
    return gpu.removeprefix("NVIDIA ").split(" ")[0]


def _count_verdicts(language: Language) -> str:
    counted = Counter(claim.verdict for topic in read_topics() for claim in topic.claims)
    words = WORDS[language]
    head = " | ".join(words[verdict] for verdict in get_args(Verdict))
    numbers = " | ".join(str(counted[verdict]) for verdict in get_args(Verdict))
    return f"| {head} |\n|--:|--:|--:|--:|\n| {numbers} |"


def _token_table(language: Language) -> str:
    lines = [_fill(WORDS[language]["tokens"], language), "|---|--:|--:|--:|"]
    figures = all_figures()
    for name in PICTURES:
        shown = " | ".join(figures[f"{kind}.{name}"].text for kind in ("tokens", "capped", "qwen25"))
        lines.append(f"| {name.replace('x', ' × ')} | {shown} |")
    return "\n".join(lines)


def read_advice() -> list[dict[str, Any]]:
    """Rows of the last table: job, card, figure, settings."""
    return _read("advice")


def _advice_table(frame: dict[str, str], language: Language) -> str:
    words, lines = WORDS[language], [frame["advice_head"], "|---|---|---|---|---|"]
    for row in read_advice():
        figure, usable = all_figures()[row["figure"]], all_figures()[f"usable.{row['card_gib']}"]
        gpu = _short(results()[figure.sources[0].name]["gpu_or_cpu"])
        cells = (
            row["job"][language],
            row["guide"],
            words["usable"].format(card=row["card_gib"], usable=usable.text),
            words["reserved"].format(gib=figure.text, gpu=gpu),
            f"`{row['settings']}`",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sources(frame: dict[str, str], language: Language) -> Iterator[str]:
    used = [source for name in _used_figures(language) for source in all_figures()[name].sources]
    yield f"## {frame['sources_title']}\n\n{_fill(frame['sources'], language)}"
    lines = [WORDS[language]["results"], "|---|---|---|---|"]
    for name in dict.fromkeys(source.name for source in used if source.kind == "measured"):
        result = results()[name]
        cells = (f"[{name}](../{result['file']})", result["gpu_or_cpu"], result["date"], f"`{result['command']}`")
        lines.append("| " + " | ".join(cells) + " |")
    yield "\n".join(lines)
    yield _fill(frame["plans"], language)
    yield "\n".join(f"- P{number}: `{plan_command(name)}`" for number, name in enumerate(PLANS, 1))
    yield _fill(frame["computed"], language)


def _used_figures(language: Language) -> list[str]:
    named = [name for topic in read_topics() for claim in topic.claims for name in claim.figures(language)]
    return named + [row["figure"] for row in read_advice()]
