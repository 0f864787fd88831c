"""The mixer M of MoSLoRA: its forms, and how it starts.

Shapes: ``R`` rank, ``D_in`` and ``D_out`` the adapted layer's widths; A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.

The update is ``s * B M A``. Cut A into R rows and B into R columns: M holds the weight of every pair of a column
and a row (arXiv 2406.11909, section 3). Plain LoRA is M = I: each row is paired with its own column only.

A `MixerForm` makes M of tensors: of R x R weights, of R (a diagonal), of blocks. `MIXER_FORMS` holds the forms by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.utils.errors import AdapterError, suggestion

MixerInit = Literal["orthogonal", "kaiming", "identity", "butterfly"]
MIXER_INITS: tuple[str, ...] = get_args(MixerInit)
Form = TypeVar("Form")
NO_MIXER = "none"
"""In `mixer_pattern`: a module without a mixer, plain LoRA."""


def init_mixer(rank: int, kind: str, *, generator: torch.Generator | None = None) -> Tensor:
    """A fresh mixer, in float32 on the CPU: half precision has no QR, and a seed gives one mixer on every device.

    Args:
        rank: R.
        kind: orthogonal (keeps LoRA's scale, condition number 1), kaiming (uniform, a = sqrt(5); the paper's best on
            commonsense reasoning), identity (LoRA's starting point) or butterfly (the paper's two-subspaces mixing).
        generator: source of randomness; None is torch's global CPU generator.

    Returns:
        ``[R, R]``.

    Raises:
        AdapterError: unknown kind, rank below 1, or an odd rank with butterfly.
    """
    if rank < 1:
        raise AdapterError(f"The rank is {rank}, expected at least 1.")
    check_mixer_init(kind, "mixer_init")
    if kind == "butterfly":
        return butterfly(rank)
    if kind == "identity":
        return torch.eye(rank, dtype=torch.float32, device="cpu")
    mixer = torch.empty(rank, rank, dtype=torch.float32, device="cpu")
    if kind == "orthogonal":
        return nn.init.orthogonal_(mixer, generator=generator)
    return nn.init.kaiming_uniform_(mixer, a=math.sqrt(5), generator=generator)


@contextmanager
def random_stream_of_mixers() -> Iterator[None]:
    """Random numbers of another stream within the block; the CPU's global stream goes on as if none had been drawn.

    So the start of a mixer changes no A: with one seed, LoRA and MoSLoRA begin at the same A in every layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
        yield


def check_mixer_init(kind: str, where: str, *, choices: tuple[str, ...] = MIXER_INITS) -> None:
    """Refuse what is not a mixer initialisation, with the reason; `where` is the option that holds it.

    Raises:
        AdapterError: unknown, or `zeros`.
    """
    if kind in ("zeros", "zero"):
        raise AdapterError(
            f"{where} is {kind!r}: with M = 0 and B = 0 the gradients of A, M and B are all exactly zero, so training "
            f"never starts. Use one of {', '.join(MIXER_INITS)}."
        )
    if kind not in choices:
        hint = suggestion(str(kind), choices)
        raise AdapterError(f"{where} is {kind!r}, expected one of {', '.join(choices)}.{hint}")


