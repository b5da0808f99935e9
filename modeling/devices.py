"""Where the tensors of a model go: the forms of `device_map`, read against the model's own modules.

    device_map                      every parameter and buffer goes to
    "cuda:1", 1, torch.device(...)  that device
    {"model.layers.0": 0, ...}      the device of the longest name that its own name begins with;
                                    {"": "cpu"} names everything
    "auto", "sequential"            the visible GPUs in their order, each filled before the next,
                                    then the CPU

    model = LlamaForCausalLM.from_pretrained(path, device_map="auto")
    model = LlamaForCausalLM.from_pretrained(
        path, device_map="auto", max_memory={0: "20GB", 1: "20GB", "cpu": "64GB"}
    )
    model.hf_device_map     # {"model.embed_tokens": 0, "model.layers.0": 0, ..., "lm_head": 1}

What "auto" promises:
    whole       a module named in `_no_split_modules`, a module that calls a kernel, and a module
                without further modules below it stay on one device
    tied        parameters that are one lie on one device, counted once
    budget      90 % of what is free on a GPU, the rest being for activations, and all of the
                machine's memory for the CPU. `max_memory={0: "10GB", "cpu": "32GiB"}` replaces
                both: devices that it does not name get nothing
    no moves    weights never travel: what lies on the CPU is computed there. There is no "disk"
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swathe.modeling.checkpoint.errors import listing
from swathe.modeling.checkpoint.serialize import parse_size
from swathe.modeling.policy import KernelModule

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel

FORMS = ("auto", "sequential")
CPU = torch.device("cpu")
_ROOM_FOR_ACTIVATIONS = 0.1


@dataclass(frozen=True)
class Placement:
    """Devices by name: the longest name in `modules` that a tensor's name begins with decides.

    `main` is where forward's inputs are taken and its results given: the first parameter's device.
    Modules with buffers only (rotary angles) are there too, unless they are named themselves.
    """

    modules: Mapping[str, torch.device]
    main: torch.device

    def device_of(self, name: str) -> torch.device:
        """The device of a parameter, buffer or module, by its full name."""
        found = _covering(name, self.modules)
        return self.main if found is None else self.modules[found]

    def devices(self) -> list[torch.device]:
        """Every device in use, in order of its first module."""
        return list(dict.fromkeys(self.modules.values()))

    def as_hf(self) -> dict[str, int | str]:
        """HF's `hf_device_map`: a GPU is its number, another device its name."""
        return {
            name: device.index or 0 if device.type == "cuda" else str(device)
            for name, device in self.modules.items()
        }


def place(
    model: PreTrainedModel,
    device_map: object,
    max_memory: Mapping[Any, int | str] | None = None,
    dtype: torch.dtype | None = None,
) -> Placement:
    """Read a device_map in any of the forms above; `dtype` is what "auto" counts floats in.

    Nothing is moved. Raises TypeError and ValueError: for names that match nothing, parameters
    left over, ties or whole modules that would be split, and models that do not fit.
    """
    if max_memory is not None and device_map not in FORMS:
        raise ValueError(
            f'max_memory goes with device_map="auto", and device_map is {device_map!r}; leave one '
            "of them out"
        )
    if isinstance(device_map, Mapping):
        chosen = {name: device_named(device) for name, device in device_map.items()}
        _check_names(model, chosen)
        _check_whole(model, chosen)
    elif device_map in FORMS:
        budgets = available_memory() if max_memory is None else _budgets(max_memory)
        chosen = _merged(model, _filled(model, budgets, dtype))
    else:
        chosen = {"": device_named(device_map)}
    first = _covering(next(name for name, _ in model.named_parameters()), chosen)
    assert first is not None
    main = chosen[first]
    for unit, module in _units(model):
        if module is not None and next(module.parameters(), None) is None and unit not in chosen:
            found = _covering(unit, chosen)
            if found is not None and chosen[found] != main:
                chosen[unit] = main
    return Placement(chosen, main)


def device_named(given: object) -> torch.device:
    """The device that a value of device_map names; None is torch's default device."""
    if given is None:
        return torch.get_default_device()
    if isinstance(given, bool) or not isinstance(given, str | int | torch.device):
        raise TypeError(
            f"device_map={given!r}; it must name one device, such as 'cuda:0', be a dict of module "
            'names and devices, or be "auto"'
        )
    try:
        # not torch.device(0), which needs a GPU to be there
        device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    except RuntimeError:
        raise ValueError(
            f"device_map={given!r} names no device; allowed: a device such as 'cpu', 'cuda:0' or "
            f"0, a dict of module names and devices, {' or '.join(map(repr, FORMS))}. Weights are "
            "never kept on a disk"
        ) from None
    if device.type == "cuda":
        index, count = device.index or 0, torch.cuda.device_count()
        if index >= count:
            raise ValueError(
                f"device_map={given!r}: {count} GPUs are visible"
                f"{f', 0 to {count - 1}' if count else ''}; name one of those, or 'cpu'"
            )
        return torch.device("cuda", index)
    return device


def available_memory() -> dict[torch.device, int]:
    """Bytes that "auto" may fill, by device, in its order: visible GPUs, then the CPU."""
    free: dict[torch.device, int] = {}
    for index in range(torch.cuda.device_count()):
        bytes_free = torch.cuda.mem_get_info(index)[0]
        free[torch.device("cuda", index)] = int(bytes_free * (1 - _ROOM_FOR_ACTIVATIONS))
    known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
    free[CPU] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else sys.maxsize
    return free


