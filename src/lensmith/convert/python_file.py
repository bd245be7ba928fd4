"""Scripts and notebooks of Unsloth and TRL, read as syntax trees; none of their code ever runs.

What counts are the keyword arguments of the known calls, wherever in the file they stand. The first call of a kind is
the run's; later ones (a notebook loads its model once more to ask it) are left, and so is what stands under `if False:`.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lensmith.convert.literals import Computed, Constants, is_never, plain_lines
from lensmith.convert.nouns import Argument, Found, Task, Tool, Unread
from lensmith.errors import ConfigError

SFT, GRPO = ("SFTConfig", "SFTTrainer"), ("GRPOConfig", "GRPOTrainer")
UNSLOTH_CLASSES = ("FastVisionModel", "FastModel", "FastLanguageModel")
CALLS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "SFTConfig": ("config", ("output_dir",)),
    "GRPOConfig": ("config", ("output_dir",)),
    "TrainingArguments": ("config", ("output_dir",)),
    "SFTTrainer": ("trainer", ("model", "args")),
    "GRPOTrainer": ("trainer", ("model", "reward_funcs")),
    "LoraConfig": ("lora", ()),
    "BitsAndBytesConfig": ("quant", ("load_in_8bit", "load_in_4bit")),
    "UnslothVisionDataCollator": ("collator", ("model", "processor")),
    "train_on_responses_only": ("responses", ("trainer",)),
    "load_dataset": ("data", ("path", "name")),
    "train_test_split": ("split", ("test_size",)),
}
"""Last part of what is called -> the prefix of its arguments in the tables, and names of positional ones."""
OBJECTS = ("collator.model", "collator.processor", "responses.trainer", "lora.model")
"""Positional arguments that are objects of the script, not settings."""
NAMED_BY_CALL = ("data", "data_eval", "processor", "split")
"""Arguments whose names alone would tell nothing: load_dataset(path)."""
ANSWERS_ONLY = {"collator.train_on_responses_only", "config.assistant_only_loss", "config.completion_only_loss"}
"""Arguments by which a script leaves questions out of the loss."""
OTHER_TRAINERS = ("DPOTrainer", "KTOTrainer", "ORPOTrainer", "PPOTrainer", "RewardTrainer", "RLOOTrainer", "CPOTrainer")
TEST_SPLITS = ("test", "val", "eval", "dev")
RESHAPING = ("map", "filter", "select", "rename_column", "remove_columns")


@dataclass(frozen=True, slots=True)
class Block:
    """A file, or one cell of a notebook."""

    tree: ast.Module
    place: str
    """`line {}`, or `cell 3, line {}`."""


@dataclass(frozen=True, slots=True)
class _Call:
    node: ast.Call
    name: str
    prefix: str
    positional: tuple[str, ...]
    where: str


def read_python(path: Path, text: str) -> Found:
    """What a script or notebook says.

    Raises:
        ConfigError: it is not Python, not a notebook, or trains in none of the two ways.
    """
    blocks, unread = _notebook(path, text) if path.suffix == ".ipynb" else ([_script(path, text)], [])
    calls = [call for block in blocks for call in _calls(block)]
    names = {call.name for call in calls}
    task: Task = "grpo" if next((call.name for call in calls if call.name in (*SFT, *GRPO)), "") in GRPO else "sft"
    calls = [call for call in calls if not _is_other_task(call, task, unread)]
    other = next((name for name in OTHER_TRAINERS if _is_called(blocks, name)), None)
    if not names & {*SFT, *GRPO}:
        found = f"trains with {other}" if other else "calls no SFTConfig, SFTTrainer, GRPOConfig or GRPOTrainer"
        raise ConfigError(
            f"{path}: {found}, so there is no fine-tuning and no GRPO to convert. "
            "Lensmith does these two; `lensmith init DATA` writes a run.yaml to start from."
        )
    tool: Tool = "unsloth" if any(_is_unsloth(call) for call in calls) else "trl"
    constants = Constants([(block.tree, block.place) for block in blocks])
    arguments: dict[str, Argument] = {}
    for call in _first_of_kind(calls, unread):
        if call.prefix == "lora":
            arguments.setdefault("lora.", Argument("lora.", True, call.where, call.name))
        for argument in _arguments(call, constants, unread):
            arguments.setdefault(argument.name, argument)
    kept = [
        one for name, one in arguments.items() if name not in OBJECTS and not (tool == "unsloth" and name == "lora.")
    ]
    return Found(tool, task, tuple(kept), tuple(unread), (*_remarks(blocks), *_learned(task, calls, arguments)))


def _script(path: Path, text: str) -> Block:
    return Block(_parse(text, str(path)), "line {}")


def _notebook(path: Path, text: str) -> tuple[list[Block], list[Unread]]:
    try:
        cells = json.loads(text)["cells"]
        sources = [
            (number, "".join(cell["source"])) for number, cell in enumerate(cells, 1) if cell["cell_type"] == "code"
        ]
    except (ValueError, KeyError, TypeError) as cause:
        raise ConfigError(
            f"{path}: not a notebook of format 4, which is JSON with `cells`. Export it again as .ipynb."
        ) from cause
    blocks, unread = [], []
    for number, source in sources:
        place = f"cell {number}, line {{}}"
        try:
            blocks.append(Block(_parse(plain_lines(source), str(path)), place))
        except ConfigError:
            unread.append(Unread(f"cell {number}", "not Python"))
    return blocks, unread


def _parse(text: str, path: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in their strings is for them to mend
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as cause:
        line = getattr(cause, "lineno", None)
        where = f"{path}:{line}" if line else path
        raise ConfigError(
            f"{where}: not Python that {_version()} reads: {cause.args[0] if cause.args else cause}."
        ) from cause


def _version() -> str:
    import sys

    return f"Python {sys.version_info.major}.{sys.version_info.minor}"


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """In the order of the text, without what is never run."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and is_never(node.test) and child in node.body:
            continue
        yield from _walk(child)


