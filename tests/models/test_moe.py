"""Mixture-of-experts layers beside transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from swathe.kernels.core.cpp import why_unavailable
from swathe.modeling.layers import grouped
from swathe.modeling.layers.grouped import Groups, combine, dispatch, grouped_mm
from swathe.modeling.layers.moe import (
    Experts,
    GptOssMLP,
    MixtralSparseMoeBlock,
    Qwen3MoeSparseMoeBlock,
    SoftmaxTopKRouter,
)
from swathe.modeling.policy import KernelPolicy

# FFN is a multiple of the vector length: torch's sigmoid rounds otherwise in a tail, which the last
# row has
HIDDEN, FFN, EXPERTS = 24, 32, 6
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
Pair = tuple[nn.Module, nn.Module]


def mixtral(top_k: int = 2, **changes: Any) -> Pair:
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=top_k,
        router_jitter_noise=changes.get("jitter", 0.0),
    )
    theirs = modeling_mixtral.MixtralSparseMoeBlock(config)
    return theirs, MixtralSparseMoeBlock(HIDDEN, FFN, EXPERTS, top_k, "silu", **changes)


def qwen(top_k: int = 2, norm_topk_prob: bool = True) -> Pair:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=FFN,
        num_experts=EXPERTS,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm_topk_prob,
    )
    theirs = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    return theirs, Qwen3MoeSparseMoeBlock(
        HIDDEN, FFN, EXPERTS, top_k, "silu", norm_topk_prob=norm_topk_prob
    )


def gpt_oss(top_k: int = 2, limit: float = 7.0) -> Pair:
    config = GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_local_experts=EXPERTS,
        num_experts_per_tok=top_k,
        swiglu_limit=limit,
    )
    theirs = modeling_gpt_oss.GptOssMLP(config)
    return theirs, GptOssMLP(HIDDEN, FFN, EXPERTS, top_k, limit=limit)


KINDS: dict[str, Callable[..., Pair]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen,
    "qwen3_moe not normed": lambda top_k=2: qwen(top_k, norm_topk_prob=False),
    "gpt_oss": gpt_oss,
    "gpt_oss clamping much": lambda top_k=2: gpt_oss(top_k, limit=0.5),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def same_weights(pair: Pair, scale: float = 0.3) -> Pair:
    """Random values in every parameter, biases included, under the same names and shapes."""
    theirs, ours = pair
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def output_of(theirs: nn.Module, x: Tensor) -> Tensor:
    y = theirs(x)
    return y[0] if isinstance(y, tuple) else y


def router_of(module: nn.Module) -> Any:
    return module.router if hasattr(module, "router") else module.gate


@kinds
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_output_and_every_gradient(kind: str, top_k: int) -> None:
    theirs, ours = same_weights(KINDS[kind](top_k))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, x_theirs = (tokens(3, 7).requires_grad_() for _ in range(2))
    y, logits = ours(x)
    expected = output_of(theirs, x_theirs)
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(logits, router_of(theirs)(x_theirs.view(-1, HIDDEN))[0], **CLOSE)

    upstream = tokens(3, 7, seed=2)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, x_theirs.grad, **CLOSE)
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and parameter.grad.is_contiguous(), name
        torch.testing.assert_close(parameter.grad, wanted[name], **CLOSE, msg=name)


@kinds
def test_router(kind: str) -> None:
    theirs, ours = same_weights(KINDS[kind]())
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens(9).to(dtype)
        found = router_of(ours.to(dtype))(x)
        for one, other in zip(found, router_of(theirs.to(dtype))(x), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@kinds
def test_bf16_is_within_the_roundings_of_theirs(kind: str) -> None:
    """Our error against fp64 is at most that of transformers' own bf16 code."""
    theirs, ours = same_weights(KINDS[kind]())
    theirs, ours, x = theirs.bfloat16(), ours.bfloat16(), tokens(8, 64).bfloat16()
    y, found = ours(x)[0], output_of(theirs, x)
    assert y.dtype == torch.bfloat16
    _, scores, chosen = router_of(ours)(x.view(-1, HIDDEN))
    exact = ours.experts.double()(x.view(-1, HIDDEN).double(), chosen, scores.double()).view_as(x)
    error, their_error = ((t.double() - exact).square().mean().sqrt() for t in (y, found))
    assert error <= their_error
    assert error <= 4 * 2**-9 * exact.square().mean().sqrt()


