"""Every public forward documents exactly its signature."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from importlib import import_module

import pytest

import swathe
from swathe.modeling import examples, families
from swathe.modeling.docstrings import ARGUMENTS, auto_docstring, parameters
from swathe.modeling.model import PreTrainedModel


def models() -> list[type[PreTrainedModel]]:
    """Every class of ours that can be called: families, their bases and heads, the examples."""
    for name in families.__all__:
        getattr(swathe, name)
    for module in pkgutil.walk_packages(examples.__path__, f"{examples.__name__}."):
        import_module(module.name)
    found: dict[type[PreTrainedModel], None] = {}
    waiting = [PreTrainedModel]
    while waiting:
        waiting += (below := waiting.pop().__subclasses__())
        found |= dict.fromkeys(c for c in below if c.__module__.startswith("swathe.modeling."))
    callable_ones = (c for c in found if c.forward.__qualname__ != "_forward_unimplemented")
    return sorted(callable_ones, key=lambda c: c.__name__)


MODELS = models()


def test_no_model_is_left_out() -> None:
    names = {model.__name__ for model in MODELS}
    assert names >= {name for name in families.__all__ if not name.endswith("Config")}
    assert names >= {"MyNewModelForCausalLM", "MyNewModel2Model", "ForSequenceClassification"}


@pytest.mark.parametrize("model", MODELS, ids=lambda c: c.__name__)
def test_a_forward_documents_its_signature(model: type[PreTrainedModel]) -> None:
    forward = model.forward
    assert forward.__doc__ is not None
    intro, _, rest = forward.__doc__.partition("\nArgs:\n")
    listed, _, returned = rest.partition("\nReturns:\n")
    assert re.findall(r"^    (\w+): ", listed, re.M) == parameters(forward)
    assert len(intro) > 20 and not intro.startswith(" ")
    assert returned.split(",")[0].strip().endswith(("Output", "WithPast", "Attentions"))


def test_own_arguments_and_mistakes() -> None:
    @auto_docstring(custom_intro="Does it.", flag="whether to")
    def forward(self: object, input_ids: int, flag: bool = False) -> None:
        """Not seen."""

    expected = (
        f"Does it.\n\nArgs:\n    input_ids: {ARGUMENTS['input_ids']}.\n    flag: whether to.\n"
    )
    assert forward.__doc__ == expected
    with pytest.raises(ValueError, match=r"parameter 'flag'; say what it is: @auto_docstring\(fla"):

        @auto_docstring
        def without(self: object, flag: bool) -> None:
            """Intro."""

    with pytest.raises(ValueError, match="has no parameter 'flog'; it has"):

        @auto_docstring(flog="nothing")
        def misspelt(self: object, input_ids: int) -> None:
            """Intro."""


def test_nothing_happens_where_docstrings_are_stripped() -> None:
    code = (
        "from swathe.modeling.docstrings import auto_docstring\n"
        "f = auto_docstring(lambda input_ids, unknown: None)\n"
        "print(f.__doc__)"
    )
    ran = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "None", ran.stderr
