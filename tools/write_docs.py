"""Writes docs/cli.md, docs/config.md, docs/guide-checked*.md and the tables of README.md and of the pages below.

`--check` compares, for CI.

python tools/write_docs.py
python tools/write_docs.py --check
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.table import draw_engines, draw_example, draw_ladder, fill_table, read_results  # noqa: E402
from tools.guide_checked.page import PAGES, draw_page  # noqa: E402

from lensmith.check.findings import CODES  # noqa: E402
from lensmith.cli import app  # noqa: E402
from lensmith.config.rules import CONTRADICTIONS, WITHOUT_EFFECT  # noqa: E402
from lensmith.config.schema import describe_section, list_sections, list_settings  # noqa: E402
from lensmith.convert.run import TABLES  # noqa: E402
from lensmith.evals.metrics import METRICS  # noqa: E402
from lensmith.recipe.keywords import Keyword  # noqa: E402
from lensmith.recipe.names_model import (  # noqa: E402
    COLLATOR,
    COLLATOR_RENAMED,
    FROM_PRETRAINED,
    FROM_PRETRAINED_RENAMED,
    GET_PEFT_MODEL,
    GET_PEFT_MODEL_RENAMED,
)
from lensmith.recipe.names_training import (  # noqa: E402
    GRPO,
    GRPO_ALONE,
    GRPO_TRAINER,
    SFT,
    SFT_TRAINER,
    TRAINER_RENAMED,
    TRAINING_RENAMED,
)
from lensmith.recipe.saving import GGUF, MERGED  # noqa: E402
from lensmith.screens import write_default  # noqa: E402
from lensmith.train.reward_functions import REWARDS, RewardFunction  # noqa: E402

CODES_START = "<!-- codes: written by tools/write_docs.py from src/lensmith/check/findings.py -->"
CODES_END = "<!-- /codes -->"
LADDER_START = "<!-- ladder: written by tools/write_docs.py from benchmarks/results/memory-ladder.json -->"
LADDER_END = "<!-- /ladder -->"
ENGINES_START = "<!-- engines: written by tools/write_docs.py from benchmarks/results -->"
ENGINES_END = "<!-- /engines -->"
REWARDS_START = "<!-- rewards: written by tools/write_docs.py from src/lensmith/train/reward_functions.py -->"
REWARDS_END = "<!-- /rewards -->"
METRICS_START = "<!-- metrics: written by tools/write_docs.py from src/lensmith/evals/metrics.py -->"
METRICS_END = "<!-- /metrics -->"
NAMES_START = "<!-- names: written by tools/write_docs.py from src/lensmith/convert -->"
NAMES_END = "<!-- /names -->"
FIT_START = "<!-- fit: written by tools/write_docs.py from src/lensmith/plan/coefficients.json -->"
FIT_END = "<!-- /fit -->"
RECIPE_START = "<!-- recipe: written by tools/write_docs.py from src/lensmith/recipe -->"
RECIPE_END = "<!-- /recipe -->"
GENERATED = "<!-- Written by tools/write_docs.py; edit the code instead. -->\n"


def cli_page() -> str:
    """Every verb with its arguments, flags and example, from the typer app."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line\n",
        GENERATED,
        "Every verb prints for a person on stderr; with `--json`, stdout holds exactly one JSON object, also after an",
        'error (`{"error": "...", "exit_code": 1}`). Exit codes: 0 done, 1 you can fix it (one sentence, no traceback),',
        "2 a bug in Lensmith (always with its traceback). How to train is said in [settings](config.md), not in flags.\n",
    ]
    for name, verb in group.commands.items():
        lines += [f"## lensmith {name}\n", f"{verb.help.strip()}\n"]
        lines += [f"| {'Argument or flag'} | Meaning | Default |", "|---|---|---|"]
        lines += list(_parameters(verb))
        lines += ["", f"{verb.epilog.replace('Example: ', '').replace('Examples: ', '')}"]
        examples = lines.pop().split("; ")
        lines += ["```console", *(f"$ {example}" for example in examples), "```\n"]
    return "\n".join(lines).rstrip() + "\n"


def _parameters(verb: Any) -> Iterator[str]:
    for parameter in verb.params:
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
            default = "required" if parameter.required else ""
        else:
            name = parameter.opts[0]
            default = "" if parameter.is_flag else f"`{parameter.default}`"
        if name != "--help":
            yield f"| `{name.replace('|', chr(92) + '|')}` | {getattr(parameter, 'help', None) or ''} | {default} |"


