"""PreTrainedModel: how a model is built, initialised, tied, switched and measured.

Loading and saving are in loading.py. A subclass builds its modules in `__init__`; what HF makes it
call at the end (`post_init`) happens by itself.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from swathe.kernels.core.errors import did_you_mean
from swathe.modeling.capabilities import CapabilityMixin
from swathe.modeling.checkpoint.report import LoadReport
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.config_fields import dtype_named
from swathe.modeling.dispatch import DispatchMixin
from swathe.modeling.figures import count_in_words
from swathe.modeling.gradients import GradientMixin
from swathe.modeling.hub import HubMixin
from swathe.modeling.layers.norm import RMSNorm
from swathe.modeling.loading import LoadingMixin
from swathe.modeling.masks import opaque
from swathe.modeling.out_of_memory import explain
from swathe.modeling.packing import Packing
from swathe.modeling.policy import IMPLEMENTATIONS, KernelPolicy, KernelReport, kernel_modules
from swathe.modeling.resizing import ResizingMixin

logger = logging.getLogger(__name__)
_OLDER_NAMES = {"past_key_value": "past_key_values"}
_inside_a_repr: ContextVar[bool] = ContextVar("_inside_a_repr", default=False)
# ids of a forward that shows whether a model runs, padding among them
_DUMMY_IDS = ((7, 6, 0, 0, 1), (1, 2, 3, 0, 0), (0, 0, 0, 4, 5))


class _ModelType(type(nn.Module)):  # type: ignore[misc]
    """Runs `post_init` once the outermost `__init__` of a model has returned."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        model.post_init()
        return model


