"""One run as data: what to train, on what, how. TOML in and out; unknown keys are refused."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sparkir.errors import SparkirError, did_you_mean
from sparkir.quant.spec import QuantSpec
from sparkir.spark.weighting import weightings

_RECIPES = resources.files("sparkir.recipes")
_NAME = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f]+")
_OF_TRAINING = ("train", "test", "scale", "patch_px", "batch", "licence")
"""Keys of [data] that mean nothing to a network that is there, on images that are named."""


_DEGRADES = {
    "border": "bicubic",
    "sigma": "noise",
    "test_sigma": "noise",
    "quality": "jpeg",
    "test_quality": "jpeg",
}
"""Keys of [data] that mean something to one degradation alone."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(_Section):
    """Images to learn from and to be judged by."""

    train: str
    """Folder of clean images, of pairs when `degradation` is `pairs`, or `photographs:train` for
    the ones inside scikit-image. A known set's own folder will do; see the data page."""
    test: str
    """The same for the images that are measured; never trained on."""
    degradation: Literal["bicubic", "noise", "jpeg", "pairs"] = "bicubic"
    """What makes the input from the clean image."""
    scale: Literal[1, 2, 3, 4, 8] = 1
    """Side of the output / side of the input, for `bicubic` and `pairs`."""
    border: Literal["symmetric", "replicate"] = "symmetric"
    """Border of the bicubic: today's MATLAB, or the older one of some benchmark files."""
    sigma: tuple[float, float] | float = 25.0
    """Noise in 8-bit levels, or a range to draw from."""
    test_sigma: float | None = None
    """Noise of the test images; as `sigma` if not given."""
    quality: tuple[int, int] | int = 40
    """JPEG quality, or a range to draw from."""
    test_quality: int | None = None
    """JPEG quality of the test images; as `quality` if not given."""
    channels: Literal[1, 3] = 3
    """3 for colour; 1 makes the images grey before they are degraded."""
    patch_px: Annotated[int, Field(ge=8, strict=True)] = 48
    """Side of the input crops."""
    batch: Annotated[int, Field(ge=1, strict=True)] = 16
    """Crops per step."""
    licence: str = ""
    """Terms of the training images, for the model card."""
    skip_broken: bool = False
    """Leave unreadable images out instead of stopping."""

    def as_tested(self) -> Data:
        """The same with the degradation that test images get."""
        sigma = self.sigma if self.test_sigma is None else self.test_sigma
        quality = self.quality if self.test_quality is None else self.test_quality
        return self.model_copy(update={"sigma": sigma, "quality": quality})

    def as_pairs(self) -> Data:
        """The same for images that are degraded already."""
        unused = {key: type(self).model_fields[key].default for key in _DEGRADES}
        return self.model_copy(update={**unused, "degradation": "pairs"})

    def require_consistent(self) -> None:
        """Raise ValueError if a key does nothing for this degradation, or the scale is wrong."""
        made = self.degradation
        for key, needed in _DEGRADES.items():
            if getattr(self, key) != type(self).model_fields[key].default and made != needed:
                raise ValueError(f'data.{key} is for data.degradation = "{needed}"; leave it out')
        if made in ("noise", "jpeg") and self.scale != 1:
            raise ValueError(f"{made} keeps the size; leave out data.scale")
        if made == "bicubic" and self.scale == 1:
            raise ValueError("bicubic needs data.scale = 2, 3, 4 or 8")


class Network(_Section):
    """One network by name."""

    model: str
    """A name that `sparkir models` lists, or `package.module:function`."""
    options: dict[str, Any] = {}
    """The network's own options, such as width or scale."""
    weights: str = ""
    """Checkpoint file; `package:NAME` for one that ships; empty for fresh weights. For the
    student, `teacher` copies the teacher's."""