@kinds
def test_no_tokens(kind: str) -> None:
    _, ours = same_weights(KINDS[kind]())
    x = tokens(2, 0).requires_grad_()
    y, logits = ours(x)
    assert y.shape == x.shape and logits.shape == (0, EXPERTS)
    (y.sum() + logits.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


@kinds
def test_experts_without_tokens(kind: str) -> None:
    theirs, ours = same_weights(KINDS[kind]())
    for module in (theirs, ours):
        router_of(module).weight.data[3:].zero_()
        router_of(module).weight.data[:3].abs_()
        if getattr(router_of(module), "bias", None) is not None:
            router_of(module).bias.data.zero_()
    x = tokens(1, 5).abs()  # so that experts 3 and on have the smallest logits of all
    y = ours(x)[0]
    torch.testing.assert_close(y, output_of(theirs, x), **CLOSE)
    y.sum().backward()
    for name, parameter in ours.experts.named_parameters():
        assert not parameter.grad[3:].any(), name
        assert parameter.grad[:3].any(), name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """MKL's fp32 product of few rows has other bits than that of many, and threads cut rows up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("one_thread")
def test_permuted_tokens_give_permuted_bits(kind: str, dtype: torch.dtype) -> None:
    ours = same_weights(KINDS[kind]())[1].to(dtype)
    x = tokens(37).to(dtype)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours(x)[0][order], ours(x[order])[0])


@kinds
def test_a_row_has_the_same_bits_in_any_batch(kind: str) -> None:
    """In bf16, where the CPU's matrix product has them too."""
    ours = same_weights(KINDS[kind]())[1].bfloat16()
    x = tokens(24).bfloat16()
    whole = ours(x)[0]
    poisoned = x.clone()
    poisoned[12:] = float("nan")
    assert torch.equal(ours(poisoned)[0][:12], whole[:12])
    for i in range(24):
        assert torch.equal(ours(x[i : i + 1])[0], whole[i : i + 1])


@kinds
def test_a_row_does_not_see_the_batch(kind: str) -> None:
    _, ours = same_weights(KINDS[kind]())
    x = tokens(24)
    poisoned = x.clone()
    poisoned[12:] = float("nan")
    whole = ours(x)[0]
    torch.testing.assert_close(ours(poisoned)[0][:12], whole[:12], **CLOSE)
    for i in range(24):
        torch.testing.assert_close(ours(x[i : i + 1])[0], whole[i : i + 1], **CLOSE)


def test_runs_are_bitwise_equal() -> None:
    _, ours = same_weights(gpt_oss(4))
    gradients = []
    for _ in range(2):
        ours.zero_grad()
        x = tokens(50).requires_grad_()
        ours(x)[0].square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in ours.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_jitter_is_theirs() -> None:
    theirs, ours = same_weights(mixtral(jitter=0.3))
    outputs = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        outputs.append(output_of(module.train(), tokens(2, 4)))
    torch.testing.assert_close(*outputs, **CLOSE)
    x = tokens(2, 4)
    kept = x.clone()
    ours(x)
    assert torch.equal(x, kept)
    assert torch.equal(ours.eval()(x)[0], ours(x)[0])


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    experts = Experts(6, 4, 3, "gpt_oss").double()
    experts.reset_parameters(0.5)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 2]])

    def run(x: Tensor, scores: Tensor, *weights: Tensor) -> Tensor:
        values = dict(zip(dict(experts.named_parameters()), weights, strict=True))
        return torch.func.functional_call(experts, values, (x, chosen, scores))

    inputs = [torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)]
    inputs += [p.detach().clone() for p in experts.parameters()]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_compiles_in_one_graph(kind: str) -> None:
    _, ours = same_weights(KINDS[kind]())
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, other = (tokens(2, 5).requires_grad_() for _ in range(2))
    compiled(x)[0].square().sum().backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours(other)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, **CLOSE)
    for one, parameter in zip(gradients, ours.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, **CLOSE)


