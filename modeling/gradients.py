"""How a model is trained: gradient checkpointing, and gradients that start at its inputs.

The methods and their arguments are those that transformers' Trainer and PEFT call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from swathe.kernels.core.errors import did_you_mean

CHECKPOINT_ARGUMENTS = (
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "context_fn",
    "debug",
)


def run_layer(layer: Any, *arguments: Any) -> Any:
    """The layer's forward, recomputed in backward where gradient checkpointing is on."""
    if layer.checkpointing is None or not layer.training:
        return layer(*arguments)
    options = dict(layer.checkpointing)
    offload = options.pop("offload", False)
    with save_on_cpu(pin_memory=True) if offload else nullcontext():
        return checkpoint(layer, *arguments, use_reentrant=False, **options)


class GradientMixin(nn.Module):
    """A layer that can be recomputed has the attribute `checkpointing`; see run_layer."""

    supports_gradient_checkpointing: ClassVar[bool] = True
    _require_grads_hook: Any = None

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each n-th layer in backward instead of keeping its activations.

        With `offload`, what a layer is recomputed from waits in the CPU's memory, at a copy there
        and back. Raises ValueError for arguments that torch.utils.checkpoint does not take, for
        `use_reentrant=True`, which loses gradients, and for a model that cannot.
        """
        if not isinstance(gradient_checkpointing_kwargs, Mapping | None):
            raise ValueError(
                f"gradient_checkpointing_kwargs={gradient_checkpointing_kwargs!r} must be a dict "
                f"of arguments for torch.utils.checkpoint, or None; allowed: {CHECKPOINT_ARGUMENTS}"
            )
        arguments = dict(gradient_checkpointing_kwargs or {})
        for name in arguments:
            if name not in CHECKPOINT_ARGUMENTS:
                raise ValueError(
                    f"gradient_checkpointing_kwargs: unknown {name!r}"
                    f"{did_you_mean(name, CHECKPOINT_ARGUMENTS)}; allowed: {CHECKPOINT_ARGUMENTS}"
                )
        if arguments.pop("use_reentrant", False):
            raise ValueError(
                "gradient_checkpointing_kwargs: use_reentrant=True is not supported, it drops "
                "gradients of frozen inputs; leave it out or pass False"
            )
        if type(every_n_layers) is not int or every_n_layers < 1:
            raise ValueError(
                f"every_n_layers={every_n_layers!r} must be a whole number of at least 1; leave it "
                "out to recompute every layer"
            )
        layers = self._checkpoint_layers()
        if not layers or not self.supports_gradient_checkpointing:
            raise ValueError(
                f"{type(self).__name__} does not support gradient checkpointing: "
                f"supports_gradient_checkpointing is {self.supports_gradient_checkpointing} and "
                f"{len(layers)} of its modules have `checkpointing`; both are needed, so set it on "
                "the class and run its layers with gradients.run_layer"
            )
        if offload:
            arguments["offload"] = True
        for i, layer in enumerate(layers):
            layer.checkpointing = arguments if i % every_n_layers == 0 else None

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        for layer in self._checkpoint_layers():
            layer.checkpointing = None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The newer name of `gradient_checkpointing_enable` in transformers."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """The newer name of `gradient_checkpointing_disable` in transformers."""
        self.gradient_checkpointing_disable()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """What transformers' own methods call: `checkpoint`, or a partial of it with arguments."""
        if not enable:
            return self.gradient_checkpointing_disable()
        given: Any = gradient_checkpointing_func
        arguments = given.keywords if isinstance(given, partial) else None
        if (given.func if isinstance(given, partial) else given) is not checkpoint:
            raise ValueError(
                f"gradient_checkpointing_func={given!r} is not supported; layers are recomputed by "
                "torch.utils.checkpoint.checkpoint, or functools.partial of it with arguments"
            )
        return self.gradient_checkpointing_enable(arguments, every_n_layers)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer is recomputed in backward."""
        return any(layer.checkpointing is not None for layer in self._checkpoint_layers())

    def _checkpoint_layers(self) -> list[Any]:
        return [m for m in self.modules() if hasattr(m, "checkpointing")]

    def enable_input_require_grads(self) -> None:
        """Let gradients flow through the embeddings' output though their weight is frozen.

        Adapters need it together with gradient checkpointing. Harmless to repeat.
        """
        if self._require_grads_hook is None:
            embeddings: nn.Module = self.get_input_embeddings()  # type: ignore[operator]
            self._require_grads_hook = embeddings.register_forward_hook(_require_grads)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
            self._require_grads_hook = None


def _require_grads(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)
