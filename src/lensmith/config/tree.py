"""The whole config tree: every setting, its default and what it means, in one place.

Read by people as docs/config.md (generated from here), by `read_config` as the validator. No torch in here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Share = Annotated[float, Field(gt=0, lt=1)]
State = Literal["frozen", "adapted", "trained"]

PACK_TOKENS = {"cuda": 8192, "cpu": 2048}
"""pack.tokens where it is left open. On a GPU large matrix products; on a CPU what stays near its cache."""
BoxConvention = Literal["xyxy_1000", "xyxy_px", "xywh_px", "cxcywh_unit", "xyxy_unit", "resized_px"]
MetricName = Literal[
    "auto", "exact", "normalised", "boxed", "choice", "anls", "relaxed", "vqa_soft", "token_f1", "cer", "wer", "iou",
    "iou@0.5", "iou@0.75", "map", "point", "json_f1", "json_schema", "format",
]  # fmt: skip
OwnFunction = Annotated[str, StringConstraints(pattern=r"^.+\.py:\w+$")]
"""A function of a user's own."""
ServerAddress = Annotated[str, StringConstraints(pattern=r"^https?://[^/]+/?$")]
SidePx = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Columns(Section):
    """Which columns of a table hold what. Null: guessed from the names, and said."""

    image: str | None = None
    """A path, encoded bytes or base64; a list where a row has several."""
    video: str | None = None
    """A path, or a list of pictures that are its frames; a list of paths where a row has several."""
    question: str | None = None
    """What the user says."""
    answer: str | None = None
    """What the model learns to say."""
    system: str | None = None
    """A system turn before the question."""


class Images(Section):
    """How many language tokens an image may cost. One token is 32 x 32 pixels."""

    min_tokens: Annotated[int, Field(ge=1)] | None = None
    """Smaller pictures are enlarged to this. Null: the checkpoint's own minimum."""
    max_tokens: Annotated[int, Field(ge=1)] = 1280
    """Larger pictures are reduced to this, keeping their shape; the run says how many and by how much."""
    allow_shrink: bool = False
    """Whether it is known and meant that the median picture loses more than half its side; `check` calls it an error."""


class Video(Section):
    """How videos are cut into frames. Qwen3-VL reads frames in pairs, each pair under its time in seconds."""

    fps: Annotated[float, Field(gt=0)] = 2.0
    """Frames taken per second, fewer where max_frames says so; at least the checkpoint's own least, four, where there are."""
    max_frames: Annotated[int, Field(ge=2)] = 128
    """Most frames of one video, spread evenly over it."""
    max_tokens: Annotated[int, Field(ge=1)] = 12288
    """Most language tokens of one whole video; its frames are reduced to stay within."""


class Boxes(Section):
    """How boxes and points are written in the data, so that they can be converted to what the model speaks."""

    convention: BoxConvention = "xyxy_1000"
    """Corners from 0 to 1000 (Qwen3-VL); corners in pixels; COCO's x, y, width, height in pixels; YOLO's centre and size
    from 0 to 1; corners from 0 to 1; corners in pixels of the resized picture (Qwen2.5-VL)."""
    size_px: tuple[SidePx, SidePx] | None = None
    """Height and width that pixel values refer to. Null: those of the picture itself, upright; for resized_px, as seen."""
    target: Literal["xyxy_1000", "resized_px"] = "xyxy_1000"
    """What answers are converted to: 0 to 1000 for Qwen3-VL, pixels of the resized picture for Qwen2.5-VL."""


class Source(Section):
    """One of several data files, with its share of the samples."""

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row of this file is seen per epoch: 2 repeats it, 0.5 uses a seeded half."""
    image: Images | None = None
    """Token limits for the pictures of this file. Null: those of data.image."""
    boxes: Boxes | None = None
    """How boxes are written in this file. Null: as data.boxes says."""


class Data(Section):
    train: str | list[Source] | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file, here or at hf://, s3:// or gs://, a folder with images beside one such
    file, or a data set name."""
    test: str | Share | None = 0.05
    """A file like `train`, or a share of it held out by image, asked before and after. Null: nothing is held out."""
    image_root: str | Path | None = None
    """Folder that relative image paths start from, and stay in. Null: the folder of the data file."""
    columns: Columns = Columns()
    image: Images = Images()
    video: Video = Video()
    boxes: Boxes | None = None
    """Null: as a COCO, YOLO or LabelMe file's format says; other answers are left as they are, and `check` says what their
    numbers look like."""
    reasoning: Literal["keep", "drop"] = "keep"
    """Whether <think> parts of answers are learned or taken out first."""
    on_long: Literal["error", "shrink", "drop"] = "shrink"
    """A row over the token budget: stop, give its images fewer tokens, or leave it out. Text is never cut."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be read: stop and list all such rows, or leave them out and say so."""
    allow_urls: bool = False
    """Whether images may be fetched over http(s); addresses inside a private network are always refused."""
    allow_outside: bool = False
    """Whether image paths may lead out of image_root, as absolute paths or through `..` or links."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that read and prepare data. Null: chosen from the cores; 0: in the training process."""