def butterfly(rank: int) -> Tensor:
    """The fixed mixer of two-subspaces mixing, ``[[I, I], [I, I]]`` with identity blocks of size R / 2.

    With A1, A2 the upper and lower half of A's rows and B1, B2 the left and right half of B's columns, ``B M A`` is
    ``(B1 + B2)(A1 + A2)``: LoRA's ``B1 A1 + B2 A2`` and the crossed pairs ``B1 A2 + B2 A1`` (arXiv 2406.11909, 2.2).

    Args:
        rank: R, even.

    Returns:
        float32 ``[R, R]`` of matrix rank R / 2.

    Raises:
        AdapterError: R is odd.
    """
    if rank % 2:
        raise AdapterError(
            f"The butterfly mixer pairs two halves of the rank, but the rank is {rank}. Use an even rank."
        )
    half = torch.eye(rank // 2, dtype=torch.float32, device="cpu")
    return half.repeat(2, 2)


class MixerForm:
    """How M is made of tensors: which ones, how they start, and what they do to subspace coordinates.

    A form of one's own is a subclass with `shapes`, `identity` and `matrix`, and a line ``MIXER_FORMS["name"] = Form``.
    M that depends on its input has no matrix: such a form gives `apply` in the place of `matrix`. It trains, is saved
    and loaded, and cannot be folded or merged.
    """

    size_means: ClassVar[str] = ""
    """What SIZE is in the option ``mixer_form="name:SIZE"``; empty: the form takes none."""
    inits: ClassVar[tuple[str, ...]] = ()
    """Values of `mixer_init` that `start` follows; empty: the form has one start of its own."""

    def __init__(self, spec: str, size: int) -> None:
        """Use `form_named`; `size` is the number in the option, 0 without one."""
        self.spec, self.size = spec, size

    @property
    def fixed(self) -> bool:
        """Whether M is one matrix for all inputs."""
        return type(self).matrix is not MixerForm.matrix

    def check(self, rank: int) -> None:
        """Refuse a rank that the form cannot have.

        Raises:
            AdapterError: it cannot.
        """

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The tensors that train and are saved: their shapes by name. Only M itself may be called `weight`."""
        raise NotImplementedError

    def identity(self, rank: int) -> dict[str, Tensor]:
        """Tensors that make M the identity, in float32 on the CPU. An adapter without mixers loads with them."""
        raise NotImplementedError

    def products(self, rank: int) -> int:
        """Multiplications that M takes per row of B, or of subspace coordinates: fewer than R^2 where M has zeros."""
        return rank * rank

    def start(self, rank: int, kind: str) -> dict[str, Tensor]:
        """Tensors to begin training with, in float32 on the CPU; those of `identity` unless a form has others for one
        of its `inits`."""
        return self.identity(rank)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """M ``[R, R]`` from tensors in float32 (in float64 where the model is), differentiable in them.

        Raises:
            AdapterError: the form has none.
        """
        raise AdapterError(
            f"The mixer form {self.spec!r} depends on the layer's input, so M is no matrix: this adapter cannot be "
            f"folded into plain LoRA, merged, exported or inspected. "
            "Use it unmerged, with mm_moslora.adapters."
        )

    def rounded_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """M in the dtype of its tensors, computed in float32: PyTorch inverts no matrix in half precision.

        Raises:
            AdapterError: see `matrix`.
        """
        dtype = next(iter(tensors.values())).dtype
        if dtype not in (torch.bfloat16, torch.float16):
            return self.matrix(tensors)
        return self.matrix({name: tensor.float() for name, tensor in tensors.items()}).to(dtype)

    def apply(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``M z`` of every row of subspace coordinates ``[..., R]``, in their dtype."""
        return F.linear(z, self.rounded_matrix(tensors))


class Dense(MixerForm):
    """M itself, ``[R, R]``."""

    inits = MIXER_INITS

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """R x R weights."""
        return {"weight": (rank, rank)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        """I."""
        return {"weight": torch.eye(rank, device="cpu")}

    def start(self, rank: int, kind: str) -> dict[str, Tensor]:
        """See `init_mixer`."""
        return {"weight": init_mixer(rank, kind)}

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself."""
        return tensors["weight"]

    rounded_matrix = matrix


class Diagonal(MixerForm):
    """One weight per rank-1 subspace, ``[R]``; each starts at 1."""

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """R weights."""
        return {"weight": (rank,)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        """Ones."""
        return {"weight": torch.ones(rank, device="cpu")}

    def products(self, rank: int) -> int:
        """R."""
        return rank

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weights on the diagonal."""
        return torch.diag(tensors["weight"])

    def apply(self, z: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``z`` times the weights."""
        return z * tensors["weight"]


class BlockDiagonal(MixerForm):
    """SIZE dense blocks on the diagonal, ``[SIZE, R / SIZE, R / SIZE]``: subspaces mix within their group."""

    size_means = "the number of blocks"
    inits = MIXER_INITS

    def check(self, rank: int) -> None:
        """The blocks are equal."""
        if rank % self.size:
            raise AdapterError(f"mixer_form is {self.spec!r}, and {self.size} blocks do not divide the rank {rank}.")

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The blocks."""
        return {"blocks": (self.size, rank // self.size, rank // self.size)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        """Identities."""
        return {"blocks": torch.eye(rank // self.size, device="cpu").repeat(self.size, 1, 1)}

    def products(self, rank: int) -> int:
        """Those of the blocks."""
        return rank * rank // self.size

    def start(self, rank: int, kind: str) -> dict[str, Tensor]:
        """Every block as a mixer of its size; see `init_mixer`."""
        return {"blocks": torch.stack([init_mixer(rank // self.size, kind) for _ in range(self.size)])}

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The blocks in one matrix."""
        return torch.block_diag(*tensors["blocks"])


class LowRank(MixerForm):
    """``M = I + left right`` with left ``[R, SIZE]`` and right ``[SIZE, R]``: 2 R SIZE weights instead of R^2."""

    size_means = "the rank of M - I"

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Both factors."""
        return {"left": (rank, self.size), "right": (self.size, rank)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        """A left factor of zero, beside a right one that lets it learn."""
        return {"left": torch.zeros(rank, self.size, device="cpu"), "right": torch.eye(self.size, rank, device="cpu")}

    def products(self, rank: int) -> int:
        """Those of both factors."""
        return 2 * rank * self.size

    def start(self, rank: int, kind: str) -> dict[str, Tensor]:
        """The identity; the right factor is random, with orthonormal rows where they fit."""
        right = nn.init.orthogonal_(torch.empty(self.size, rank, dtype=torch.float32, device="cpu"))
        return self.identity(rank) | {"right": right}

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``I + left right``."""
        product = tensors["left"] @ tensors["right"]
        return product + torch.eye(len(product), dtype=product.dtype, device=product.device)


MIXER_FORMS: dict[str, type[MixerForm]] = {
    "dense": Dense,
    "diagonal": Diagonal,
    "block_diagonal": BlockDiagonal,
    "low_rank": LowRank,
}
"""Forms by their names in `mixer_form`; add those of your own."""


def form_named(spec: str) -> MixerForm:
    """The form that an option names: `name`, or `name:SIZE` where the form takes a size.

    Raises:
        AdapterError: no such form, or a size that it lacks or does not take.
    """
    form, size = read_spec(spec, MIXER_FORMS, "mixer_form", table="MIXER_FORMS")
    return form(spec, size)


def read_spec(
    spec: str, forms: Mapping[str, type[Form]], option: str, *, table: str, others: tuple[str, ...] = ()
) -> tuple[type[Form], int]:
    """The class that `name` or `name:SIZE` means, and the size, 0 without one.

    Args:
        spec: value of an option.
        forms: classes by name; their `size_means` says whether they take a size.
        option: its name, for messages.
        table: the name of `forms`, to which a user's forms are added.
        others: values of the option that are no form, for messages.

    Raises:
        AdapterError: no such name, or a size that it lacks or does not take.
    """
    name, colon, size = spec.partition(":") if isinstance(spec, str) else (spec, "", "")
    if name not in forms:
        names = (*others, *forms)
        raise AdapterError(
            f"{option} is {spec!r}, expected one of {', '.join(names)}.{suggestion(str(name), names)} A "
            f"form of your own is known once the file that adds it to {table} is imported."
        )
    form: Any = forms[name]
    if not form.size_means and colon:
        raise AdapterError(f"{option} is {spec!r}, but {name} takes no size. Write {name!r}.")
    if form.size_means and not (size.isdecimal() and int(size)):
        raise AdapterError(f"{option} is {spec!r}; {name} takes {form.size_means}. Write '{name}:4', for example.")
    return form, int(size or 0)


def attach_form(tensors: Iterable[Tensor], spec: str) -> None:
    """Attach to tensors of mixers the name of their form, for those who get them without their configuration.

    PEFT and diffusers hand a state from its reader to its user as a dictionary of tensors, which they copy and rename.
    """
    for tensor in tensors:
        tensor.mixer_form = spec  # type: ignore[attr-defined]


def attached_form(tensors: Iterable[Tensor]) -> str | None:
    """The form that any of these tensors has attached; None: none has."""
    return next((spec for tensor in tensors if (spec := getattr(tensor, "mixer_form", None)) is not None), None)


def form_of(tensors: Mapping[str, Tensor]) -> MixerForm:
    """The form of a mixer whose configuration is not at hand.

    Raises:
        AdapterError: no form is attached (`attach_form`), and it does not keep M itself.
    """
    if (spec := attached_form(tensors.values())) is not None:
        return form_named(spec)
    if set(tensors) != {"weight"} or tensors["weight"].ndim not in (1, 2):
        raise AdapterError(
            f"A mixer of the tensors {', '.join(sorted(tensors))} has a form that only its configuration names. "
            "Load the adapter with its MoSLoRAConfig (load_adapter), or export it first (export_adapter)."
        )
    return form_named("dense" if tensors["weight"].ndim == 2 else "diagonal")
