"""Changing how many tokens or positions a model knows, in place, with transformers' numerics.

    new rows    mean_resizing=True    N(mean, 1e-9 cov) of the old rows; their mean where the
                                      covariance is not positive definite
                mean_resizing=False   as `_init_weights` fills a new module
    new biases  N(mean, 1e-9 std) of the old ones

Parameters stay the same objects, tied ones tied, and only their data is exchanged. So an optimiser
made before still holds them, and raises at its next step for its moments have the old shapes: make
it again. (transformers gives an untied head a new Parameter, and such an optimiser then goes on
training the old one.)
Source    Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, constraints

from swathe.modeling.layers.linear import Linear

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel

Shape = tuple[int, ...]
_SPREAD = 1e-9
_SPECIAL = ("bos", "eos", "pad", "sep", "cls", "mask", "decoder_start")


@dataclass(frozen=True)
class ResizeReport:
    """What a resize did: `replaced` maps the Parameters whose data is new to both shapes."""

    old: int
    new: int
    replaced: Mapping[str, tuple[Shape, Shape]]

    def __str__(self) -> str:
        rows = [f"{name}: {was} -> {now}" for name, (was, now) in self.replaced.items()]
        return "\n".join((f"resized from {self.old} to {self.new}", *rows))


class ResizingMixin:
    """`resize_token_embeddings` and, for models with a table of positions, its counterpart."""

    position_embed_path: ClassVar[str] = ""
    resize_report: ResizeReport | None = None

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        *,
        force: bool = False,
    ) -> nn.Embedding:
        """Give the input embeddings and the head rows for `new_num_tokens` tokens.

            tokenizer.add_tokens(["<think>"])
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)

        `pad_to_multiple_of` rounds up, also the present number where none is given. Rows are added
        and removed at the end. `config.vocab_size` follows. Returns the embeddings, unchanged where
        both are None; `model.resize_report` names the Parameters whose data was exchanged.
        Raises ValueError for counts that are no whole numbers above 0, and, unless `force=True`,
        where a special token of the configuration would lose its row.
        """
        model: PreTrainedModel = self  # type: ignore[assignment]
        embeddings: Any = model.get_input_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embeddings
        old = embeddings.weight.shape[0]
        new = _count("new_num_tokens", old if new_num_tokens is None else new_num_tokens)
        if pad_to_multiple_of is not None:
            multiple = _count("pad_to_multiple_of", pad_to_multiple_of)
            new = -(-new // multiple) * multiple
        if not force:
            _keep_special_tokens(model, new)
        changed: dict[int, tuple[Shape, Shape]] = {}
        for module in (embeddings, model.get_output_embeddings()):
            if module is not None:
                _resize(model, module, new, mean_resizing, changed)
        for config in _configs(model):
            config.vocab_size = new
        self.resize_report = _report(model, old, new, changed)
        return embeddings

    def get_position_embeddings(self) -> nn.Embedding:
        """The table of positions. Raises NotImplementedError for models that have none."""
        model: PreTrainedModel = self  # type: ignore[assignment]
        return _position_table(model)[1]

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Give the table of positions another length; added rows are as in a new model.

        `config.max_position_embeddings` and the buffers `position_ids` and `token_type_ids` beside
        the table follow. Raises NotImplementedError for models without a table, ValueError for a
        count that is no whole number above 0.
        """
        model: PreTrainedModel = self  # type: ignore[assignment]
        owner, table = _position_table(model)
        new = _count("new_num_position_embeddings", new_num_position_embeddings)
        old = table.weight.shape[0]
        changed: dict[int, tuple[Shape, Shape]] = {}
        _resize(model, table, new, False, changed)
        for name, buffer in owner.named_buffers(recurse=False):
            if name in ("position_ids", "token_type_ids") and buffer.shape[-1] == old:
                row = torch.arange(new) if name == "position_ids" else torch.zeros(new)
                row = row.to(buffer).expand(*buffer.shape[:-1], new)
                setattr(owner, name, row)
        for config in _configs(model):
            config.max_position_embeddings = new
        self.resize_report = _report(model, old, new, changed)