def bytes_of(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes of tensors; with `dtype`, as if those of floating point had it."""
    total = 0
    for t in tensors:
        total += t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize
    return total


def _budgets(max_memory: Mapping[Any, int | str]) -> dict[torch.device, int]:
    found: dict[torch.device, int] = {}
    for device, size in max_memory.items():
        try:
            found[device_named(device)] = parse_size(size) if size != 0 else 0
        except (TypeError, ValueError) as error:
            error.add_note(f"max_memory has {device!r}: {size!r}")
            raise
    return dict(sorted(found.items(), key=lambda item: (item[0].type != "cuda", item[0].index)))


def _covering(name: str, modules: Mapping[str, torch.device]) -> str | None:
    """The longest of `modules` that is `name` or a module around it."""
    while name not in modules:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have, tied ones under each of theirs."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def _is_whole(module: nn.Module, no_split: set[str]) -> bool:
    """Whether all tensors below a module must lie on one device."""
    names = {cls.__name__ for cls in type(module).__mro__}
    if names & no_split or isinstance(module, KernelModule):
        return True
    return not any(next(_below(child), None) is not None for child in module.children())


def _below(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _no_split(model: PreTrainedModel) -> set[str]:
    """Class names of the model and of the models inside it."""
    return {name for m in model.modules() for name in getattr(m, "_no_split_modules", ())}


def _check_names(model: PreTrainedModel, chosen: Mapping[str, torch.device]) -> None:
    if not chosen:
        raise ValueError('device_map={} places nothing; use {"": "cpu"} for one device')
    names = {"", *(name for name, _ in model.named_modules()), *_tensors(model)}
    unknown = [name for name in chosen if name not in names]
    left = [n for n, _ in model.named_parameters() if _covering(n, chosen) is None]
    problems = []
    if unknown:
        problems.append(f"names that match no module of {type(model).__name__}: {listing(unknown)}")
    if left:
        problems.append(f"parameters left over: {listing(left)}")
    if problems:
        tops = sorted({name for name, _ in model.named_children()})
        raise ValueError(
            f"device_map: {'; '.join(problems)}. Names are those of model.named_modules(), the "
            f'first of them {tops}; {{"": "cpu"}} beside others covers the rest'
        )


def _check_whole(model: PreTrainedModel, chosen: Mapping[str, torch.device]) -> None:
    """Raise ValueError for ties and whole modules on more than one device."""
    covered = {name: _covering(name, chosen) for name in _tensors(model)}
    where = {name: chosen[found] for name, found in covered.items() if found is not None}
    for name, source in model.tied_parameters().items():
        if where.get(name) != where.get(source):
            raise ValueError(
                f"device_map: {name!r} ({where[name]}) and {source!r} ({where[source]}) are one "
                "parameter; give both modules the same device, or load with "
                "tie_word_embeddings=False"
            )
    for unit, module in _units(model):
        found = {where[n] for n in _names_below(unit, module) if n in where}
        if len(found) > 1:
            raise ValueError(
                f"device_map splits {unit!r}, a {type(module).__name__}, over "
                f"{sorted(map(str, found))}; it runs on one device, so name it as a whole"
            )


def _names_below(unit: str, module: nn.Module | None) -> list[str]:
    if module is None:
        return [unit]
    return [f"{unit}.{name}" if unit else name for name in _tensors(module)]


def _units(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module | None]]:
    """(name, module) of what stays whole, in order; module None for a parameter of its own."""
    no_split = _no_split(model)

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
        if next(_below(module), None) is None:
            return
        if module is not model and _is_whole(module, no_split):
            yield name, module
            return
        dotted = f"{name}." if name else ""
        for own, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            yield dotted + own, None
        for child, below in module.named_children():
            yield from walk(dotted + child, below)

    yield from walk("", model)


def _filled(
    model: PreTrainedModel, budgets: Mapping[torch.device, int], dtype: torch.dtype | None
) -> dict[str, torch.device]:
    """A device for each unit: the first that has room for it and for what is tied to it."""
    tied = model.tied_parameters()
    size = {n: bytes_of([t], dtype) for n, t in _tensors(model).items() if n not in tied}
    units = {unit: _names_below(unit, module) for unit, module in _units(model)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    units = {unit: names for unit, names in units.items() if parameters & {*names}}
    owner = {name: unit for unit, names in units.items() for name in names}
    group = {unit: unit for unit in units}
    for name, source in tied.items():
        first, second = sorted((group[owner[name]], group[owner[source]]), key=list(units).index)
        group = {unit: first if head == second else head for unit, head in group.items()}
    need = {
        head: sum(size.get(n, 0) for unit in units if group[unit] == head for n in units[unit])
        for head in dict.fromkeys(group.values())
    }
    devices, left = list(budgets), dict(budgets)
    where: dict[str, torch.device] = {}
    for head, amount in need.items():
        while devices and left[devices[0]] < amount:
            devices.pop(0)
        if not devices:
            given = ", ".join(f"{device}: {room}" for device, room in budgets.items())
            raise ValueError(
                f'device_map="auto": the model needs {sum(need.values())} bytes, and {head!r}, of '
                f"{amount}, has no room left in {{{given}}}; give more in max_memory, or a "
                "smaller dtype"
            )
        where[head] = devices[0]
        left[devices[0]] -= amount
    return {unit: where[group[unit]] for unit in units}


def _merged(model: PreTrainedModel, where: Mapping[str, torch.device]) -> dict[str, torch.device]:
    """The same placement in the fewest names: a module whose units agree stands for them."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, torch.device]]:
        dotted = f"{name}." if name else ""
        inside = {u: d for u, d in where.items() if u == name or u.startswith(dotted)}
        if len(set(inside.values())) == 1:
            yield name, next(iter(inside.values()))
            return
        for own, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            yield dotted + own, where[dotted + own]
        for child, below in module.named_children():
            yield from walk(dotted + child, below)

    return dict(walk("", model))
