"""Every activation beside transformers' own, values and slopes, in fp32 and bf16."""

from __future__ import annotations

import pytest
import torch
import transformers.activations as theirs

from swathe.modeling.layers.activations import ACT2FN

# these two hold parameters
WITH_PARAMETERS = {"prelu", "xielu"}


def test_all_stateless_names_are_there() -> None:
    assert set(ACT2FN) == set(theirs.ACT2FN) - WITH_PARAMETERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_values_and_slopes(name: str, dtype: torch.dtype) -> None:
    x = torch.linspace(-12, 12, 2401).to(dtype).requires_grad_()
    mine, expected = ACT2FN[name](x), theirs.ACT2FN[name](x)
    torch.testing.assert_close(mine, expected, atol=0, rtol=0)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (mine, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], atol=0, rtol=0)
