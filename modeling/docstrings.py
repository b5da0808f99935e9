"""Docstrings of forwards: what their standard arguments are is written once, here.

    @auto_docstring
    def forward(self, input_ids=None, attention_mask=None, ...):
        \"\"\"What this forward does.\"\"\"

The decorated function's docstring goes on with `Args`, a line for each of its parameters in their
order, and `Returns` with the fields of the output class. A parameter that is not standard is
documented in the decorator: auto_docstring(my_flag="what it does").
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, overload

from swathe.modeling.packing import Packing

Function = TypeVar("Function", bound=Callable[..., Any])

_CONFIG = "defaults to the configuration's"
ARGUMENTS = {
    "input_ids": "ids (B, T), whole numbers below vocab_size; or `inputs_embeds`, never both",
    "attention_mask": "(B, T) with 0 on padding, any form of modeling/masks.py, or a Mask",
    "token_type_ids": "(B, T), the segment of each token; 0 where left out",
    "position_ids": "(B or 1, T); counted on from the cache where left out",
    "past_key_values": "a DynamicCache or StaticCache to read and to write to",
    "encoder_hidden_states": "an encoder's states (B, S, hidden_size), for cross-attention",
    "encoder_attention_mask": "(B, S) with 0 on the encoder's padding, or as `attention_mask`",
    "inputs_embeds": "vectors (B, T, hidden_size) instead of `input_ids`",
    "labels": "what the loss is taken against; -100 is ignored where labels are whole numbers",
    "start_positions": "(B,), the first token of each answer",
    "end_positions": "(B,), the last token of each answer",
    "use_cache": f"whether to return a cache; {_CONFIG} in eval mode, False in training",
    "output_attentions": f"return the attention weights, see layers/capture.py; {_CONFIG}",
    "output_hidden_states": f"return the states between layers, all or by index; {_CONFIG}",
    "output_router_logits": f"return the routers' logits and the balancing loss; {_CONFIG}",
    "return_dict": f"an output object rather than a tuple; {_CONFIG}, which is True by default",
    "logits_to_keep": "logits of the last so many tokens, or of these indices; 0 is all",
    "num_items_in_batch": "what the summed loss is divided by, instead of the number of labels",
    "shift_labels": "(B, T) labels that are moved by one already, instead of `labels`",
    "pooling": "which token stands for a sequence, see heads.last_tokens",
    "cu_seq_lens_q": "borders (documents + 1,) of packed documents, see modeling/packing.py",
    "cu_seq_lens_k": "the same borders, as transformers' collators give them twice",
    "max_length_q": "taken and not used",
    "max_length_k": "taken and not used",
}


@overload
def auto_docstring(function: Function, /) -> Function: ...
@overload
def auto_docstring(
    *, custom_intro: str | None = ..., **arguments: str
) -> Callable[[Function], Function]: ...
def auto_docstring(
    function: Function | None = None, /, *, custom_intro: str | None = None, **arguments: str
) -> Any:
    """Finish a forward's docstring; see the module's. `custom_intro` stands in for its own text.

    Raises ValueError for a parameter that neither ARGUMENTS nor `arguments` describes, and for a
    description of one that the function has not. Without docstrings (python -OO) it does nothing.
    """

    def finish(function: Function) -> Function:
        if sys.flags.optimize < 2:
            function.__doc__ = _docstring(function, custom_intro, arguments)
        return function

    return finish if function is None else finish(function)


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names that a forward can be called with, packing's among them, without self."""
    found: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found += Packing.__annotations__
        elif name != "self":
            found.append(name)
    return found


def _docstring(
    function: Callable[..., Any], custom_intro: str | None, arguments: dict[str, str]
) -> str:
    name = function.__qualname__
    known, names = {**ARGUMENTS, **arguments}, parameters(function)
    for one in names:
        if one not in known:
            raise ValueError(
                f"auto_docstring: nothing is known of {name}'s parameter {one!r}; say what it is: "
                f"@auto_docstring({one}='...')"
            )
    for one in arguments:
        if one not in names:
            raise ValueError(f"auto_docstring: {name} has no parameter {one!r}; it has {names}")
    intro = inspect.cleandoc(custom_intro or function.__doc__ or "")
    lines = [intro, "", "Args:", *(f"    {one}: {known[one]}." for one in names)]
    output = _output(function)
    if output is not None:
        lines += ["", "Returns:", f"    {output.__name__}, or a tuple of what it holds:"]
        lines += [f"    {f.name}" for f in fields(output)]
    return "\n".join(lines) + "\n"


def _output(function: Callable[..., Any]) -> Any:
    """The output class among what a forward says that it returns."""
    try:
        found = typing.get_type_hints(function).get("return")
    except NameError:  # a name that exists for type checkers only
        return None
    options = typing.get_args(found) or (found,)
    return next((o for o in options if isinstance(o, type) and is_dataclass(o)), None)