def config_page() -> str:
    """Every setting, section by section, from the config tree."""
    lines = [
        "# Settings\n",
        GENERATED,
        "Settings stand in a YAML file, or on the command line as `section.name=value`, which wins. YAML is read as",
        "version 1.2: `2e-4` is a number, `no` is a word. Relative paths in a file start from the file's folder, then from",
        "the current one; `run` from the current one. An unknown setting, a wrong type, a setting that has no effect",
        f"({len(WITHOUT_EFFECT)} rules) or two that contradict ({len(CONTRADICTIONS)} rules) stop the run before anything",
        "is loaded, all in one message. The resolved settings are in the run folder as `config.yaml`.\n",
    ]
    for section in list_sections():
        settings = [s for s in list_settings() if s.path.rpartition(".")[0] == section]
        if settings:
            lines.append(f"## {section or 'the run'}\n")
            lines += [text + "\n" for text in [describe_section(section)] if text and section]
            lines += ["| Setting | Accepts | Default | Meaning |", "|---|---|---|---|"]
            lines += [
                f"| `{s.path}` | {s.allowed} | `{write_default(s.path)}` | {s.doc.replace('|', chr(92) + '|')} |"
                for s in settings
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def codes_table() -> str:
    """Every code that `lensmith check` reports."""
    lines = ["| Code | | When | For example | What to do |", "|---|---|---|---|---|"]
    for code, kind in CODES.items():
        cells = (kind.severity, kind.meaning, kind.example, kind.fix)
        lines.append(" | ".join([f"| `{code}`", *(cell.replace("|", chr(92) + "|") for cell in cells)]) + " |")
    return "\n".join(lines)


def rewards_table() -> str:
    """Every named reward, from its docstring and its signature."""
    lines = ["| Name | When it pays | Reads | Range | Parameters | Source |", "|---|---|---|---|---|---|"]
    for name, function in REWARDS.items():
        cells = [f"`{name}`", *_told(function, ("Reads", "Range", "Source")), _defaults(function)]
        cells[4:] = reversed(cells[4:])  # the source comes last
        lines.append("| " + " | ".join(cell.replace("|", chr(92) + "|") for cell in cells) + " |")
    return "\n".join(lines)


def metrics_table() -> str:
    """Every named metric, from the docstring of its judge."""
    lines = ["| `eval.metric` | The value of an answer | Range | For | Source |", "|---|---|---|---|---|"]
    for name, metric in METRICS.items():
        cells = [f"`{name}`", *_told(metric.judge, ("Range", "For", "Source"))]
        lines.append("| " + " | ".join(cell.replace("|", chr(92) + "|") for cell in cells) + " |")
    return "\n".join(lines)


def recipe_tables() -> str:
    """What becomes of each keyword of the recipe, call by call; shared ones stand once, with fine-tuning."""
    tables = (
        ("FastVisionModel.from_pretrained", FROM_PRETRAINED, FROM_PRETRAINED_RENAMED),
        ("FastVisionModel.get_peft_model", GET_PEFT_MODEL, GET_PEFT_MODEL_RENAMED),
        ("VisionDataCollator (UnslothVisionDataCollator)", COLLATOR, COLLATOR_RENAMED),
        ("SFTConfig, and what GRPOConfig shares with it", SFT, TRAINING_RENAMED),
        (
            "GRPOConfig",
            {name: GRPO[name] for name in GRPO if name not in SFT or GRPO[name] is not SFT[name]},
            GRPO_ALONE,
        ),
        ("SFTTrainer", SFT_TRAINER, TRAINER_RENAMED),
        ("GRPOTrainer", {name: GRPO_TRAINER[name] for name in GRPO_TRAINER if name not in SFT_TRAINER}, {}),
        ("save_pretrained_merged, push_to_hub_merged", MERGED, {}),
        ("save_pretrained_gguf, push_to_hub_gguf", {name: GGUF[name] for name in GGUF if name not in MERGED}, {}),
    )
    return "\n\n".join(_recipe_table(*table) for table in tables)


def _recipe_table(call: str, known: Mapping[str, Keyword], renamed: Mapping[str, str]) -> str:
    kinds = {"used": "", "idle": "no effect: ", "refused": "refused otherwise. "}
    lines = [f"## {call}", "", "| Keyword | Its default at home | Here |", "|---|---|---|"]
    for name, keyword in known.items():
        old = [f"`{other}`" for other, today in renamed.items() if today == name]
        also = f" (also {', '.join(old)})" if old else ""
        theirs = "" if keyword.here.startswith("of our own") else f"`{keyword.theirs!r}`"
        lines.append(f"| `{name}`{also} | {theirs} | {kinds[keyword.kind]}{keyword.here.rstrip('.')} |")
    return "\n".join(lines)


CALLS = {"load": "from_pretrained", "lora": "LoRA", "config": "Config", "trainer": "Trainer", "quant": "BitsAndBytesConfig",
         "processor": "AutoProcessor", "collator": "UnslothVisionDataCollator", "data": "load_dataset",
         "data_eval": "load_dataset of a test split", "split": "train_test_split", "responses": "train_on_responses_only",
         "env": "environment"}  # fmt: skip
"""What a prefix in the tables stands for; LoRA is LoraConfig or get_peft_model, Config SFTConfig or GRPOConfig."""


def names_tables() -> str:
    """Every argument that `lensmith convert` knows, tool by tool: with a counterpart, and without."""
    lines = []
    for tool, table_of in TABLES.items():
        tables = [table_of("sft"), table_of("grpo")]
        lines += [f"### {tool}", "", f"Names and defaults: {tables[0].version}.", ""]
        lines += ["| Theirs | Ours | Their default | Note |", "|---|---|---|---|"]
        rules = {
            (rule.ours, *rule.mains, rule.note): rule for table in tables for rule in table.rules if any(rule.mains)
        }
        for rule in rules.values():
            names = [name for name in rule.mains if not name.endswith(".")]
            defaults = [_written(rule.names[name]) for name in names] if rule.assume else []
            cells = [
                ", ".join(_named(name) for name in names) or "no LoRA",
                f"`{rule.ours}`",
                ", ".join(f"`{default}`" for default in defaults if default != "null"),
                rule.note,
            ]
            lines.append("| " + " | ".join(cells) + " |")
        without = {name: told for table in tables for name, told in table.without.items() if told.matters}
        lines += ["", "| Without counterpart | Instead |", "|---|---|"]
        lines += [f"| {_named(name)} | {told.why} |" for name, told in without.items()]
        nothing = {name for table in tables for name, told in table.without.items() if not told.matters}
        lines += ["", f"Need nothing: {', '.join(_named(name) for name in sorted(nothing))}.", ""]
    return "\n".join(lines).rstrip()


def _named(name: str) -> str:
    """`config.seed` -> `seed` (Config)."""
    prefix, dot, leaf = name.partition(".")
    return f"`{leaf}` ({CALLS[prefix]})" if dot else f"`{name}`"


def _told(function: Callable[..., float], parts: Sequence[str]) -> list[str]:
    """What the docstring says on its first line, and after each of `parts`, which stand in this order.

    Raises:
        ValueError: one of them is missing.
    """
    doc = inspect.getdoc(function) or ""
    pattern = r"(.*?)\n\n.*?" + r"\n".join(rf"{part}: (.*?)" for part in parts) + r"\Z"
    found = re.search(pattern, doc, re.DOTALL)
    if found is None:
        raise ValueError(
            f"{function.__qualname__} must say in its docstring: {', '.join(f'{part}:' for part in parts)}"
        )
    return [" ".join(text.split()).rstrip(".") for text in found.groups()]


def _defaults(function: RewardFunction) -> str:
    parameters = [one for one in inspect.signature(function).parameters.values() if one.kind is one.KEYWORD_ONLY]
    return ", ".join(
        f"`{one.name}` (needed)" if one.default is one.empty else f"`{one.name}: {_written(one.default)}`"
        for one in parameters
    )


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def fit_table() -> str:
    """How far predictions are from measurements, as tools/fit_plan.py left it."""
    path = REPOSITORY / "src" / "lensmith" / "plan" / "coefficients.json"
    fit = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| Configurations | | Peak, median | Peak, worst | Seconds, median | Seconds, worst |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in fit["errors_by_kind"]:
        errors = (row[name] for name in ("peak_median", "peak_worst", "step_median", "step_worst"))
        lines.append(f"| {row['what']} | {row['records']} | " + " | ".join(f"{error:.1%}" for error in errors) + " |")
    return "\n".join([*lines, "", f"On {', '.join(fit['fitted_on']['cards'])}. {fit['note']}"])


def example_tables() -> dict[Path, str]:
    """README of each example -> its measured table."""
    results = read_results()
    return {
        page: draw_example(results[f"example-{page.parent.name}"])
        for page in sorted((REPOSITORY / "examples").glob("*/README.md"))
    }


def fill(page: Path, start: str, table: str, end: str) -> str:
    """The page with the table between its two marks brought up to date.

    Raises:
        ValueError: the page lacks one of the marks.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page.name} must hold {start} and {end} around the table")
    return f"{before}{start}\n{table}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Path -> what it must hold."""
    readme, docs = REPOSITORY / "README.md", REPOSITORY / "docs"
    return {
        REPOSITORY / "docs" / "cli.md": cli_page(),
        REPOSITORY / "docs" / "config.md": config_page(),
        docs / "check.md": fill(docs / "check.md", CODES_START, codes_table(), CODES_END),
        docs / "convert.md": fill(docs / "convert.md", NAMES_START, names_tables(), NAMES_END),
        docs / "plan.md": fill(docs / "plan.md", FIT_START, fit_table(), FIT_END),
        docs / "memory.md": fill(docs / "memory.md", LADDER_START, draw_ladder(read_results()), LADDER_END),
        docs / "unsloth.md": fill(docs / "unsloth.md", ENGINES_START, draw_engines(read_results()), ENGINES_END),
        docs / "evaluation.md": fill(docs / "evaluation.md", METRICS_START, metrics_table(), METRICS_END),
        docs / "recipe.md": fill(docs / "recipe.md", RECIPE_START, recipe_tables(), RECIPE_END),
        docs / "rewards.md": fill(docs / "rewards.md", REWARDS_START, rewards_table(), REWARDS_END),
        readme: fill_table(readme.read_text(encoding="utf-8")),
        **{docs / name: draw_page(language) for language, name in PAGES.items()},
        **{page: fill_table(page.read_text(encoding="utf-8"), table) for page, table in example_tables().items()},
    }


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check say which are not current and return 1."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(REPOSITORY)) for path in stale)
    if "--check" in arguments:
        if stale:
            print(f"not current: {names}. Run: python tools/write_docs.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
    print(f"wrote {names}" if stale else "all pages are current")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