class Distill(_Section):
    """What the student is pulled to besides the ground truth."""

    method: Literal["kd", "fitnet", "at", "skt", "fakd", "blocks", "dckd", "slkd"] = "kd"
    """What is imitated besides the teacher's output: nothing, or features."""
    norm: Literal["l1", "mse", "matched"] = "mse"
    """Distance between the outputs; `matched` is a squared error that pulls as hard as an L1."""
    strength: Annotated[float, Field(ge=0)] = 1.0
    """Factor of that distance; 0, beside a method of features, leaves it out."""
    target: Literal["teacher", "truth", "both"] = "teacher"
    """`both`: to the teacher by W, to the truth by what W leaves of 1. `truth` is the control: the
    same loss without a teacher's knowledge."""
    feature_strength: Annotated[float, Field(gt=0)] | None = None
    """Factor of the method's own first term, the others in proportion; left out as published."""

    encoder: str = ""
    """For dckd: what it looks at images with, as `package.module:function`; left out, fixed random
    convolutions in the place of the published VQGAN."""

    @field_validator("strength")
    @classmethod
    def _imitates_something(cls, strength: float, info: ValidationInfo) -> float:
        if strength == 0 and info.data.get("method", "kd") == "kd":
            raise ValueError("0 leaves nothing to imitate; give a larger one, or a distill.method")
        return strength

    @model_validator(mode="after")
    def _fits_the_method(self) -> Distill:
        if self.method != "kd" and self.target == "truth":
            raise ValueError(
                f'{self.method} imitates features, which the truth has none of; target = "truth" '
                'goes with method = "kd"'
            )
        if self.method == "kd" and self.feature_strength is not None:
            raise ValueError('feature_strength is of a method of features; method = "kd" has none')
        if self.method != "dckd" and self.encoder:
            raise ValueError(f'{self.method} has no encoder; encoder goes with method = "dckd"')
        return self


class WeightingChoice(_Section):
    """Where the distillation counts."""

    name: str = "uniform"
    """A source of W; see `sparkir recipes --weightings`."""
    options: dict[str, int | float] = {}
    """The source's own options."""

    @model_validator(mode="after")
    def _known(self) -> WeightingChoice:
        if self.name not in weightings():
            raise ValueError(_unknown("weighting", self.name, weightings()))
        return self


class Train(_Section):
    """How long and how fast."""

    steps: Annotated[int, Field(ge=1, strict=True)]
    """Optimizer steps."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """The student's optimizer."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Of the network."""
    grid_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of the grids' steps, as a share of themselves per step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the network, not of the grids."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Falls to 1 %, halves at every quarter, or stays."""
    warmup: Annotated[int, Field(ge=0, strict=True)] = 0
    """Steps over which the rate rises."""
    float_steps: Annotated[int, Field(ge=0, strict=True)] = 0
    """Steps in floating point before the grids are set and rounding begins, for students of fresh
    weights: grids that are set to what those compute hold nothing else."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average that becomes the result; 0 for none."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest gradient norm; 0 for no limit."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """`auto` takes bfloat16 autocast where it is fast."""
    channels_last: bool | Literal["auto"] = "auto"
    """Channels innermost in memory; `auto` does so with bfloat16."""
    compile: bool | Literal["auto"] = "auto"
    """Fuse the quantizers' arithmetic with torch.compile; `auto` does so in runs of 2,000 steps and
    more, where there is a compiler."""
    cuda_graphs: bool = True
    """On a GPU, record the networks' passes and replay them; takes more of its memory."""
    teacher_cache: bool = False
    """Compute the teacher's outputs once, on whole images, and keep them."""
    teacher_cache_gb: Annotated[float, Field(gt=0)] = 20.0
    """What they may take of the disk."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU where there is one."""
    calibration_images: Annotated[int, Field(ge=1, strict=True)] = 128
    """Training crops that set the grids before the first step."""
    log_every: Annotated[int, Field(ge=1, strict=True)] = 10
    """Steps between two lines of the event stream."""
    evaluate_every: Annotated[int, Field(ge=0, strict=True)] = 0
    """Steps between two evaluations; 0 for one at the end."""
    checkpoint_every: Annotated[int, Field(ge=1, strict=True)] = 100
    """Steps between two checkpoints."""