def test_autocast_runs_the_experts_in_bf16() -> None:
    _, ours = same_weights(gpt_oss())
    x = tokens(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, logits = ours(x)
    assert y.dtype == torch.float32 and logits.dtype == torch.bfloat16
    torch.testing.assert_close(y, ours(x)[0], atol=0.05, rtol=0.05)


def test_torch_grouped_product_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, forward and backward, with torch's own CPU version of it."""
    _, ours = same_weights((MixtralSparseMoeBlock(16, 8, 4, 2, "silu"),) * 2)
    oss = GptOssMLP(16, 8, 4, 2)
    for module in (ours.bfloat16(), oss.bfloat16()):
        results = []
        for served in (False, True):
            monkeypatch.setattr(grouped, "has_kernel", lambda x, w, served=served: served)
            module.zero_grad()
            x = torch.randn(30, 16, generator=torch.Generator().manual_seed(7)).bfloat16()
            y = module(x.requires_grad_())[0]
            y.backward(torch.ones_like(y).mul(x.detach()))
            results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_kernel_path_asks_the_device_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values to ask for, and check strides as torch's CUDA kernel does."""
    monkeypatch.setattr(grouped, "has_kernel", lambda x, w: True)
    monkeypatch.setattr(grouped, "launch_mm", lambda *_: pytest.fail("looped"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            module = KINDS[kind]()[1]
            for tokens_ in (1, 2, 33):
                module.zero_grad()
                x = torch.randn(tokens_, HIDDEN, requires_grad=True)
                y, _ = module(x)
                y.sum().backward()
                assert y.shape == x.shape and x.grad is not None
                assert all(p.grad is not None for p in module.parameters())
    finally:
        torch.set_default_dtype(before)


def test_parts() -> None:
    chosen = torch.tensor([[2, 0], [0, 3], [3, 2]])
    groups = Groups.of(chosen, 5)
    assert groups.ends.tolist() == [2, 2, 4, 6, 6] and groups.ends.dtype == torch.int32
    assert groups.order.tolist() == [1, 2, 0, 5, 3, 4]
    x = torch.arange(3.0).view(3, 1)
    rows = dispatch(x, groups)
    assert rows.flatten().tolist() == [0, 1, 0, 2, 1, 2]
    weight = torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4]).view(5, 1, 1)
    y = grouped_mm(rows, weight, groups.ends)
    assert y.flatten().tolist() == [0, 1, 0, 200, 1000, 2000]
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert combine(y, scores, groups).flatten().tolist() == [0, 3 + 4000, 5 * 2000 + 6 * 200]


def test_sums_over_slots_are_wider_than_bf16() -> None:
    """256 + 1 - 256 is 0 in bf16."""
    groups = Groups.of(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[256.0], [1.0], [-256.0]], dtype=torch.bfloat16)
    assert combine(rows, torch.ones(1, 3, dtype=torch.bfloat16), groups).item() == 1
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dispatch(x, groups).backward(rows)
    assert x.grad is not None and x.grad.item() == 1


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_mlp_implementation_chooses_the_backend(kind: str) -> None:
    results = []
    for backend in ("eager", "triton"):
        _, ours = same_weights(KINDS[kind]())
        KernelPolicy.of(mlp=backend).apply(ours)
        assert ours.experts.choice.backend == backend
        x = tokens(7).requires_grad_()
        y = ours(x)[0]
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in ours.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_backends_and_moves() -> None:
    _, ours = mixtral()
    here = "eager" if why_unavailable() else "cpp"
    assert ours.experts.choice.backend == here
    with torch.device("meta"):
        _, built = mixtral()
    assert all(p.is_meta for p in built.parameters())
    assert built.to_empty(device="cpu").experts.choice.backend == here
    with pytest.raises(ValueError, match="num_experts_per_tok=7 with 6 experts"):
        mixtral(7)
    with pytest.raises(ValueError, match="num_experts_per_tok=0"):
        SoftmaxTopKRouter(4, 4, 0, norm_topk_prob=True, round_scores=False)