def _count(name: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return value


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """Those of the model and of the models inside it, which may be one or several."""
    for part in model.modules():
        if isinstance(part, ResizingMixin):
            config: Any = part.config  # type: ignore[attr-defined]
            yield config.get_text_config()


def _keep_special_tokens(model: PreTrainedModel, new: int) -> None:
    for config in (model.config, model.generation_config):
        for kind in _SPECIAL:
            given = getattr(config, f"{kind}_token_id", None)
            for token in given if isinstance(given, list | tuple) else [given]:
                if token is not None and token >= new:
                    raise ValueError(
                        f"new_num_tokens={new} removes the row of {kind}_token_id={token}; keep at "
                        f"least {token + 1} rows, change {kind}_token_id in the config first, or "
                        "pass force=True"
                    )


@torch.no_grad()
def _resize(
    model: PreTrainedModel,
    module: Any,
    new: int,
    mean_resizing: bool,
    changed: dict[int, tuple[Shape, Shape]],
) -> None:
    """Exchange the data of an embedding's or a head's own parameters, each one once."""
    for name in ("weight", "bias"):
        parameter: Tensor | None = getattr(module, name, None)
        if parameter is None or id(parameter) in changed or parameter.shape[0] == new:
            continue
        old = parameter.shape[0]
        value = parameter.new_empty(new, *parameter.shape[1:])
        value[:old] = parameter[:new]
        if new > old and not parameter.is_meta:
            if not mean_resizing:
                value[old:] = getattr(_as_new(model, module, new - old), name)
            elif name == "weight":
                value[old:] = _near_the_mean(parameter, new - old)
            else:
                spread = _SPREAD * parameter.std().float()
                value[old:].normal_(float(parameter.float().mean()), float(spread))
        changed[id(parameter)] = (tuple(parameter.shape), tuple(value.shape))
        parameter.data, parameter.grad = value, None
    if isinstance(module, nn.Embedding):
        module.num_embeddings = new
        if module.padding_idx is not None and module.padding_idx >= new:
            module.padding_idx = None
    elif isinstance(module, nn.Linear):
        module.out_features = new


def _as_new(model: PreTrainedModel, module: Any, rows: int) -> nn.Module:
    """A module like this one with `rows` rows, as a new model would have it."""
    weight = module.weight
    like = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(module, nn.Embedding):
        fresh: nn.Module = nn.Embedding(rows, weight.shape[1], **like)
    else:
        kind = Linear if isinstance(module, Linear) else nn.Linear
        fresh = kind(weight.shape[1], rows, bias=module.bias is not None, **like)
    model._init_weights(fresh)
    return fresh


def _near_the_mean(weight: Tensor, rows: int) -> Tensor:
    """`rows` draws of N(mean, 1e-9 cov) of the rows of `weight`, in its dtype."""
    old = weight.float()
    mean = old.mean(0)
    centred = old - mean
    covariance = _SPREAD * (centred.T @ centred / len(old))
    if not bool(constraints.positive_definite.check(covariance).all()):
        return mean.expand(rows, -1).to(weight.dtype)
    drawn = MultivariateNormal(mean, covariance_matrix=covariance).sample((rows,))
    return drawn.to(weight.dtype)


def _report(
    model: PreTrainedModel, old: int, new: int, changed: Mapping[int, tuple[Shape, Shape]]
) -> ResizeReport:
    named = model.named_parameters(remove_duplicate=False)
    return ResizeReport(old, new, {n: changed[id(p)] for n, p in named if id(p) in changed})


def _position_table(model: PreTrainedModel) -> tuple[nn.Module, nn.Embedding]:
    path = model.position_embed_path
    if not path:
        raise NotImplementedError(
            f"{type(model).__name__} has no table of positions (position_embed_path is empty), so "
            "there is nothing to resize; where positions are rotary, set "
            "config.max_position_embeddings"
        )
    table = model.get_submodule(path)
    assert isinstance(table, nn.Embedding)
    return model.get_submodule(path.rpartition(".")[0]), table