class Recipe(_Section):
    """A whole run."""

    name: str
    """How the run calls itself, and its folder."""
    description: str = ""
    """One line on what it is for."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Of fresh weights, of the data's order and of everything else that is random."""
    data: Data
    teacher: Network | None = None
    student: Network
    quant: QuantSpec | None = None
    """None trains in floating point."""
    distill: Distill | None = None
    """None trains on the ground truth alone."""
    weighting: WeightingChoice = WeightingChoice()
    train: Train
    metric: Literal["y", "rgb", "grey"] = "y"
    """PSNR and SSIM on luma with a border of `scale` px cut off (the super-resolution
    convention; whole at scale 1, as for deraining), on RGB whole (denoising, low light,
    deblurring), or on a grey image's one channel."""
    baselines: tuple[Literal["degraded", "teacher", "ptq-w8a8", "ptq", "qat"], ...] = ()
    """Rows of the final table besides the student."""

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name = {self.name!r} cannot be that of a folder; choose another")
        if self.distill is not None and self.teacher is None:
            raise ValueError("distill needs a [teacher]; name one, or remove [distill]")
        if self.distill is None and self.weighting != WeightingChoice():
            raise ValueError("[weighting] weights a distillation; add [distill]")
        if self.teacher is not None and self.teacher.weights == "teacher":
            raise ValueError('teacher.weights = "teacher" is for the student; name a checkpoint')
        if self.student.weights == "teacher" and self.teacher is None:
            raise ValueError('student.weights = "teacher" needs a [teacher]')
        self.data.require_consistent()
        if (self.metric == "grey") != (self.data.channels == 1) and self.metric != "y":
            raise ValueError('metric = "grey" and data.channels = 1 belong together; set both')
        if self.quant is None and {"ptq-w8a8", "ptq", "qat"} & set(self.baselines):
            raise ValueError("baselines with quantization need a [quant]")
        if self.train.float_steps and self.quant is None:
            raise ValueError("train.float_steps come before quantization; add a [quant]")
        if self.train.float_steps >= self.train.steps:
            raise ValueError("train.float_steps must be fewer than train.steps")
        if self.teacher is None and "teacher" in self.baselines:
            raise ValueError('the baseline "teacher" needs a [teacher]')
        return self

    def to_toml(self) -> str:
        """The recipe with every default written out."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def shipped() -> dict[str, str]:
    """Every shipped recipe and its one-line description."""
    names = sorted(p.name.removesuffix(".toml") for p in _RECIPES.iterdir() if _is_toml(p.name))
    return {name: load(name).description for name in names}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, by which editors complete and check one."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "sparkir recipe"
    schema["$defs"]["WeightingChoice"]["properties"]["name"]["enum"] = list(weightings())
    return schema


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name or file, then apply overrides like `train.steps=100`.

    Raises:
        SparkirError: no such recipe, broken TOML, unknown key, or a value that does not fit; the
            message names the key and, where one is near, the right one.
    """
    text, source = _read(str(name_or_path))
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SparkirError(f"{source} is not valid TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    return from_values(values, source)


def from_values(values: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from plain values; errors speak of `source`."""
    try:
        return Recipe.model_validate(values)
    except SparkirError as error:  # of QuantSpec, which knows no recipes
        raise SparkirError(f"{source}: {error}") from error
    except ValidationError as error:
        problems = "; ".join(_explain(item) for item in error.errors())
        raise SparkirError(f"{source}: {problems}") from error


def with_overrides(data: Data, overrides: Sequence[str]) -> Data:
    """The data section with overrides like `data.test_sigma=50`.

    Raises:
        SparkirError: as `load`, or an override is of another section.
    """
    if not overrides:
        return data
    values: dict[str, Any] = {"data": data.model_dump()}
    for override in overrides:
        _override(values, override)
    wanted = [override.partition("=")[0] for override in overrides]
    useless = [key for key in wanted if key.partition(".")[2] in _OF_TRAINING]
    if values.keys() != {"data"} or useless:
        raise SparkirError(
            f"--set {(useless or wanted)[-1]!r} changes nothing that is evaluated; only what makes "
            "the test images can be changed, such as data.test_sigma=50, and where they lie with "
            "--data"
        )
    for key in ("sigma", "quality"):
        tested = f"data.test_{key}"
        if f"data.{key}" in wanted and tested not in wanted and getattr(data, f"test_{key}"):
            raise SparkirError(
                f"--set data.{key} is of the training images here; test images have "
                f"{tested}={getattr(data, f'test_{key}')}, so set that"
            )
    try:
        changed = Data.model_validate(values["data"])
        changed.require_consistent()
    except ValidationError as error:
        problems = "; ".join(_explain(item, ("data",)) for item in error.errors())
        raise SparkirError(f"--set: {problems}") from error
    except ValueError as error:
        raise SparkirError(f"--set: {error}") from error
    return changed


def changed(recipe: Recipe, **keys: Any) -> Recipe:  # noqa: ANN401 - values of a recipe
    """The recipe with whole keys of its top level replaced, checked like one from a file.

    Raises:
        SparkirError: they do not fit the rest.
    """
    plain = {
        k: v.model_dump(mode="json") if isinstance(v, _Section) else v for k, v in keys.items()
    }
    return from_values(recipe.model_dump(mode="json") | plain, f"recipe {recipe.name}, changed")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys in which two recipes differ, as `key: old -> new`; a description changes nothing."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted((before.keys() | after.keys()) - {"description"})
        if before.get(key) != after.get(key)
    ]


def _is_toml(name: str) -> bool:
    return name.endswith(".toml")


def _read(name: str) -> tuple[str, str]:
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text("utf-8-sig"), name  # as some editors write it
        except (OSError, UnicodeDecodeError) as error:
            raise SparkirError(f"cannot read the recipe {name}: {error}") from error
    known = [p.name.removesuffix(".toml") for p in _RECIPES.iterdir() if _is_toml(p.name)]
    if name not in known:
        raise SparkirError(f"no recipe file {name}; " + _unknown("recipe", name, known))
    return (_RECIPES / f"{name}.toml").read_text("utf-8"), f"recipe {name}"


def _override(values: dict[str, Any], override: str) -> None:
    """Apply `a.b=value`; the value is read as TOML, and as plain text if it is none."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SparkirError(f"--set {override!r} is not of the form key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SparkirError(f"--set {override!r}: {parent} holds a value, not a section")
    values[last] = value


def _explain(error: Any, within: Sequence[str] = ()) -> str:  # noqa: ANN401 - pydantic's record
    """One line for one of pydantic's errors, found while reading the section `within`."""
    place = [*within, *(str(part) for part in error["loc"])]
    key = ".".join(place)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *section, name = place
        bare = [known.rpartition(".")[2] for known in _keys_of(section)]
        near = difflib.get_close_matches(name, bare, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*section, *near])!r}?" if near else ""
        return f"unknown key {key!r}; " + (hint or f"known: {', '.join(_keys_of(section))}")
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key} = {error['input']!r}: {message}" if key else message


def _keys_of(place: Sequence[str]) -> list[str]:
    """The full names of the keys of the section at `place`."""
    section: Any = Recipe
    for part in place:
        annotation = section.model_fields[part].annotation
        inner = [annotation, *getattr(annotation, "__args__", ())]
        section = next(a for a in inner if hasattr(a, "model_fields") or a is QuantSpec)
    if hasattr(section, "model_fields"):
        names = list(section.model_fields)
    else:
        names = [field.name for field in fields(section)]
    return [".".join([*place, name]) for name in names]


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    return f"unknown {what} {name!r}; {did_you_mean(name, known, cutoff=0.5)}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null; a missing section is what None means here."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
