"""Mixture of experts: a router picks k experts for each token, their outputs are added up.

    SoftmaxTopKRouter   probabilities of all experts, then the k largest: mixtral, qwen3_moe
    TopKSoftmaxRouter   the k largest logits, then their probabilities: gpt_oss
    Experts             every expert's gated MLP, in stacked parameters
    MixtralSparseMoeBlock, Qwen3MoeSparseMoeBlock, GptOssMLP: a router and its experts

Tokens are never dropped and share nothing, so a token's result is the same in any batch. Parameter
names and shapes are those of transformers 5.17's modules; files hold the experts one by one, which
MIXTRAL_TRANSFORMS and QWEN_MOE_TRANSFORMS say to the checkpoint code. gpt_oss is stored as it is.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swathe.kernels.core.registry import AUTO, Choice
from swathe.kernels.gated_mlp_act.api import ALPHA, LIMIT, gated_mlp_act, resolve_gated_mlp_act
from swathe.modeling.checkpoint.transforms import Concatenate, WeightTransform
from swathe.modeling.layers.grouped import Groups, combine, dispatch, grouped_linear
from swathe.modeling.policy import KernelModule

QWEN_MOE_TRANSFORMS = (
    WeightTransform(
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        "mlp.experts.gate_up_proj",
        (Concatenate(dim=1),),
    ),
    WeightTransform("mlp.experts.{expert}.down_proj.weight", "mlp.experts.down_proj"),
)
MIXTRAL_TRANSFORMS = (
    WeightTransform("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    WeightTransform(
        ("block_sparse_moe.experts.{expert}.w1.weight",
         "block_sparse_moe.experts.{expert}.w3.weight"),
        "mlp.experts.gate_up_proj",
        (Concatenate(dim=1),),
    ),
    WeightTransform("block_sparse_moe.experts.{expert}.w2.weight", "mlp.experts.down_proj"),
)  # fmt: skip

Routing = tuple[Tensor, Tensor, Tensor]


class Router(nn.Module):
    """Logits (N, E) of tokens (N, H), and what a subclass makes of them."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, bias: bool) -> None:
        super().__init__()
        _check_top_k(top_k, num_experts)
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights normal(0, std), biases too, as transformers has them."""
        for parameter in self.parameters():
            parameter.normal_(0.0, std)

    def logits(self, x: Tensor) -> Tensor:
        """(N, H) to (N, E)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes."""
        experts, hidden = self.weight.shape
        return f"{hidden}, experts={experts}, top_k={self.top_k}, bias={self.bias is not None}"


class SoftmaxTopKRouter(Router):
    """The k most probable experts, weighted by their probability among all of them.

    `norm_topk_prob` makes the weights of a token sum to 1. They are fp32, rounded to the logits'
    dtype where `round_scores` (qwen3_moe rounds them, mixtral does not).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool,
        round_scores: bool,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, bias=False)
        self.norm_topk_prob = norm_topk_prob
        self.round_scores = round_scores

    def forward(self, x: Tensor) -> Routing:
        """Tokens (N, H) to logits (N, E), scores (N, k) and the experts' indices (N, k)."""
        logits = self.logits(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores, chosen = torch.topk(F.softmax(logits, dim=-1, dtype=wide), self.top_k, dim=-1)
        if self.norm_topk_prob:
            scores = scores / scores.sum(-1, keepdim=True)
        return logits, scores.to(logits.dtype) if self.round_scores else scores, chosen


class TopKSoftmaxRouter(Router):
    """The k experts with the largest logits, weighted by a softmax over those k alone."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, top_k, bias=True)

    def forward(self, x: Tensor) -> Routing:
        """Tokens (N, H) to logits (N, E), scores (N, k) and the experts' indices (N, k)."""
        logits = self.logits(x)
        best, chosen = torch.topk(logits, self.top_k, dim=-1)
        return logits, F.softmax(best, dim=-1), chosen


class Experts(KernelModule):
    """E gated MLPs, run on the tokens that a router sent to each.

    Shapes: gate_up_proj (E, 2I, H) with all gates before all ups, down_proj (E, H, I). With
    `gpt_oss` they are (E, H, 2I) with gates at even features and (E, I, H), biases are added and
    the activation is the clamped one of gated_mlp_act, with `limit` and `alpha`.
    """

    op: ClassVar[str] = "mlp"

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        act: str,
        *,
        limit: float | None = None,
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        self.transposed = act == "gpt_oss"
        up, down = (2 * intermediate_size, hidden_size), (hidden_size, intermediate_size)
        if self.transposed:
            up, down = up[::-1], down[::-1]
        biases: tuple[nn.Parameter | None, ...] = (None, None)
        if self.transposed:
            sizes = (2 * intermediate_size, hidden_size)
            biases = tuple(nn.Parameter(torch.empty(num_experts, size)) for size in sizes)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, *up))
        self.gate_up_proj_bias = biases[0]
        self.down_proj = nn.Parameter(torch.empty(num_experts, *down))
        self.down_proj_bias = biases[1]
        self.act, self.limit, self.alpha = act, limit, alpha
        self.packed: Literal["halves", "interleaved"] = (
            "interleaved" if self.transposed else "halves"
        )
        self.reset_parameters()
        self.choice = self.pick(AUTO)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights normal(0, std), biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std)

    def pick(self, implementation: str) -> Choice:
        """A backend for the projections' device and dtype."""
        weight = self.gate_up_proj
        like = weight[:, 0] if self.transposed else weight[:, :, 0]  # (E, 2I)
        return resolve_gated_mlp_act(
            like, implementation, act=self.act, casting="llama", packed=self.packed
        )

    def forward(self, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """Tokens (N, H), each to experts chosen (N, k), to their sum weighted by scores: (N, H)."""
        groups = Groups.of(chosen, self.gate_up_proj.shape[0])
        rows = dispatch(x, groups)
        both = self._project(rows, self.gate_up_proj, self.gate_up_proj_bias, groups)
        gated = gated_mlp_act(
            both,
            act=self.act,
            limit=self.limit,
            alpha=self.alpha,
            casting="llama",
            packed=self.packed,
            implementation=self.choice,
        )
        y = self._project(gated, self.down_proj, self.down_proj_bias, groups)
        return combine(y, scores, groups).to(x.dtype)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
        return grouped_linear(x, weight, bias, ends=groups.ends, transposed=self.transposed)

    def extra_repr(self) -> str:
        """Sizes, the activation and the backend in use."""
        experts, hidden, ffn = self.down_proj.shape
        if self.transposed:
            hidden, ffn = ffn, hidden
        return f"{hidden}, {ffn}, experts={experts}, act={self.act}, backend={self.choice.backend}"


class MixtralSparseMoeBlock(nn.Module):
    """The feed-forward part of a mixtral layer.

    `jitter` > 0 multiplies its inputs in training by factors from [1 - jitter, 1 + jitter].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        act: str,
        *,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        self.jitter = jitter
        self.gate = SoftmaxTopKRouter(
            hidden_size, num_experts, top_k, norm_topk_prob=True, round_scores=False
        )
        self.experts = Experts(hidden_size, intermediate_size, num_experts, act)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) to the same, and the router's logits (N, E) of all N tokens."""
        if self.training and self.jitter > 0:
            low, high = 1.0 - self.jitter, 1.0 + self.jitter
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        return _routed(self.gate, self.experts, hidden_states)


class Qwen3MoeSparseMoeBlock(nn.Module):
    """The feed-forward part of a qwen3_moe layer."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        act: str,
        *,
        norm_topk_prob: bool,
    ) -> None:
        super().__init__()
        self.experts = Experts(hidden_size, intermediate_size, num_experts, act)
        self.gate = SoftmaxTopKRouter(
            hidden_size, num_experts, top_k, norm_topk_prob=norm_topk_prob, round_scores=True
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) to the same, and the router's logits (N, E) of all N tokens."""
        return _routed(self.gate, self.experts, hidden_states)


class GptOssMLP(nn.Module):
    """The feed-forward part of a gpt_oss layer; `limit` and `alpha` are its SwiGLU's."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        limit: float = LIMIT,
        alpha: float = ALPHA,
    ) -> None:
        super().__init__()
        self.router = TopKSoftmaxRouter(hidden_size, num_experts, top_k)
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts, "gpt_oss", limit=limit, alpha=alpha
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) to the same, and the router's logits (N, E) of all N tokens."""
        return _routed(self.router, self.experts, hidden_states)


def _routed(router: nn.Module, experts: Experts, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits, scores, chosen = router(x)
    return experts(x, chosen, scores).view_as(hidden_states), logits


def _check_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"num_experts_per_tok={top_k} with {num_experts} experts; it must be from 1 to "
            f"{num_experts}"
        )