class Tune(Section):
    method: Literal["lora", "qlora", "lora_8bit", "full"] = "lora"
    """Adapters beside 16-bit, 4-bit or 8-bit weights, or the weights themselves."""
    language: State = "adapted"
    """The decoder: frozen, adapted (LoRA) or trained (its own weights)."""
    attention: bool = True
    """Whether `language` covers the q, k, v and o projections."""
    mlp: bool = True
    """Whether `language` covers the gate, up and down projections."""
    vision: State = "frozen"
    """The image tower; frozen, it runs without a graph."""
    merger: State = "frozen"
    """The projector from tower to decoder, with the deepstack mergers."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Width of each adapter."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """LoRA scale is alpha / rank (alpha / sqrt(rank) with rslora). Null: 2 x rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Adapter dropout. Above 0 it turns prefix sharing off, because branches would need masks of their own."""
    rslora: bool = False
    """Scales by the square root of the rank, for ranks of 64 and more (arXiv:2312.03732)."""
    dora: bool = False
    """Learns the size of each weight column apart from its direction; slower (arXiv:2402.09353)."""
    quantise_vision: bool = False
    """With qlora, whether the tower and mergers are stored in 4 bits too. They are small and lose the most."""
    start_from: str | None = None
    """An adapter folder or run to go on from."""


class Packing(Section):
    tokens: Annotated[int, Field(ge=32)] | None = None
    """Tokens in one forward pass. Null: 8192 on a GPU, 2048 on a CPU."""
    together: bool = True
    """Whether several samples share one forward pass. False: one sample per pass, slower, the same result."""
    share_prefix: bool = True
    """Whether questions about one image share its tokens: same loss and gradients, less work."""
    check_packs: Annotated[int, Field(ge=0)] = 2
    """How many packs are replayed one sample at a time before training; a difference stops the run."""


class Optim(Section):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] | None = None
    """Null: adamw_8bit on a GPU with a real model, adamw otherwise."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Null: 2e-4 for lora and qlora, 1e-5 for full, and a tenth of these with task=grpo; docs/training.md says why."""
    vision_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Null: a tenth of learning_rate."""
    merger_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Null: learning_rate."""
    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training rows."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides epochs."""
    effective_samples: Annotated[int, Field(ge=1)] = 16
    """Samples per optimizer step, over all packs and processes; with task=grpo a sample is a completion."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak to the end."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's pull towards zero; never on norms, biases and other 1-d parameters."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Null: no clipping."""
    in_backward: bool = False
    """Whether each weight is updated as soon as its gradient is known, so that never all gradients are alive. For
    tune.method=full; needs max_grad_norm=null and steps of one pack."""
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    """How bf16 weights that are trained themselves are rounded after an update. Stochastic keeps small updates on average;
    nearest loses those below 0.4 % of a weight."""


class Memory(Section):
    recompute: Literal["none", "layers"] | Annotated[int, Field(ge=1)] = "layers"
    """`layers` keeps only each layer's input and computes it again in the backward pass: less memory, a third more work.
    A number does so for that many layers, from the first on."""
    offload: Literal["none", "inputs"] = "none"
    """`inputs` keeps the inputs of recomputed layers in host memory, copied while the GPU computes."""
    embedding: Literal["gpu", "host"] = "gpu"
    """`host` keeps the input embedding in host memory and fetches the rows of each pack."""
    head: Literal["gpu", "host"] = "gpu"
    """`host` keeps the language head in host memory and copies it past the GPU piece by piece in each pass."""
    head_bits: Literal[16, 8, 4] = 16
    """Bits per weight of a frozen language head."""
    tower: Literal["gpu", "host"] = "gpu"
    """`host` takes the frozen image tower off the GPU while the decoder runs."""
    stream_layers: Annotated[int, Field(ge=0)] = 0
    """Frozen decoder layers, from the first on, that stay in host memory and are copied ahead of their use: for cards
    smaller than the model, at the price of the copies."""
    vision_cache_gib: Annotated[float, Field(gt=0)] | None = None
    """GiB in which features of pictures from a frozen tower are kept, so that later epochs need not compute them; those
    used least recently go first. In host memory (of each process), or on disk in vision_cache_dir. Null: nothing is kept."""
    vision_cache_dir: Path | None = None
    """Folder for kept features, which other runs of the same model find as well. Null: in host memory."""


