"""Networks by name: the shipped ones, and the user's own as ``package.module:function``."""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin

from torch import nn

from sparkir.errors import SparkirError, did_you_mean
from sparkir.models.bsrn import BSRN, BSRNS
from sparkir.models.carn import CARNM
from sparkir.models.dncnn import DnCNN
from sparkir.models.edsr import EDSR
from sparkir.models.facts import ModelFacts
from sparkir.models.fmen import FMEN
from sparkir.models.imdn import IMDN
from sparkir.models.mirnet import MIRNet
from sparkir.models.nafnet import NAFNet
from sparkir.models.plainusr import PlainUSR
from sparkir.models.rfdn import RFDN
from sparkir.models.rlfn import RLFN
from sparkir.models.safmn import SAFMN
from sparkir.models.span import SPAN
from sparkir.models.srcnn import SRCNN
from sparkir.models.swinir import SwinIR


@dataclass(frozen=True)
class _Entry:
    builder: Callable[..., nn.Module]
    description: str


_ENTRIES: dict[str, _Entry] = {
    "bsrn": _Entry(BSRN, "BSRN, separable convolutions, attention twice (NTIRE 2022)"),
    "bsrn-s": _Entry(BSRNS, "BSRN-S, the smallest BSRN (NTIRE 2022)"),
    "carn-m": _Entry(CARNM, "CARN-M, cascading and recursive, grouped convolutions (ECCV 2018)"),
    "dncnn": _Entry(DnCNN, "DnCNN, plain residual denoiser (TIP 2017)"),
    "edsr": _Entry(EDSR, "EDSR, deep residual super-resolution, 64 wide, 16 blocks (CVPRW 2017)"),
    "fmen": _Entry(FMEN, "FMEN, fast, light on memory, with attention at full size (NTIRE 2022)"),
    "imdn": _Entry(IMDN, "IMDN, multi-distillation, the NTIRE challenges' baseline (AIM 2019)"),
    "mirnet": _Entry(MIRNet, "MIRNet, three resolutions with dual attention (ECCV 2020)"),
    "nafnet": _Entry(NAFNet, "NAFNet, gates instead of activation functions, 32 wide (ECCV 2022)"),
    "plainusr": _Entry(PlainUSR, "PlainUSR, plain convolutions in a U-Net of channels (ACCV 2024)"),
    "rfdn": _Entry(RFDN, "RFDN, light super-resolution with spatial attention (AIM 2020)"),
    "rlfn": _Entry(RLFN, "RLFN, fast and light, with spatial attention (NTIRE 2022)"),
    "safmn": _Entry(SAFMN, "SAFMN, features modulated by four scales of their own (ICCV 2023)"),
    "span": _Entry(SPAN, "SPAN, attention without parameters (NTIRE 2024)"),
    "srcnn": _Entry(SRCNN, "SRCNN 9-5-5, bicubic and three convolutions (TPAMI 2016)"),
    "swinir": _Entry(SwinIR, "SwinIR-light, attention within windows, 60 wide (ICCVW 2021)"),
}
# The name under which the paper and its checkpoints speak of EDSR's default size.
_ENTRIES["edsr-baseline"] = _Entry(EDSR, "EDSR baseline: the name for edsr with its default size")

_EXAMPLE = (
    "for example: def tiny(facts): net = nn.Conv2d(3, 3, 3, padding=1); "
    "net.facts = ModelFacts(**facts); return net"
)


def available() -> dict[str, str]:
    """Return the names that :func:`build` knows, each with one line about the network."""
    return {name: _ENTRIES[name].description for name in sorted(_ENTRIES)}


def build(name: str, /, **options: Any) -> nn.Module:  # noqa: ANN401 - they come from a recipe
    """Return a new network with fresh weights; it carries ``facts``.

    Args:
        name: a name of :func:`available`, or ``package.module:function`` for a function of the
            user's own that returns an ``nn.Module``.
        options: the network's own (``scale``, ``width``, ...). For a function of the user's
            own, ``facts`` may be a dictionary of :class:`ModelFacts` fields: it is passed on if
            the function takes it, and becomes ``network.facts`` if the network has none.

    Raises:
        SparkirError: unknown name or option, an option out of range, or a network without facts.
    """
    if ":" in name:
        return _build_external(name, options)
    if name not in _ENTRIES:
        hint = did_you_mean(name.lower(), list(available()))
        raise SparkirError(f"no network is called {name!r}; {hint}")
    builder = _ENTRIES[name].builder
    _check_options(name, builder, options)
    return builder(**options)


def _check_options(
    name: str, builder: Callable[..., nn.Module], options: Mapping[str, object]
) -> None:
    parameters = inspect.signature(builder).parameters
    for option, value in options.items():
        if option not in parameters:
            raise SparkirError(
                f"network {name!r} has no option {option!r}; it has: {', '.join(parameters)}"
            )
        wanted, is_one = _kind(parameters[option].annotation)
        if not is_one(value):
            raise SparkirError(
                f"option {option!r} of network {name!r} must be {wanted}, got {value!r}"
            )


def _kind(annotation: object) -> tuple[str, Callable[[object], bool]]:
    """What an option of this annotation must be, and whether a value is that."""
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return f"one of {', '.join(map(str, choices))}", lambda value: value in choices
    return _KINDS.get(annotation, ("", lambda _: True))  # lists are checked by their networks


def _is_positive_int(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast("float", value))


_KINDS: dict[object, tuple[str, Callable[[object], bool]]] = {
    int: ("a whole number >= 1", _is_positive_int),
    int | None: ("a whole number >= 1", lambda value: value is None or _is_positive_int(value)),
    float: ("a number", _is_number),
    bool: ("true or false", lambda value: isinstance(value, bool)),
}


def _build_external(name: str, options: Mapping[str, Any]) -> nn.Module:
    function = find_function(name, "network")
    parameters = inspect.signature(function).parameters
    takes_facts = "facts" in parameters
    passed = {key: value for key, value in options.items() if key != "facts" or takes_facts}
    try:
        inspect.signature(function).bind(**passed)
    except TypeError as error:
        raise SparkirError(
            f"{name!r} cannot be called with the options given: {error}; "
            f"it takes: {', '.join(parameters) or 'none'}"
        ) from error
    network = function(**passed)
    if not isinstance(network, nn.Module):
        raise SparkirError(
            f"{name!r} must return an nn.Module, but returned {type(network).__name__}; {_EXAMPLE}"
        )
    if not isinstance(getattr(network, "facts", None), ModelFacts):
        setattr(network, "facts", _facts_from_options(name, options))  # noqa: B010 - for mypy
    return network


def find_function(name: str, what: str) -> Callable[..., object]:
    """The function that `package.module:function` names; errors speak of the `what` it makes.

    Raises:
        SparkirError: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise SparkirError(f"{name!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SparkirError(
            f"cannot import {error.name!r} for the {what} {name!r}; "
            "install it or add its folder to PYTHONPATH"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise SparkirError(
            f"cannot import {module_name!r} for the {what} {name!r}: {error}; mend the module"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SparkirError(f"the module {module_name!r} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]  # whatever it returns is checked by the caller


def _facts_from_options(name: str, options: Mapping[str, Any]) -> ModelFacts:
    facts = options.get("facts")
    if not isinstance(facts, Mapping):
        raise SparkirError(
            f"the network of {name!r} carries no facts; set network.facts = ModelFacts(...) "
            f"in the function or give the option facts; {_EXAMPLE}"
        )
    try:
        return ModelFacts(**facts)
    except TypeError as error:
        raise SparkirError(f"facts of {name!r}: {error}") from error
