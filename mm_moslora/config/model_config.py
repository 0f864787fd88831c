"""Recipes: the parts of the model, and its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mm_moslora.config.recipe_keys import (
    ANY_ADAPTER,
    ANY_METHOD,
    ASSEMBLED,
    BASE,
    FACTORS,
    MODEL,
    OWN_LOOP,
    PATH,
    PICTURES,
    PROMPTS,
    ROUNDING,
    WEIGHTS,
    at_least,
    changed_keys,
    keys_with,
    require,
)

Mode = Literal["frozen", "adapter", "last_n", "full"]
Thinking = Literal["auto", "always", "never", "mask"]
BoxFormName = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "paligemma"]
BoxChoice = Literal["auto", BoxFormName]
MixerInit = Literal["orthogonal", "kaiming", "identity", "butterfly"]
ModuleMixerInit = Literal[MixerInit, "none"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder."""

    name: str = field(default="", metadata=MODEL | BASE)
    """Folder or hub id of a transformers vision model, a timm wrapper folder, or `open_clip:MODEL` by name. Empty with
    `model.vlm`, because a ready-made model has its own encoder."""
    revision: str | None = field(default=None, metadata=PICTURES | ASSEMBLED)
    """Hub revision (commit, tag or branch)."""
    pretrained: str | None = field(default=None, metadata=WEIGHTS | PICTURES | ASSEMBLED)
    """open_clip only: pretrained tag or weights file. None gives random weights."""
    feature_layer: int | list[int] = field(default=-2, metadata=PICTURES | ASSEMBLED)
    """Hidden state that feeds the projector (LLaVA: -2); several are concatenated along the width."""
    fuse_with: str | None = field(default=None, metadata=MODEL | PICTURES | ASSEMBLED)
    """A second encoder, named like the first. The features of both are concatenated (prismatic: DINOv2 and SigLIP)."""
    select: Literal["patch", "cls_patch"] = field(default="patch", metadata=PICTURES | ASSEMBLED)
    """`patch` drops the tokens before the first patch (CLS, registers), `cls_patch` keeps CLS."""
    image_size: int | None = field(default=None, metadata=PICTURES | ASSEMBLED)
    """Side of the input in pixels; None keeps the encoder's own."""
    mode: Mode = field(default="frozen", metadata=ANY_ADAPTER)
    """frozen, adapter (MoSLoRA in its linear layers), last_n (train the last blocks) or full."""
    last_n: int = field(default=0, metadata=ANY_ADAPTER)
    """Blocks to train when mode is `last_n`."""
    feature_cache: str | None = field(default=None, metadata=PATH | ROUNDING | ANY_ADAPTER | OWN_LOOP)
    """Folder of a frozen encoder's features, so that each image is encoded once for all runs. This saves time where the
    encoder is large compared with the language model and images are seen again. None: no cache."""
    feature_cache_gib: float = field(default=0.0, metadata=ROUNDING | ANY_ADAPTER)
    """Largest size of the cache for one encoder. 0: the cache grows until only 1 GiB of the disk is free."""

    def __post_init__(self) -> None:
        require(
            (self.mode == "last_n") == (self.last_n > 0),
            f"model.vision: mode is {self.mode!r} and last_n is {self.last_n}; "
            "set last_n >= 1 exactly for mode last_n.",
        )
        require(
            self.feature_cache is None or self.mode == "frozen",
            f"model.vision.feature_cache is set, but mode is {self.mode!r}: an encoder that trains gives other "
            "features at every step. Leave feature_cache out, or set mode: frozen.",
        )
        at_least("model.vision.feature_cache_gib", self.feature_cache_gib, 0)
        at_least("model.vision.image_size", self.image_size or 1, 1)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The projector from vision features to the language model's embedding space."""

    kind: str = field(default="mlp2x_gelu", metadata=PICTURES | ASSEMBLED)
    """linear, mlp2x_gelu (or mlp3x_gelu and so on), fused_mlp, avg_pool, pixel_shuffle, c_abstractor, perceiver or
    qformer."""
    shuffle: int = field(default=2, metadata=PICTURES | ASSEMBLED)
    """pixel_shuffle and avg_pool: side of the square of patches that becomes one visual token."""
    queries: int = field(default=64, metadata=PICTURES | ASSEMBLED)
    """perceiver, qformer and c_abstractor: visual tokens per image (c_abstractor: a square number)."""
    depth: int = field(default=2, metadata=PICTURES | ASSEMBLED)
    """perceiver, qformer and c_abstractor: blocks (c_abstractor: in each of its two stages)."""
    scale_to_embeddings: bool = field(default=False, metadata=ANY_ADAPTER | ASSEMBLED)
    """Scale the last layer at initialisation so that visual tokens have the norm of word embeddings."""
    fit_to_answers: bool = field(default=False, metadata=ANY_ADAPTER | ASSEMBLED)
    """Initialise the projector by least squares on up to 1,024 images of the training data. Its visual tokens then
    point towards the word embeddings of the image's answers and have their norm. Useful for small data sets with short
    answers. Not available for c_abstractor, perceiver and qformer."""
    weights: str | None = field(default=None, metadata=PATH | ANY_ADAPTER | ASSEMBLED)
    """Projector weights to start from: the run folder of an align stage, one of its checkpoints, or a
    `projector.safetensors`."""
    mode: Literal["auto", "frozen", "full"] = field(default="auto", metadata=ANY_ADAPTER)
    """Whether it trains. auto: the projector of an assembled model trains, that of a ready-made model does not."""

    def __post_init__(self) -> None:
        for name in ("shuffle", "queries", "depth"):
            at_least(f"model.projector.{name}", getattr(self, name), 1)
        require(
            not self.fit_to_answers or self.kind not in ("c_abstractor", "perceiver", "qformer"),
            f"model.projector: fit_to_answers is set, but {self.kind} does not begin with a linear layer to fold the "
            "features' mean and spread into. Leave it out, or choose another kind.",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The parts of the model."""

    language: str | None = field(default=None, metadata=MODEL | BASE)
    """Folder or hub id of a causal language model, which is assembled with `vision` and `projector`."""
    vlm: str | None = field(default=None, metadata=MODEL | BASE)
    """Folder or hub id of a ready-made vision-language model, used with its own processor. Replaces `language`,
    `vision` and `projector`."""
    vlm_revision: str | None = field(default=None, metadata=BASE)
    """Hub revision of the ready-made model."""
    language_revision: str | None = field(default=None, metadata=BASE | ASSEMBLED)
    """Hub revision of the language model."""
    language_mode: Mode = field(default="adapter", metadata=ANY_ADAPTER)
    """frozen, adapter (MoSLoRA), last_n or full."""
    language_last_n: int = field(default=0, metadata=ANY_ADAPTER)
    """Decoder layers to train when language_mode is `last_n`."""
    vision: VisionConfig | None = None
    """The vision encoder of an assembled model. None: a language model alone."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Ignored when there is no vision encoder."""
    image_aspect: Literal["pad", "resize", "crop", "anyres"] = field(default="pad", metadata=PICTURES | ASSEMBLED)
    """pad to a square with the mean colour (LLaVA-1.5), resize without keeping the aspect ratio, resize and
    centre-crop, or anyres: the whole image and tiles of it, with a newline embedding after every row (LLaVA-NeXT)."""
    anyres_tiles: list[tuple[int, int]] = field(
        default_factory=lambda: [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)], metadata=PICTURES | ASSEMBLED
    )
    """anyres only: the tile grids (rows, columns) from which one is chosen by the image's shape."""
    min_pixels: int | None = field(default=None, metadata=PICTURES)
    """Smaller pictures are enlarged to this many pixels, by processors that have such a budget (Qwen-VL, GLM-V,
    PaddleOCR-VL and others, ready-made). None: as the model has it."""
    max_pixels: int | None = field(default=None, metadata=PICTURES)
    """Larger pictures are shrunk to this many pixels, by the same processors; of an assembled model with anyres, larger
    grids of tiles are left out. None: as the model has it."""
    chat_template: str | None = field(default=None, metadata=PROMPTS)
    """LLaVA's plain, v1, llama_2, llama_3, chatml, mistral, gemma or phi3, or alpaca (that of LLM-Adapters); None: the
    tokenizer's own."""
    faithful: bool = field(default=False, metadata=PROMPTS)
    """With chat_template: use the token ids of LLaVA's own code where those are sound, instead of the tokenizer's."""
    system_prompt: str | None = field(default=None, metadata=PROMPTS)
    """Replaces the chat template's default system prompt, in training and in every export; "" leaves it empty."""
    thinking: Thinking = field(default="auto", metadata=PROMPTS)
    """Handling of `<think>...</think>` at the start of an answer, for chat templates that support it. auto: always,
    where most records end with an answer that thinks; else thinking is learned, and all other answers and prompts get
    the template's empty block. always: prompts do not contain the block, so that the model writes it when it answers.
    mask: as always, and the block is not learned: the answer is, behind it. never: thinking is removed from the
    records."""
    boxes: BoxChoice = field(default="auto", metadata=PROMPTS)
    """The form in which boxes and points of records are written, and those of answers are read. qwen3_vl: 0 to 1000,
    `[x1, y1, x2, y2]`, lists as JSON with `bbox_2d`. qwen2_5_vl: the same in pixels of the resized picture. qwen2_vl: 0
    to 999, `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`. internvl: 0 to 1000, `<box>[[x1, y1, x2, y2]]</box>`. paligemma:
    0 to 1023, four `<loc0000>`, y first. auto: that of the ready-made model, where its family or vocabulary shows one;
    qwen3_vl for an assembled model."""
    attention: str = field(default="auto", metadata=ROUNDING | ANY_ADAPTER | OWN_LOOP)
    """auto picks the fastest exact one for padding-free batches; or a transformers attention name."""
    quantisation: Literal["none", "nf4", "int8"] = "none"
    """Load the language model's linear layers in 4 bits (nf4, double quantised) or 8; needs bitsandbytes. The head, the
    vision tower and the projector stay as they are."""
    lean_layers: bool = field(default=True, metadata=ROUNDING | ANY_ADAPTER | OWN_LOOP)
    """Decoder layers of known families keep less for the backward pass; the computed values do not change."""
    kernels: Literal["auto", "torch", "triton", "liger"] = field(
        default="auto", metadata=ROUNDING | ANY_ADAPTER | OWN_LOOP
    )
    """triton: Triton kernels between the matrix products of lean layers, and for adapter dropout, on a GPU. liger:
    Liger's between the products, where it has them; needs liger-kernel. torch: PyTorch's own operators.
    auto: triton on a GPU. `train.compile` compiles the operators between the products; auto then has Triton kernels for
    dropout alone."""

    def __post_init__(self) -> None:
        idle = [key for key, facts in changed_keys(self, "model.") if self.vlm and facts.get("model") == "assembled"]
        require(
            not idle,
            f"{', '.join(idle)} {'is' if len(idle) == 1 else 'are'} set, but model.vlm names a ready-made model, which "
            "has its own parts, so the setting would have no effect. Leave it out, or assemble a model "
            "(model.language).",
        )
        require(
            "/" not in self.attention,
            f"model.attention is {self.attention!r}, native code of the hub, which no recipe names. Write auto, or "
            "a name of transformers' own, such as sdpa.",
        )
        require(
            (self.language is None) != (self.vlm is None),
            f"model: language is {self.language!r} and vlm is {self.vlm!r}; name exactly one of them: a language model "
            "to assemble, or a ready-made vision-language model.",
        )
        require(
            self.vision is None or bool(self.vision.name) == (self.vlm is None),
            "model.vision.name names an encoder to assemble: it is needed with model.language, and a ready-made model "
            "(model.vlm) brings its own, so leave it out there.",
        )
        cached = self.vision is not None and self.vision.feature_cache is not None
        require(
            not cached or (self.vlm is None and self.image_aspect != "anyres"),
            "model.vision.feature_cache keeps the features of an assembled encoder that sees one square per picture; "
            "ready-made models (model.vlm) and image_aspect anyres have none. Leave it out.",
        )
        require(
            (self.language_mode == "last_n") == (self.language_last_n > 0),
            f"model: language_mode is {self.language_mode!r} and language_last_n is {self.language_last_n}; "
            "set language_last_n >= 1 exactly for language_mode last_n.",
        )
        require(
            self.quantisation == "none" or self.language_mode in ("adapter", "frozen"),
            f"model.quantisation is {self.quantisation!r} and language_mode {self.language_mode!r}: weights of 4 or 8 "
            "bits do not train. Set language_mode: adapter, or quantisation: none.",
        )
        require(
            self.chat_template is None or self.vlm is None,
            f"model.chat_template is {self.chat_template!r}, but a ready-made model (model.vlm) keeps its own.",
        )
        require(
            not self.faithful or self.chat_template is not None,
            "model.faithful is set; it means LLaVA's token ids, so set model.chat_template to one of LLaVA's.",
        )
        require(
            self.lean_layers or self.kernels not in ("triton", "liger"),
            f"model.kernels is {self.kernels!r}, but model.lean_layers is false, and these kernels run only in lean "
            "layers. Set lean_layers: true, or kernels: auto.",
        )
        for name in ("min_pixels", "max_pixels"):
            at_least(f"model.{name}", value if (value := getattr(self, name)) is not None else 1, 1)
        require(
            self.min_pixels is None or self.max_pixels is None or self.min_pixels <= self.max_pixels,
            f"model.min_pixels is {self.min_pixels}, more than model.max_pixels, {self.max_pixels}.",
        )
        tiles = self.anyres_tiles
        require(
            bool(tiles) and all(rows >= 1 and columns >= 1 for rows, columns in tiles),
            f"model.anyres_tiles is {tiles}, expected at least one pair of rows and columns, each 1 or more.",
        )

    @property
    def has_adapters(self) -> bool:
        """Whether a part of it is adapted."""
        return self.language_mode == "adapter" or (self.vision is not None and self.vision.mode == "adapter")

    @property
    def projector_trains(self) -> bool:
        """Whether a projector trains; `auto` trains that of an assembled model."""
        has_images = self.vlm is not None or self.vision is not None
        return has_images and (self.projector.mode == "full" or (self.projector.mode == "auto" and self.vlm is None))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """MoSLoRA: y = W0 x + s * B M A dropout(x)."""

    rank: int = field(default=64, metadata=FACTORS | ANY_METHOD)
    """r, the size of the mixer."""
    alpha: float = field(default=128.0, metadata=FACTORS | ANY_METHOD)
    """s = alpha / rank (or alpha / sqrt(rank) with use_rslora)."""
    dropout: float = field(default=0.0, metadata=ANY_METHOD | OWN_LOOP)
    """Dropout on the adapter's input."""
    mixer_init: MixerInit = "orthogonal"
    """orthogonal keeps LoRA's scale; kaiming is the paper's best; identity + frozen mixer is plain LoRA."""
    mixer_trainable: bool = True
    """False freezes the mixer (identity: LoRA; butterfly: two-subspaces-mixing)."""
    mixer_pattern: dict[str, ModuleMixerInit] = field(default_factory=dict)
    """Per-module override of mixer_init, by regular expression on the end of the module path; none: no mixer there."""
    factor_form: Literal["free", "mixed"] = "free"
    """free: A and B train. mixed: A starts as M A, and there is no mixer (MoSLoRA's start, plain LoRA from there)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Per-module override of rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Per-module override of alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    use_dora: bool = False
    """Train the norm of every row of the adapted weight separately from its direction (DoRA, 2402.09353). Of plain LoRA
    alone: mixer_init identity, mixer_trainable false."""
    targets: str | list[str] = field(default="all-linear", metadata=ANY_METHOD)
    """all-linear (every linear layer except the head) or names of linear layers, within the adapted component."""
    weights: str | None = field(default=None, metadata=PATH)
    """Adapter to start from: a run folder, a checkpoint, or an adapter folder (also of `Trainer`, or PEFT's LoRA). Its
    factors and modules replace freshly initialised ones. rank and alpha must match the folder."""
    peft: dict[str, Any] = field(default_factory=dict, metadata=ANY_METHOD | OWN_LOOP)
    """Another method of PEFT in the place of MoSLoRA: its name as `type` (HIRA, MISS, LORA, VERA ...), and options of
    its own configuration. rank, alpha, dropout and targets come from the keys above where it has such options."""

    def __post_init__(self) -> None:
        at_least("adapter.rank", self.rank, 1)
        require(self.alpha > 0, f"adapter.alpha is {self.alpha}, expected more than 0.")
        require(0.0 <= self.dropout < 1.0, f"adapter.dropout is {self.dropout}, expected 0 <= dropout < 1.")
        if not self.peft:
            return
        name = self.peft.get("type")
        require(
            isinstance(name, str) and bool(name),
            f"adapter.peft.type is {name!r}, expected the name of a method of PEFT, such as HIRA.",
        )
        idle = [key for key, facts in changed_keys(self, "adapter.") if "peft" not in facts]
        shared = [key for key in keys_with(type(self), "peft", "any") if key != "peft"]
        require(
            not idle,
            f"{' and '.join(idle)} would have no effect on PEFT's {name} (adapter.peft), which reads "
            f"{', '.join(shared)} and its own options. Leave it out.",
        )