def _calls(block: Block) -> Iterator[_Call]:
    for node in _walk(block.tree):
        if isinstance(node, ast.Call) and (known := _kind(node)):
            name, prefix, positional = known
            yield _Call(node, name, prefix, positional, block.place.format(node.lineno))


def _kind(node: ast.Call) -> tuple[str, str, tuple[str, ...]] | None:
    match node.func:
        case ast.Attribute(value=owner, attr="from_pretrained" | "get_peft_model" as method):
            return _loading(ast.unparse(owner), method)
        case ast.Name(id=name) | ast.Attribute(attr=name) if name in CALLS:
            prefix, positional = CALLS[name]
            return name, prefix, positional
    return None


def _loading(owner: str, method: str) -> tuple[str, str, tuple[str, ...]] | None:
    short = owner.rpartition(".")[2]
    name = f"{short}.{method}"
    if short in UNSLOTH_CLASSES:
        return (name, "load", ("model_name",)) if method == "from_pretrained" else (name, "lora", ("model", "r"))
    if method != "from_pretrained":
        return None
    if short.endswith(("Processor", "Tokenizer")):
        return name, "processor", ("pretrained_model_name_or_path",)
    if short.startswith("AutoModel") or short.endswith("ForConditionalGeneration"):
        return name, "load", ("pretrained_model_name_or_path",)
    return None


def _is_other_task(call: _Call, task: Task, unread: list[Unread]) -> bool:
    """Whether a call belongs to a second training of the other kind in the same file."""
    other = SFT if task == "grpo" else GRPO
    if call.name in other:
        unread.append(
            Unread(call.where, f"{call.name}: a second training, of another kind; convert it from a file of its own")
        )
    return call.name in other


