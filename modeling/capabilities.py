"""What a model can run on, under transformers' names: asked of its modules, never set by hand.

    _supports_sdpa, _supports_flex_attn      attn_implementation="sdpa", "flex_attention"
    _supports_flash_attn                     "flash_attention_2" or "flash_attention_3"
    _supports_attention_backend              any backend that register_attention adds
    _can_compile_fullgraph                   torch.compile(model, fullgraph=True)

Each attention module says what it needs (head size, softcap, sinks, dropout, grouped heads) and
each backend what it serves, so that the answers follow the weights' device and dtype, and a class
written in a notebook has them like any other. transformers has them as attributes of a class; here
they are read-only, of a model.
"""

from __future__ import annotations

from torch import nn

from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
from swathe.kernels.core.registry import AUTO, registered
from swathe.modeling.policy import KernelModule, backends_of, kernel_modules

_FLASH = ("flash_attention_2", "flash_attention_3")


class CapabilityMixin(nn.Module):
    """The flags above, and what is behind them: `attention_backends`."""

    def attention_backends(self) -> dict[str, str | None]:
        """{backend: None where it serves every attention module, else why it does not}.

        model.attention_backends()
        {"eager": None, "sdpa": "attention: backend 'sdpa' cannot serve ...", ...}
        """
        return {name: self._refusal(name) for name in backends_of("attn") if name != AUTO}

    def _attention_modules(self) -> list[KernelModule]:
        return [module for _, module in kernel_modules(self) if module.op == "attn"]

    def _refusal(self, name: str) -> str | None:
        for module in self._attention_modules():
            try:
                module.pick(name)
            except (UnsupportedFeature, BackendUnavailable) as refusal:
                return str(refusal)
        return None

    def _serves(self, *names: str) -> bool:
        """Whether one of the names is a backend that serves every attention module."""
        there = set(names).intersection(backends_of("attn"))
        return self._supports_attention_backend and any(not self._refusal(name) for name in there)

    @property
    def _supports_attention_backend(self) -> bool:
        return bool(self._attention_modules())

    @property
    def _supports_sdpa(self) -> bool:
        return self._serves("sdpa")

    @property
    def _supports_flex_attn(self) -> bool:
        return self._serves("flex_attention")

    @property
    def _supports_flash_attn(self) -> bool:
        return self._serves(*_FLASH)

    @property
    def _can_compile_fullgraph(self) -> bool:
        """Whether a graph of the device can hold every backend in use; a CPU has none to break."""
        chosen = {(m.choice.op, m.choice.backend) for _, m in kernel_modules(self)}
        used = [one.capabilities for op, name in chosen if (one := registered(op).get(name))]
        held = all(one.graph_capture or one.devices == {"cpu"} for one in used)
        return held and len(used) == len(chosen)