class PreTrainedModel(
    LoadingMixin,
    HubMixin,
    ResizingMixin,
    DispatchMixin,
    GradientMixin,
    CapabilityMixin,
    metaclass=_ModelType,
):
    """Base of all models.

    A family sets `config_class`, `base_model_prefix` (the body's attribute in a model with a head),
    `embed_path`, `head_path` and `position_embed_path` (modules by name), `_tied_weights_keys`
    (head parameter: source) and `_no_split_modules`. Modules named in `_keep_in_fp32_modules` load
    in float32 where float16 is asked for, in `_keep_in_fp32_modules_strict` also for bfloat16.
    `config_class` may be left to the annotation of `config`.
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    embed_path: ClassVar[str] = ""
    head_path: ClassVar[str] = ""
    _no_split_modules: ClassVar[tuple[str, ...]] = ()
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {}
    _keep_in_fp32_modules: ClassVar[tuple[str, ...]] = ()
    _keep_in_fp32_modules_strict: ClassVar[tuple[str, ...]] = ()
    _keys_to_ignore_on_save: ClassVar[tuple[str, ...]] = ()
    _keys_to_ignore_on_load_missing: ClassVar[tuple[str, ...]] = ()
    _keys_to_ignore_on_load_unexpected: ClassVar[tuple[str, ...]] = ()
    _arguments: ClassVar[frozenset[str]] = frozenset()
    generation_config: Any = None
    load_report: LoadReport | None = None
    _warned_of_padding: bool = False
    _told_of_long_texts: bool = False
    _warned_of_names: bool = False
    _kernel_policy: KernelPolicy

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        annotated = _annotated_config(cls)
        if annotated is not None and "config_class" not in vars(cls):
            cls.config_class = annotated
        named = inspect.signature(cls.forward).parameters
        packing = Packing.__annotations__ if "packing" in named else ()
        cls._arguments = frozenset((*named, *packing)) - {"self", "packing"}

    def __init__(self, config: PreTrainedConfig) -> None:
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}(config): config is a {type(config).__name__}; it must be a "
                f"{self.config_class.__name__}. To load weights use "
                f"{type(self).__name__}.from_pretrained(directory)"
            )
        super().__init__()
        self.config = config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward; an argument that it does not take is named together with the nearest one.

        An out-of-memory error leaves with a note: an estimate for these inputs, and ways out.
        """
        if not self._arguments.issuperset(kwargs):
            kwargs = self._renamed(kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            explain(self, error, args, kwargs)
            raise

    def _renamed(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of forward by the names that it has, from those of older versions."""
        for old, new in _OLDER_NAMES.items():
            if old in given and new in self._arguments and new not in given:
                given = {new if name == old else name: value for name, value in given.items()}
                if not self._warned_of_names:
                    self._warned_of_names = True
                    logger.warning(
                        "%s is an older name of %s, which is what it is read as", old, new
                    )
        for name in given:
            if name not in self._arguments:
                raise TypeError(
                    f"{type(self).__name__}.forward has no argument {name!r}"
                    f"{did_you_mean(name, self._arguments)}; allowed: {sorted(self._arguments)}"
                )
        return given

    def post_init(self) -> None:
        """Initialise, tie, choose kernels. Runs by itself after `__init__`; harmless to repeat."""
        if hasattr(self, "_kernel_policy"):
            return
        for module in _own_modules(self):
            if any(not p.is_meta for p in module.parameters(recurse=False)):
                self._init_weights(module)
        self.tie_weights()
        named = {op: getattr(self.config, field) for op, field in IMPLEMENTATIONS.items()}
        self._adopt(KernelPolicy.of(self.config.kernels, **named))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill the module's own parameters: normal(0, initializer_range), biases 0, norms neutral.

        Loading calls it only for modules with parameters that the checkpoint lacks, and puts loaded
        parameters back afterwards, so that it may write to all of them.
        """
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, std)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, std)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif isinstance(module, RMSNorm):
            module.reset_parameters()

    # tied weights and embeddings

    def tied_parameters(self) -> dict[str, str]:
        """{head parameter: the parameter it shares}, as the configuration asks for."""
        return dict(self._tied_weights_keys) if self._ties() else {}

    def tie_weights(self) -> None:
        """Make the head use the embedding's own Parameter where the configuration says so."""
        for name, source in self.tied_parameters().items():
            module, _, parameter = name.rpartition(".")
            setattr(self.get_submodule(module), parameter, self.get_parameter(source))

    def _ties(self) -> bool:
        return bool(getattr(self.config, "tie_word_embeddings", False))

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns token ids into vectors."""
        return self.get_submodule(self._path("embed_path"))

    def set_input_embeddings(self, module: nn.Module) -> None:
        """Replace it; a tied head follows."""
        self.set_submodule(self._path("embed_path"), module)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module | None:
        """The module that turns vectors into logits; None for a body."""
        return self.get_submodule(self.head_path) if self.head_path else None

    def set_output_embeddings(self, module: nn.Module) -> None:
        """Replace it; where the configuration ties, it gets the embedding's weight."""
        self.set_submodule(self._path("head_path"), module)
        self.tie_weights()

    def _path(self, kind: str) -> str:
        path = getattr(self, kind)
        if not path:
            raise AttributeError(
                f"{type(self).__name__} has no {kind}: it has no such module. Use a class that has "
                f"one, or set {kind} on the class to the module's name"
            )
        return path

    # what the model is

    @property
    def base_model(self) -> nn.Module:
        """The body without a head; itself for a body."""
        return getattr(self, self.base_model_prefix, self)

    def get_decoder(self) -> nn.Module:
        """The body, under the name that code for encoder-decoders uses."""
        return self.base_model

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Elements of all parameters, shared ones counted once."""
        left_out: set[Tensor] = set()
        if exclude_embeddings:
            left_out = {m.weight for m in self.modules() if isinstance(m, nn.Embedding)}
        counted = (p for p in self.parameters() if p.requires_grad or not only_trainable)
        return sum(p.numel() for p in counted if p not in left_out)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all parameters, shared ones counted once, and of the buffers.

        `swathe.memory_estimate(model, ...)` adds what running the model takes.
        """
        tensors: list[Tensor] = list(self.parameters())
        if return_buffers:
            tensors += self.buffers()
        return sum(t.nbytes for t in tensors)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Arguments for a forward that only has to run: three rows of five ids."""
        ids = torch.tensor(_DUMMY_IDS, device=self.device)
        return {self.main_input_name: ids % getattr(self.config, "vocab_size", 8)}

    def warn_if_padding_and_no_attention_mask(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> None:
        """Log once a model that rows begin or end with padding which no mask hides."""
        pad = getattr(self.config, "pad_token_id", None)
        if attention_mask is not None or pad is None or opaque(input_ids):
            return
        if not self._warned_of_padding and bool((input_ids[:, [0, -1]] == pad).any()):
            self._warned_of_padding = True
            logger.warning(
                "input_ids begin or end with pad_token_id=%d and no attention_mask was given, so "
                "padding is read as text; pass attention_mask=(input_ids != pad_token_id), unless "
                "that token is meant",
                pad,
            )

    def __repr__(self) -> str:
        """Size, dtype, devices and kernels, then the modules."""
        if _inside_a_repr.get():
            return super().__repr__()
        token = _inside_a_repr.set(True)
        try:
            return f"{self._description()}\n{super().__repr__()}"
        finally:
            _inside_a_repr.reset(token)

    def _description(self) -> str:
        dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in self.parameters())
        devices = dict.fromkeys(str(p.device) for p in self.parameters())
        used: dict[str, dict[str, None]] = {}
        for _, module in kernel_modules(self):
            used.setdefault(module.op, {})[module.choice.backend] = None
        lines = [
            f"{type(self).__name__}: {count_in_words(self.num_parameters())} parameters, "
            f"{' and '.join(dtypes)}, on {', '.join(devices)}"
        ]
        if used:
            lines.append("kernels: " + ", ".join(f"{k}={'/'.join(used[k])}" for k in sorted(used)))
        return "\n".join(lines)

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the model has `generate`."""
        return hasattr(cls, "generate")

    # how it runs

    def set_attn_implementation(self, implementation: str) -> None:
        """Switch the attention backend of every layer. On an error the model stays as it was."""
        self.set_kernels(attn=implementation)

    def set_kernels(self, kernels: Any = None, **ops: str) -> None:
        """Switch backends: `set_kernels("eager")`, `set_kernels(norm="eager")`, or a policy.

        Ops that are not named stay as they are. Raises ValueError for unknown names,
        UnsupportedFeature where a named backend cannot serve; the model then stays as it was.
        """
        for op in ops:
            KernelPolicy.of({op: "auto"})
        wanted = self._kernel_policy if kernels is None else kernels
        self._adopt(KernelPolicy.of(wanted, **ops))

    def kernel_report(self) -> KernelReport:
        """Which backend each module runs, and why; print it for a table."""
        return KernelReport.of(self)

    def _adopt(self, policy: KernelPolicy) -> None:
        policy.apply(self)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module._kernel_policy = policy
        for op, name in IMPLEMENTATIONS.items():
            setattr(self.config, name, getattr(policy, op))

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attn_implementation: str | None = None,
        norm_implementation: str | None = None,
        rope_implementation: str | None = None,
        mlp_implementation: str | None = None,
        loss_implementation: str | None = None,
        kernels: Any = None,
    ) -> Self:
        """A freshly initialised model in `dtype`, else config.dtype, else torch's default.

        `Model(config)` itself always builds in torch's default dtype. The caller's config is
        copied, not changed.
        """
        chosen = dtype_named(dtype if dtype is not None else config.dtype, "from_config")
        own = config.running(
            kernels,
            attn_implementation=attn_implementation,
            norm_implementation=norm_implementation,
            rope_implementation=rope_implementation,
            mlp_implementation=mlp_implementation,
            loss_implementation=loss_implementation,
        )
        before = torch.get_default_dtype()
        with (
            torch.device(device) if device is not None else torch.device(torch.get_default_device())
        ):
            torch.set_default_dtype(chosen or before)
            try:
                return cls(own)
            finally:
                torch.set_default_dtype(before)


def _annotated_config(cls: type) -> type[PreTrainedConfig] | None:
    """The configuration class that the class's own `config: Foo` names, where it is known yet."""
    named = inspect.get_annotations(cls).get("config")
    if isinstance(named, str):
        named = getattr(sys.modules.get(cls.__module__), named, None)
    fits = isinstance(named, type) and issubclass(named, PreTrainedConfig)
    return named if fits else None


def _own_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The model and the modules below it, less those inside another PreTrainedModel."""
    stack: list[nn.Module] = [model]
    while stack:
        module = stack.pop()
        yield module
        stack.extend(m for m in module.children() if not isinstance(m, PreTrainedModel))