class Grpo(Section):
    """Reinforcement learning from rewards: several answers to each question, each judged against the others."""

    group: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt. Its pictures are computed once for all; optim.effective_samples counts completions."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Longer completions are cut, and counted."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling, and of the log-probabilities that are learned from."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest words that together have this probability. Null: from all."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Draw from so many likeliest words. Null: from all."""
    min_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Draw from words at least this share as likely as the likeliest. Null: from all."""
    rewards: Annotated[list[str | dict[str, Any]], Field(min_length=1)] = ["math_boxed"]
    """Names from docs/rewards.md, `file.py:function` for one's own, or {name: ..., weight: 0.5, ...}; they are added up."""
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = "dapo"
    """TRL's loss types; they differ in what the sum over tokens is divided by and in how ratios are bounded."""
    importance: Literal["token", "sequence"] = "token"
    """Ratio of new and old policy for each token, or for the whole completion (GSPO, arXiv:2507.18071)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What a reward's distance from its group's mean is divided by: the group's spread, the batch's, or nothing."""
    epsilon: Annotated[float, Field(gt=0)] = 0.2
    """A ratio this far below 1 is clipped."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """And this far above 1. Null: as epsilon."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence from the model as the run found it: with tune.start_from, the one that starts it."""
    iterations: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on the same completions."""
    mask_truncated: bool = False
    """Whether completions that max_new_tokens cut off are left out of the loss."""


class Rollouts(Section):
    """How completions are made during GRPO."""

    engine: Literal["auto", "builtin", "vllm"] = "auto"
    """What writes them. builtin: on the weights that train, each prompt and its pictures once per group. vllm: TRL's vLLM, with
    a copy of the weights that every step brings up to date. auto: builtin, and said."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """vLLM in this process, on the same GPU; or `vllm serve` on other GPUs. docs/grpo.md has its command."""
    vllm_gpu_share: Share = 0.3
    """Of the GPU's memory that vLLM beside the training takes: its copy of the weights in 16 bits, keys and values."""
    vllm_server: ServerAddress = "http://127.0.0.1:8000"
    """Where the server listens."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Completions that the built-in engine writes at the same time. Null: all of a step."""
    on_reward_error: Literal["count", "raise"] = "count"
    """A reward that fails: no reward for that completion, counted and shown; or stop."""
    show_every_steps: Annotated[int, Field(ge=1)] = 1
    """How often completions are kept in completions.jsonl and the page is drawn anew."""


class Eval(Section):
    metric: MetricName | OwnFunction = "auto"
    """How answers are judged: docs/evaluation.md has the table. auto: boxed with the reward math_boxed, else guessed from the
    answers, and said. One's own: my_metrics.py:price_match."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Answers the held-out questions every so many steps, and keeps the checkpoint with the best score. Null: only before and
    after."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Ends the run, with the weights of its best checkpoint, after so many rounds without a better score. Null: never."""
    samples: Annotated[int, Field(ge=1)] | None = 500
    """At most this many held-out samples, drawn by the seed. Null: all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longer answers are cut, and counted."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Questions answered together."""


class Log(Section):
    every_steps: Annotated[int, Field(ge=1)] = 1
    """How often the loggers below are told; metrics.jsonl has every step."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Loggers besides metrics.jsonl; wandb and trackio come with the extras of that name."""


class Save(Section):
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Null: at the end of each epoch."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept; the newest ones."""


class RunConfig(Section):
    """One fine-tuning run."""

    model: str = "lensmith/tiny"
    """A name such as Qwen/Qwen3-VL-8B-Instruct, a local folder, or the embedded lensmith/tiny."""
    engine: Literal["lensmith", "unsloth"] = "lensmith"
    """Whose model and kernels train. unsloth: Unsloth's own, where it is installed and there is a GPU; rows, pixels, files and
    everything after training stay the same."""
    task: Literal["sft", "grpo"] = "sft"
    """Supervised fine-tuning on the answers of the data, or reinforcement learning with rewards that compare with them."""
    data: Data = Data()
    tune: Tune = Tune()
    pack: Packing = Packing()
    optim: Optim = Optim()
    memory: Memory = Memory()
    grpo: Grpo = Grpo()
    rollout: Rollouts = Rollouts()
    eval: Eval = Eval()
    log: Log = Log()
    save: Save = Save()
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the GPU has it, fp16 with a loss scaler on older ones, fp32 on a CPU."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Draws the order, the held-out share, adapters and the questions asked."""
    run: Path = Path("runs/sft")
    """The folder for everything this run leaves behind; an existing one is resumed."""
