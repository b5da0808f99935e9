"""Rotary position embedding as a module: cos and sin for given positions, and who applies them.

Rope types "dynamic" and "longrope" have frequencies for a length, chosen by `length`:

a number        of tokens that prompts and what follows them are planned to have at most
None            max_position_embeddings: "dynamic" is then as trained, "longrope" uses long_factor
                where that exceeds original_max_position_embeddings
"per_forward"   the longest position of each forward, as transformers does. The keys in a cache then
                keep the frequencies of their own forward, so that decoding past the switch differs
                from a forward over all tokens, and a short row depends on the longest beside it

With a number or None the frequencies are made once: cached decoding equals the full forward, and a
row equals itself alone. No policy waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.rotary.api import resolve_rotary, rotary
from swathe.modeling.decoder_config import DecoderConfig
from swathe.modeling.errors import ConfigError
from swathe.modeling.policy import KernelModule
from swathe.modeling.rope import ROPE_TYPES, RopeType, check_fits, normalised

Length = int | Literal["per_forward"] | None


class Rotation(NamedTuple):
    """The angles of one forward pass, made once, and the backend that turns queries and keys."""

    cos: Tensor
    sin: Tensor
    choice: Choice
    interleaved: bool = False

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D) and k (B, K, T, D) rotated, with HF's roundings.

        Where cos and sin are narrower than the heads, the features past them stay as they are.
        """
        return rotary(
            q,
            k,
            self.cos,
            self.sin,
            rotary_dim=self.cos.shape[-1],
            interleaved=self.interleaved,
            casting="llama",
            implementation=self.choice,
        )


class RotaryEmbedding(KernelModule):
    """cos and sin (B or 1, T, R) for positions (B or 1, T): fp32, rounded at the end.

    R is head_dim, or int(head_dim * partial_rotary_factor). Pairs are halves of R, or with
    `interleaved` neighbours. Raises ConfigError for parameters that are wrong or do not fit
    `head_dim`, for a `length` other than above, and for a type that depends on a length without
    max_position_embeddings.
    """

    op: ClassVar[str] = "rope"
    inv_freq: Tensor
    longest: Tensor | None

    def __init__(
        self,
        parameters: Mapping[str, Any],
        head_dim: int,
        *,
        max_position_embeddings: int | None = None,
        length: Length = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.rope = normalised(parameters, {})
        check_fits(self.rope, head_dim, partial=True)
        self.head_dim, self.interleaved = head_dim, interleaved
        if max_position_embeddings is not None:
            self.rope["max_position_embeddings"] = max_position_embeddings
        elif self.kind.at_length:
            raise ConfigError(
                f"rope_type {self.rope['rope_type']!r} depends on a length; give RotaryEmbedding "
                "max_position_embeddings, or use RotaryEmbedding.of(config)"
            )
        self.length = _checked_length(length, max_position_embeddings)
        self.register_buffer("inv_freq", None, persistent=False)
        self.register_buffer("longest", None, persistent=False)
        self.reset_buffers(None)
        self.choice = self.pick(AUTO)

    @classmethod
    def of(cls, config: DecoderConfig, *, interleaved: bool = False) -> Self:
        """The embedding that a configuration with one set of rope parameters asks for."""
        assert config.rope_parameters is not None and config.head_dim is not None
        return cls(
            config.rope_parameters,
            config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            length=config.rope_length,
            interleaved=interleaved,
        )

    @property
    def kind(self) -> RopeType:
        """The rope type's row in ROPE_TYPES."""
        return ROPE_TYPES[self.rope["rope_type"]]

    def pick(self, implementation: str) -> Choice:
        """A backend for the frequencies' device."""
        like = self.inv_freq.new_empty(1, 1, 1, self.head_dim)
        return resolve_rotary(like, like[0, 0], implementation)

    def reset_buffers(self, device: torch.device | None) -> None:
        """Compute the frequencies on `device`; used after a build on the meta device."""
        kind = self.kind
        self.inv_freq, self.factor = kind.frequencies(self.rope, self.head_dim, device)
        device = self.inv_freq.device
        if kind.at_length is None:
            return
        if isinstance(self.length, int):
            planned = torch.tensor(self.length, device=device)
            self.inv_freq = kind.at_length(self.inv_freq, self.rope, planned)
        elif kind.keeps_longest:
            self.longest = torch.tensor(self.rope["max_position_embeddings"], device=device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        unfilled = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        # a model in half precision keeps its frequencies in fp32; off meta they come as garbage
        if unfilled or self.inv_freq.dtype != torch.float32:
            self.reset_buffers(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation for `positions`, cos and sin in `dtype`."""
        with torch.no_grad():
            angles = positions[..., None].float() * self._frequencies(positions)
            if self.interleaved:
                angles = angles.repeat_interleave(2, dim=-1)
            else:
                angles = torch.cat((angles, angles), dim=-1)
            cos, sin = (
                (angles.cos() * self.factor).to(dtype),
                (angles.sin() * self.factor).to(dtype),
            )
            return Rotation(cos, sin, self.choice, self.interleaved)

    def _frequencies(self, positions: Tensor) -> Tensor:
        """(R / 2,): the planned ones, or those of this forward's longest position."""
        at_length = self.kind.at_length if self.length == "per_forward" else None
        if at_length is None:
            return self.inv_freq
        length = positions.max() + 1
        if self.longest is not None:
            # transformers goes on with a longer theta until a forward fits into the trained length
            trained = self.rope["max_position_embeddings"]
            kept = torch.maximum(length, self.longest)
            self.longest.copy_(kept.masked_fill(length < trained, trained))
            length = self.longest
        return at_length(self.inv_freq, self.rope, length)

    def extra_repr(self) -> str:
        """The rope type and the backend in use."""
        length = f", length={self.length!r}" if self.kind.at_length else ""
        return f"{self.rope['rope_type']!r}{length}, backend={self.choice.backend}"


class RotaryByLayerType(nn.ModuleDict):
    """One RotaryEmbedding for each layer type of a model whose layer types differ in them."""

    @classmethod
    def of(cls, config: DecoderConfig, *, interleaved: bool = False) -> Self:
        """Those of `config`, whose rope_parameters are {layer type: parameters}."""
        assert config.rope_parameters is not None and config.head_dim is not None
        return cls(
            {
                layer_type: RotaryEmbedding(
                    parameters,
                    config.head_dim,
                    max_position_embeddings=config.max_position_embeddings,
                    length=config.rope_length,
                    interleaved=interleaved,
                )
                for layer_type, parameters in config.rope_parameters.items()
            }
        )

    def forward(self, positions: Tensor, dtype: torch.dtype) -> dict[str, Rotation]:
        """The rotation of each layer type for `positions` (B or 1, T), as RotaryEmbedding's."""
        return {name: cast(Rotation, module(positions, dtype)) for name, module in self.items()}


def _checked_length(length: object, planned: int | None) -> int | str | None:
    if length is None or length == "per_forward":
        return planned if length is None else "per_forward"
    if isinstance(length, int) and not isinstance(length, bool) and length >= 1:
        return length
    raise ConfigError(
        f"length={length!r}; allowed: a number of tokens from 1, 'per_forward', or None for "
        "max_position_embeddings"
    )