def _is_unsloth(call: _Call) -> bool:
    return call.name.partition(".")[0] in UNSLOTH_CLASSES or call.name == "UnslothVisionDataCollator"


def _is_called(blocks: Sequence[Block], name: str) -> bool:
    nodes = [node for block in blocks for node in _walk(block.tree) if isinstance(node, ast.Call)]
    return any(ast.unparse(node.func).rpartition(".")[2] == name for node in nodes)


def _first_of_kind(calls: Sequence[_Call], unread: list[Unread]) -> Iterator[_Call]:
    """One call of each kind; a second load_dataset of a test split is the held-out data."""
    seen: dict[str, _Call] = {}
    for call in calls:
        if call.prefix == "data" and "data" in seen and "data_eval" not in seen and _is_test(call.node):
            seen["data_eval"] = call
            yield _Call(call.node, call.name, "data_eval", call.positional, call.where)
        elif call.prefix not in seen:
            seen[call.prefix] = call
            yield call
        else:
            unread.append(
                Unread(call.where, f"{call.name} is called again; the call at {seen[call.prefix].where} is used")
            )


def _is_test(node: ast.Call) -> bool:
    split = next((one.value for one in node.keywords if one.arg == "split"), None)
    return isinstance(split, ast.Constant) and str(split.value).startswith(TEST_SPLITS)


def _arguments(call: _Call, constants: Constants, unread: list[Unread]) -> Iterator[Argument]:
    given = list(zip(call.positional, call.node.args, strict=False))
    given = [(name, node) for name, node in given if not isinstance(node, ast.Starred)]
    for keyword in call.node.keywords:
        if keyword.arg:
            given.append((keyword.arg, keyword.value))
        else:
            yield from _spread(call, keyword.value, constants, unread)
    base = int(call.where.rpartition(" ")[2]) - call.node.lineno
    for name, node in given:
        where = call.where.rpartition(" ")[0] + f" {node.lineno + base}"
        try:
            value = constants.read(node)
        except Computed:
            what = f"{name} = {_short(ast.unparse(node))} is computed"
            unread.append(Unread(where, what, f"{call.prefix}.{name}"))
            continue
        shown = f"{call.name}({name})" if call.prefix in NAMED_BY_CALL else name
        yield Argument(f"{call.prefix}.{name}", value, where, shown)


def _spread(call: _Call, node: ast.expr, constants: Constants, unread: list[Unread]) -> Iterator[Argument]:
    """`**settings` of a dict that is written out in the file."""
    try:
        value = constants.read(node)
    except Computed:
        value = None
    if isinstance(value, dict):
        yield from (Argument(f"{call.prefix}.{name}", item, call.where, str(name)) for name, item in value.items())
    else:
        unread.append(Unread(call.where, f"**{_short(ast.unparse(node))} of {call.name} is computed"))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _learned(task: Task, calls: Sequence[_Call], arguments: Mapping[str, Argument]) -> Iterator[str]:
    """Unsloth's collator and TRL's, on `messages`, learn every text token by default."""
    if task == "sft" and not ANSWERS_ONLY & set(arguments) and not any(call.prefix == "responses" for call in calls):
        yield (
            "Where rows have `messages`, questions are learned there along with answers unless the script says otherwise; "
            "Lensmith learns answers only, so the two losses cannot be compared."
        )


def _remarks(blocks: Sequence[Block]) -> Iterator[str]:
    """Where rows are made by code, which no setting can carry over."""
    places = [
        block.place.format(node.lineno)
        for block in blocks
        for node in _walk(block.tree)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RESHAPING)
        or (isinstance(node, ast.Assign) and isinstance(node.value, ast.ListComp))
    ]
    if places:
        told = "; ".join(dict.fromkeys(places))
        yield (
            f"Rows are made by code there ({told}), which is not carried over: Lensmith reads files and data sets as they "
            "are. Name columns with data.columns, or write the rows to a .jsonl file; docs/data.md shows the shapes."
        )
