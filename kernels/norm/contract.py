"""RMSNorm's side of the contract: problems, gold, magnitudes, and the check of one backend.

    from swathe.kernels.norm.contract import check_backend
    print(check_backend("mine", device="cuda"))

runs what our own backends run, for a backend registered under "mine".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swathe.kernels.core.testing import BOUNDS, Report, elementwise_miss
from swathe.kernels.norm import eager
from swathe.kernels.norm.api import CASTINGS, Casting, rms_norm
from swathe.kernels.norm.shapes import EDGES, Shape

EPS = 1e-6
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One call and the gradients that arrive at its outputs."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    residual: Tensor | None
    dh: Tensor | None
    offset: float
    casting: Casting

    @classmethod
    def random(
        cls,
        shape: Shape,
        dtype: torch.dtype,
        *,
        seed: int,
        device: str = "cpu",
        residual: bool = False,
        casting: Casting = "fp32",
        weight_dtype: torch.dtype | None = None,
        amplitude: float = 1.0,
    ) -> Problem:
        """Rows of different scales, weights around one (around zero for "gemma"), any seed."""
        generator = torch.Generator().manual_seed(seed)

        def rows(scale: float = 1.0) -> Tensor:
            spread = torch.exp(torch.randn(shape.M, 1, generator=generator))
            t = torch.randn(shape.M, shape.N, generator=generator) * spread * scale
            return t.to(dtype).to(device)

        offset = 1.0 if casting == "gemma" else 0.0
        weight = 1.0 - offset + 0.2 * torch.randn(shape.N, generator=generator)
        weight = weight.to(weight_dtype or dtype).to(device)
        x, r = rows(amplitude), rows() if residual else None
        out = torch.promote_types(dtype, weight.dtype) if casting == "llama" else dtype
        return cls(x, weight, rows().to(out), r, rows() if residual else None, offset, casting)

    def run(self, implementation: str) -> Outputs:
        """y, dx, dw (and h, which a residual adds) of a registered backend."""
        x, weight = self.x.detach().requires_grad_(), self.weight.detach().requires_grad_()
        inputs = [x, weight]
        if self.residual is None:
            y = rms_norm(
                x,
                weight,
                EPS,
                offset=self.offset,
                casting=self.casting,
                implementation=implementation,
            )
            dx, dw = torch.autograd.grad(y, inputs, self.dy)
            return {"y": y.detach(), "dx": dx, "dw": dw}
        r = self.residual.detach().requires_grad_()
        y, h = rms_norm(
            x,
            weight,
            EPS,
            offset=self.offset,
            casting=self.casting,
            residual=r,
            implementation=implementation,
        )
        dx, dw, dr = torch.autograd.grad((y, h), [*inputs, r], (self.dy, self.dh))
        return {"y": y.detach(), "h": h.detach(), "dx": dx, "dw": dw, "dr": dr}

    def reference(self, dtype: torch.dtype | None = None) -> Outputs:
        """The same from the eager formula on h = x + residual, in `dtype` or in the inputs' own."""
        h = self.x if self.residual is None else self.x + self.residual
        h, weight, dy = (t.detach().to(dtype or t.dtype) for t in (h, self.weight, self.dy))
        h.requires_grad_()
        weight.requires_grad_()
        # HF's eager code rounds as "llama" does, and Gemma's as "gemma" does
        theirs: Casting = "gemma" if self.casting == "gemma" else "llama"
        casting = theirs if dtype is None else "fp32"
        y = eager.rms_norm(h, weight, EPS, self.offset, casting, None)
        assert isinstance(y, Tensor)
        dx, dw = torch.autograd.grad(y, [h, weight], dy.to(y.dtype))
        if self.dh is not None:
            dx = dx + self.dh.to(dx.dtype)
        return {"y": y.detach(), "dx": dx, "dw": dw}

    def magnitudes(self) -> Outputs:
        """The formulas of y, dx and dw on absolute values, in fp64."""
        h = (self.x if self.residual is None else self.x + self.residual).double()
        weight, dy = self.weight.double(), self.dy.double().abs()
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)
        xhat, scale = (h * rstd).abs(), abs(self.offset) + weight.abs()
        g = dy * scale
        dx = rstd * (g + xhat * (g * xhat).mean(-1, keepdim=True))
        if self.dh is not None:
            dx = dx + self.dh.double().abs()
        return {"y": xhat * scale, "dx": dx, "dw": (dy * xhat).sum(0)}


def measure(report: Report, problem: Problem, implementation: str) -> None:
    """Add one problem's errors to the report's pools and its elementwise misses to the list."""
    ours = problem.run(implementation)
    gold, baseline = problem.reference(torch.float64), problem.reference()
    label = f"{tuple(problem.x.shape)} {problem.casting}"
    if problem.residual is not None:
        if not torch.equal(ours["h"], problem.x + problem.residual):
            report.misses.append(f"h {label}: is not x + residual, bit for bit")
        if not torch.equal(ours["dr"].to(ours["dx"].dtype), ours["dx"]):
            report.misses.append(f"dr {label}: differs from dx")
    sizes = problem.magnitudes()
    for name in ("y", "dx", "dw"):
        twice = name == "y" and problem.casting == "llama"
        miss = elementwise_miss(f"{name} {label}", ours[name], gold[name], sizes[name], 1 + twice)
        if miss:
            report.misses.append(miss)
        if twice and ours[name].dtype != torch.float32:
            report.misses += _same_rounding(f"{name} {label}", ours[name], baseline[name])
        else:
            report.pool(name, ours[name].dtype).add(ours[name], gold[name], baseline[name])


def _same_rounding(label: str, ours: Tensor, eager_y: Tensor) -> list[str]:
    # another order of summation moves rstd by an fp32 unit or two, which carries xhat across a
    # rounding boundary in one element of about 2^15 (bf16) or 2^12 (fp16)
    changed = int((ours != eager_y).sum())
    allowed = max(2, ours.numel() // (4096 if ours.dtype == torch.bfloat16 else 512))
    if changed <= allowed:
        return []
    return [f"{label}: {changed} of {ours.numel()} elements round unlike HF's; allowed {allowed}"]


def check_backend(
    implementation: str,
    *,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    castings: tuple[Casting, ...] = CASTINGS,
    shapes: tuple[Shape, ...] = EDGES,
    residuals: tuple[bool, ...] = (False, True),
    seeds: int = 1,
) -> Report:
    """Hold a registered backend to the contract over `shapes`; returns the measured ratios.

    Raises ContractBroken listing every miss: pooled ratios by output and dtype, and single
    elements that no rounding explains.
    """
    whole = Report(f"rms_norm on {implementation!r} ({device})")
    for dtype in dtypes:
        for casting in castings:
            report = Report(f"{whole.subject}, casting {casting}")
            for seed in range(seeds):
                for index, shape in enumerate(shapes):
                    problem = Problem.random(
                        shape,
                        dtype,
                        seed=1000 * seed + index,
                        device=device,
                        residual=residuals[index % len(residuals)],
                        casting=casting,
                    )
                    measure(report, problem, implementation)
            report.settle(BOUNDS["row-wise"])
            for (name, kind), pool in report.pools.items():
                key = f"{name} {casting}"
                whole.pools[key, kind] = replace(pool, name=key)
    return whole
