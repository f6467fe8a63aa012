"""The commands. The only place that prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from sparkir.errors import SparkirError
from sparkir.memory import keep_freed_memory
from sparkir.report.progress import CellDisplay, Display, follow

if TYPE_CHECKING:
    from sparkir.compare.tabulate import Comparison
    from sparkir.deploy.results import Benchmark
    from sparkir.recipe import Recipe
    from sparkir.report.scalars import Row
    from sparkir.restore.network import Restorer
    from sparkir.run import Outcome
    from sparkir.train.distribute import Devices

app = typer.Typer(
    name="sparkir",
    help="Small, truly quantized image-restoration networks that look like their teachers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out, err = Console(emoji=False), Console(stderr=True, emoji=False)

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or a name from `sparkir recipes`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a key, such as train.steps=2000. May be repeated."),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A run folder, a student .safetensors, an exported .onnx, or a network's name."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="Checkpoint of a network given by its name (.pth, .safetensors)")
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="Option of a network given by its name, such as scale=4."),
]


def main() -> None:
    """Run a command; a user's mistake is one line and exit code 1."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's: one process speaks for all
        out.quiet = err.quiet = os.environ["RANK"] != "0"
    try:
        app()
    except SparkirError as error:
        lines = (line.strip() for line in str(error).splitlines())
        _say(f"[bold red]error:[/] {escape(' '.join(filter(None, lines)))}", to=err)
        sys.exit(1)


@app.command()
def distill(
    recipe: RecipeName,
    teacher: Annotated[Path | None, typer.Option(help="The teacher's checkpoint.")] = None,
    student: Annotated[str | None, typer.Option(help="The student's network.")] = None,
    bits: Annotated[str | None, typer.Option(help="Weights and activations, as in w4a4.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Training images; with folders train/ and test/ inside, both."),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Where the run goes. Default: runs/NAME.")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
) -> None:
    """Train a quantized student under its teacher, measure it, and export it."""
    keep_freed_memory()
    from sparkir import run
    from sparkir.train.distribute import start
    from sparkir.train.loop import Interrupted

    changes = [*_shortcuts(teacher, student, bits, data), *(overrides or ())]
    chosen = _load(recipe, changes)
    devices = start(chosen.train.device)
    if not devices.first:
        return _assist(chosen, devices)
    folder = out_folder or _default_folder(chosen.name, resume=resume)
    _say(f"[bold]{escape(chosen.name)}[/]: {escape(chosen.description)}")
    _say(
        f"run folder [bold]{escape(str(folder))}[/]; "
        "a first Ctrl-C stops after the step, to be resumed"
    )
    with _display() as shown, shown.stoppable():
        try:
            outcome = run.distill(
                chosen,
                folder,
                resume=resume,
                report=shown,
                stop_requested=lambda: shown.stop,
                devices=devices,
            )
        except (Interrupted, KeyboardInterrupt) as error:
            if not (folder / "recipe.toml").is_file():
                raise
            shown.finish()
            what = "stopped and saved" if isinstance(error, Interrupted) else "stopped"
            command = f"--resume --out {shlex.quote(str(folder))}"
            _say(f"{what}; go on with {escape(command)}", to=err)
            sys.exit(130)
    _print_outcome(outcome)
    return None


def _assist(recipe: Recipe, devices: Devices) -> None:
    """Be one of the processes that do not speak."""
    from sparkir import run
    from sparkir.train.loop import Interrupted

    err.quiet = False  # from here on it may meet errors that the first does not
    with _display() as shown, shown.stoppable(), suppress(Interrupted, KeyboardInterrupt):
        run.assist(recipe, report=shown, stop_requested=lambda: shown.stop, devices=devices)


@app.command()
def compare(
    recipe: RecipeName,
    methods: Annotated[
        str | None,
        typer.Option(
            help="As in ptq,qat,kd,spark-paper, or all. "
            "Default: the rows that a claim about quality needs."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many; the first is the recipe's.")] = 1,
    baseline: Annotated[str, typer.Option(help="What differences are taken to.")] = "qat",
    data: Annotated[
        Path | None,
        typer.Option(help="Training images; with folders train/ and test/ inside, both."),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="One more test set. May be repeated."),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Default: runs/compare-NAME.")
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Trainings at the same time; they share the cores.")
    ] = 1,
    overrides: Overrides = None,
) -> None:
    """Train many methods from one start, score them side by side, and say how sure that is.

    Given again, the command goes on where it was interrupted, and adds what is new: methods, seeds,
    test sets. What is finished is taken as it is.
    """
    keep_freed_memory()
    from sparkir.compare.comparison import compare as carry_out
    from sparkir.compare.methods import choose
    from sparkir.train.loop import Interrupted

    chosen = _load(recipe, [*_shortcuts(None, None, None, data), *(overrides or ())])
    rows = choose(methods, chosen)
    folder = out_folder or Path("runs") / f"compare-{chosen.name}"
    _say(f"[bold]{escape(chosen.name)}[/]: {escape(', '.join(row.name for row in rows))}")
    _say(f"folder [bold]{escape(str(folder))}[/]; Ctrl-C stops after the step, to be gone on with")
    with _display(CellDisplay) as shown, shown.stoppable():
        try:
            comparison = carry_out(
                chosen,
                folder,
                methods=rows,
                seeds=seeds,
                baseline=baseline,
                more_sets=test or (),
                jobs=jobs,
                report=shown,
                stop_requested=lambda: shown.stop,
            )
        except (Interrupted, KeyboardInterrupt) as error:
            if not (folder / "recipe.toml").is_file():
                raise
            shown.finish()
            what = "stopped and saved" if isinstance(error, Interrupted) else "stopped"
            where = shlex.quote(str(folder))
            _say(f"{what} in {escape(where)}; go on with the same command", to=err)
            sys.exit(130)
    _print_comparison(comparison)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        str, typer.Option(help="Folder of clean images, or of pairs, or a known set's.")
    ],
    weights: Weights = None,
    option: Options = None,
    metric: Annotated[
        str | None, typer.Option(help="y (border of scale px cropped), rgb or grey (whole).")
    ] = None,
    each: Annotated[bool, typer.Option(help="Also print every image.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a key of data, such as data.test_sigma=50."),
    ] = None,
) -> None:
    """Measure PSNR and SSIM on a folder of images."""
    keep_freed_memory()
    from sparkir.evaluate import benchmark
    from sparkir.tools import evaluation_setup, open_model

    opened = open_model(model, weights, _parse_options(option))
    with _display() as shown:
        pairs, convention = evaluation_setup(opened, data, metric, shown, overrides or ())
        scores = benchmark.evaluate(opened.network, pairs, convention)
    _say(escape(f"{opened.label}: {convention.label}; SSIM alike; input {pairs.inputs}"))
    table = Table("image", "PSNR dB", "SSIM")
    for score in [*(scores if each else ()), benchmark.mean(scores)]:
        table.add_row(escape(score.name), f"{score.psnr_db:.3f}", f"{score.ssim:.4f}")
    out.print(table)


@app.command()
def restore(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="An image, a folder of them, or a quoted pattern: 'a/**/*.jpg'."
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="A file (.png .tif .jpg .webp), or a folder."),
    ],
    weights: Weights = None,
    option: Options = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What restoring may use, such as 2GB. Default: half of what is free."),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="onnxruntime or openvino, for an exported file. Default: what it was made for."
        ),
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option("--format", help="png, tif, jpg or webp, where OUT is a folder."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make finished files again; replace any other.")
    ] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Refuse images of more pixels. Default: 178,956,970."),
    ] = None,
) -> None:
    """Restore an image, or many: of any size and mode, in tiles that fit the memory.

    Transparency, 16 bits, colour profile and EXIF are kept. Files that the same model has finished
    are skipped. An exported .onnx needs no torch.
    """
    from sparkir.restore.files import restore_files
    from sparkir.restore.memory import parse_bytes
    from sparkir.restore.pictures import MAX_PIXELS

    memory_bytes = None if memory is None else parse_bytes(memory)
    restorer = _restorer(model, weights, option, runtime)
    if restorer.doubt:
        _say(f"[yellow]warning:[/] {escape(restorer.doubt)}", to=err)
    with _display() as shown:
        outcome = restore_files(
            restorer,
            source,
            target,
            shown,
            memory_bytes=memory_bytes,
            max_pixels=max_pixels or MAX_PIXELS,
            overwrite=overwrite,
            suffix=None if suffix is None else f".{suffix.removeprefix('.')}",
        )
    if outcome.finished:
        _say(
            f"{len(outcome.finished)} skipped: this model has finished them already; "
            "--overwrite makes them again"
        )
    _say(escape(f"{len(outcome.made)} restored with {restorer.label}, in {target}"))
    for message in outcome.failed:
        _say(f"[yellow]left out:[/] {escape(message)}", to=err)
    if outcome.failed:
        sys.exit(1)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    to: Annotated[str, typer.Option("--format", help="onnx or executorch.")] = "onnx",
    file: Annotated[
        Path | None, typer.Option("--out", help="Default: student.onnx in the run.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Images for the parity check. Default: the recipe's test.")
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Write it though its pixels differ, marked.")
    ] = False,
) -> None:
    """Write the integer network of a finished run as a file that a runtime executes."""
    from sparkir.tools import export_run

    with _display() as shown:
        path, said = export_run(run_folder, to, file, data, shown, allow_mismatch=allow_mismatch)
    _say(escape(f"{path} ({path.stat().st_size / 1024:.0f} KiB)"))
    for line in said:
        _say(escape(line))


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="A run folder, a student .safetensors, or an exported .onnx.")
    ],
    size: Annotated[
        list[str] | None,
        typer.Option(help="Input HxW in pixels. May be repeated. Default: 180x320 and 540x960."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each contender.")] = 7,
    threads: Annotated[
        int | None, typer.Option(help="Of every runtime alike. Default: all cores.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write every sample to this file.")
    ] = None,
) -> None:
    """Time a model and its float twin in every runtime that is here, side by side."""
    from sparkir.deploy.bench import plan_of
    from sparkir.deploy.results import write_json
    from sparkir.tools import bench_model

    if json_file is not None and json_file.is_dir():
        raise SparkirError(f"--json {json_file} is a folder; give a file")
    plan = plan_of(size or (), repeats=repeats, threads=threads)
    with _display() as shown:
        benchmark = bench_model(model, plan, shown)
    _print_benchmark(benchmark)
    if json_file is not None:
        write_json(benchmark, json_file)
        _say(f"written: {escape(str(json_file))}")


@app.command()
def push(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or one that was pulled.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    licence: Annotated[
        str, typer.Option(help="Of the model, by the Hub's name for it, such as apache-2.0.")
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is made now, for you alone.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Send a finished run's model, card, recipe and report to the Hugging Face Hub."""
    from sparkir import publish

    shipment = publish.shipment_of(run_folder, repo, licence=licence)
    _print_files(shipment.sizes())
    for note in shipment.notes:
        _say(f"[yellow]note:[/] {escape(note)}", to=err)
    if dry_run:
        kind = "private " if private else ""
        _say(
            f"nothing was sent; without --dry-run, these become one commit to {escape(repo)}, a "
            f"{kind}model repository that is made if there is none"
        )
        return
    with _display() as shown:
        address = publish.push(shipment, repo, private=private, report=shown)
    _say(f"pushed to {escape(address)}")


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit. Default: the newest.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be fetched, and fetch nothing.")
    ] = False,
) -> None:
    """Fetch a model that was pushed, checked against the Hub's hashes and opened once."""
    from sparkir import publish

    listing, names = publish.find_model(repo, revision=revision)
    _print_files({name: listing.bytes_of(name) for name in names})
    if dry_run:
        _say(f"nothing was fetched; this is {escape(repo)} at {escape(listing.commit)}")
        return
    with _display() as shown:
        said = publish.pull(listing, names, target, report=shown)
    _say(f"{escape(repo)} at {escape(listing.commit)}, in {escape(str(target))}")
    for line in said:
        _say(escape(line))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of them.")
    ],
    csv: Annotated[
        Path | None, typer.Option(help="Write the figures of every step to this file.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's files into each run.")
    ] = False,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Keep them up to date until the runs are done."),
    ] = False,
) -> None:
    """Say how far runs are and what they measured; as CSV or for TensorBoard, step by step."""
    from sparkir.report.events import read_events
    from sparkir.report.scalars import find_runs, rows_of, write_csv
    from sparkir.report.tensorboard import FOLDER, write_tensorboard

    if follow and not tensorboard:
        raise SparkirError("--follow keeps TensorBoard's files up to date; add --tensorboard")
    found = find_runs(runs)
    rows = [row for run in found for row in rows_of(str(run), read_events(run / "events.jsonl"))]
    _print_trainings(rows)
    if csv is not None:
        write_csv(rows, csv)
        _say(f"written: {escape(str(csv))}")
    if tensorboard:
        with _following(follow=follow) as seen:
            write_tensorboard(found, follow=follow, seen=seen)
        for run in found:
            _say(f"written: {escape(str(run / FOLDER))}")
        _say(escape(f"look at them with: tensorboard --logdir {shlex.quote(str(runs[0]))}"))


@app.command()
def check(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or a name from `sparkir recipes`.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="The teacher's checkpoint.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="As of `distill`; without RECIPE, a folder that holds a known set."),
    ] = None,
    known: Annotated[
        str | None, typer.Option("--as", help="The set that --data should be; see `sparkir sets`.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Read everything a recipe names, build its networks, and say what would be quantized.

    Without a recipe, compare the folder --data with the known set that it should be.
    """
    from sparkir.tools import check_recipe

    if recipe is None:
        _check_folder(data, known)
        return
    if known is not None:
        raise SparkirError("--as is for checking a folder alone; leave out RECIPE, or --as")
    changes = [*_shortcuts(teacher, None, None, data), *(overrides or ())]
    with _display() as shown:
        findings = check_recipe(_load(recipe, changes), shown)
    for finding in findings:
        _say(escape(finding))
    _say("[green]ready[/]")


def _check_folder(folder: Path | None, known: str | None) -> None:
    from sparkir.tools import check_folder

    if folder is None:
        raise SparkirError("say what to check: a RECIPE, or a folder with --data DIR")
    findings, whole = check_folder(folder, known)
    for finding in findings:
        _say(escape(finding))
    if not whole:
        _say("[yellow]not what its authors distribute[/]", to=err)
        sys.exit(1)
    _say("[green]complete[/]")


@app.command()
def models() -> None:
    """List the networks that can be teachers and students."""
    from sparkir.models.registry import available
    from sparkir.models.spandrel import SPANDREL

    others = {
        "PACKAGE.MODULE:FUNCTION": "what a function of yours returns",
        SPANDREL: "a teacher: whatever the package spandrel recognises in its checkpoint",
    }
    _print_names(available() | others)


@app.command()
def sets(
    name: Annotated[str | None, typer.Argument(help="Say everything about this one.")] = None,
) -> None:
    """List the known sets of images: what they hold, where they are, on what terms."""
    from sparkir.data.catalog import CATALOG, known_set

    if name is None:
        held = {k.name: ", ".join(f"{p.split} {p.label}" for p in k.parts) for k in CATALOG}
        _print_names({k.name: f"{k.task}: {held[k.name]}" for k in CATALOG})
        return
    one = known_set(name)
    _say(f"[bold]{escape(one.name)}[/], for {escape(one.task)}")
    for part in one.parts:
        _say(escape(f"{part.split}: {part.label}; {part.where}"))
    _say(escape(f"from {one.source}"))
    _say(escape(f"terms: {one.terms}"))
    if one.notes:
        _say(escape(f"note: {one.notes}"))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one in full, as TOML.")] = None,
    weightings: Annotated[bool, typer.Option(help="List the sources of weight maps.")] = False,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema, for editors.")] = False,
) -> None:
    """List the shipped recipes, or print one."""
    from sparkir import recipe
    from sparkir.spark import weighting

    if schema:
        _say(escape(json.dumps(recipe.json_schema(), indent=1)))
    elif weightings:
        _print_names(weighting.described())
    elif name is None:
        _print_names(recipe.shipped())
    else:
        _say(escape(recipe.load(name).to_toml()))


# Arguments ------------------------------------------------------------------------------------


def _load(recipe: str, overrides: list[str] | tuple[str, ...]) -> Recipe:
    from sparkir.recipe import load

    return load(recipe, overrides)


def _shortcuts(
    teacher: Path | None, student: str | None, bits: str | None, data: Path | None
) -> Iterator[str]:
    """The options of `distill` that stand for recipe keys."""
    if teacher is not None:
        yield f"teacher.weights={_quoted(teacher)}"
    if student is not None:
        yield f"student.model={_quoted(student)}"
    if bits is not None:
        found = re.fullmatch(r"w(\d+)a(\d+)", bits.lower())
        if not found:
            raise SparkirError(f"--bits {bits!r}: write the bits as in w4a4 or w8a8")
        yield f"quant.weight_bits={found[1]}"
        yield f"quant.activation_bits={found[2]}"
    if data is not None:
        yield from _data_shortcut(data)


def _data_shortcut(data: Path) -> Iterator[str]:
    """`--data`: both parts, if the folder has a part for each; else it is for training."""
    from sparkir.data.layouts import SPLITS, part_of

    parts = [data / "train", data / "test"]
    found = parts if all(p.is_dir() for p in parts) else [part_of(data, s) for s in SPLITS]
    train, test = found
    yield f"data.train={_quoted(train or data)}"
    if train is not None and test not in (None, train):
        yield f"data.test={_quoted(test)}"


def _quoted(text: str | Path) -> str:
    """A TOML string, which JSON's are as long as they escape no more than they must."""
    return json.dumps(str(text), ensure_ascii=False)


def _parse_options(texts: list[str] | None) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads("\n".join(texts or ()))
    except tomllib.TOMLDecodeError as error:
        raise SparkirError(f"--option takes name=value, such as scale=4: {error}") from error


def _restorer(
    model: str, weights: Path | None, options: list[str] | None, runtime: str | None
) -> Restorer:
    """Open a model to restore with; an exported file, or a run's, without torch."""
    path = Path(model)
    if (path / "student.onnx").is_file() and (path / "student.safetensors").is_file():
        path = path / "student.onnx"
    if path.suffix == ".onnx" and weights is None and not options:
        from sparkir.restore.network import open_exported

        return open_exported(path, runtime)
    if runtime is not None:
        raise SparkirError(f"--runtime is for an exported .onnx file, and {model} is none")
    try:
        from sparkir.tools import open_model, restorer_of
    except ModuleNotFoundError as error:
        raise SparkirError(
            f"{model} needs {error.name}, which is not installed; without it only an exported "
            ".onnx can be used. Install sparkir with its dependencies"
        ) from error
    return restorer_of(open_model(model, weights, _parse_options(options)))


def _default_folder(name: str, *, resume: bool) -> Path:
    """runs/NAME, numbered if it is taken; with `resume`, the newest that exists."""
    first = Path("runs") / name
    numbered = (re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name) for p in Path("runs").glob("*"))
    taken = [1] * first.exists() + [int(found[1]) for found in numbered if found]
    number = max(taken, default=int(resume)) + (not resume)
    return first if number == 1 else first.with_name(f"{name}-{number}")


# Display --------------------------------------------------------------------------------------


@contextmanager
def _display(kind: Callable[[Progress, Console], Display] = Display) -> Iterator[Display]:
    try:
        with follow(kind, out=out, err=err) as shown:
            yield shown
    except KeyboardInterrupt:
        _say("stopped; nothing half-written was left behind", to=err)
        sys.exit(130)


@contextmanager
def _following(*, follow: bool) -> Iterator[Callable[[int], None]]:
    """A bar without an end while TensorBoard's files grow; Ctrl-C ends it, which is no error."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=out, disable=not follow
    ) as progress:
        task = progress.add_task("following; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            yield lambda written: progress.update(task, description=f"{written} events")


def _print_trainings(rows: list[Row]) -> None:
    """The last figures of each training."""
    last: dict[tuple[object, object], Row] = {}
    for row in rows:
        place = (row["run"], row["training"])
        last[place] = last.get(place, {}) | row
    table = Table("run", "training", "step", "loss", "PSNR dB")
    for row in last.values():
        figures = (f"{row[k]:.{n}f}" if k in row else "" for k, n in (("loss", 5), ("psnr_db", 3)))
        table.add_row(*(escape(str(row[key])) for key in ("run", "training", "step")), *figures)
    out.print(table)


def _print_outcome(outcome: Outcome) -> None:
    from sparkir.report.table import HEADER, cells

    title = f"{outcome.convention.label}; SSIM alike"
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="right" if index > 1 else "left")
    for row in outcome.rows:
        table.add_row(*map(escape, cells(row)))
    out.print(table)
    if outcome.remark:
        _say(escape(outcome.remark))
    if outcome.parity is not None:
        _say(f"export: {escape(outcome.parity.summary())}")
    if outcome.deviating:
        _say(escape(outcome.deviating))
    _say("written:")
    for what, path in outcome.files.items():
        _say(f"  {what:12} {escape(str(path))}")


def _print_comparison(comparison: Comparison) -> None:
    from sparkir.report.comparison_text import columns

    for of_set in comparison.tables:
        title = f"{of_set.name}: {of_set.convention}; SSIM alike"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        chosen = columns(of_set, brief=True)
        for index, column in enumerate(chosen):
            right: dict[str, Any] = {"justify": "right", "no_wrap": True}
            table.add_column(column.title, **right if index else {"overflow": "fold"})
        for line in of_set.lines:
            table.add_row(*(escape(column.text(line)) for column in chosen))
        out.print(table)
        for note in of_set.notes:
            _say(escape(note))
    out.print()
    for note in comparison.notes:
        _say(escape(note))
    _say("written:")
    for what, path in comparison.files.items():
        _say(f"  {what:12} {escape(str(path))}")


def _print_benchmark(benchmark: Benchmark) -> None:
    from sparkir.deploy.results import HEADER, MEANING, cells

    for height, width in benchmark.plan.sizes_px:
        threads = benchmark.plan.threads
        title = f"input {height}x{width}, {threads} thread{'s' if threads > 1 else ''}"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(HEADER):
            right: dict[str, Any] = {"justify": "right", "no_wrap": True}
            table.add_column(name, **right if index else {"overflow": "fold"})
        for row in benchmark.rows:
            if row.size_px == (height, width):
                table.add_row(*map(escape, cells(row, benchmark.rows)))
        out.print(table)
    _say(escape(MEANING.format(repeats=benchmark.plan.repeats)))
    if benchmark.absent:
        _say(f"not measured: {escape('; '.join(benchmark.absent))}")


def _print_files(sizes: dict[str, int]) -> None:
    table = Table.grid(padding=(0, 3))
    table.add_column()
    table.add_column(justify="right")
    for name, size in sizes.items():
        table.add_row(escape(name), f"{size / 1024:,.1f} KiB")
    table.add_row("in all", f"{sum(sizes.values()) / 1024:,.1f} KiB")
    out.print(table)


def _print_names(names: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 3))
    for name, description in names.items():
        table.add_row(f"[bold]{escape(name)}[/]", escape(description))
    out.print(table)


def _say(markup: str, *, to: Console = out) -> None:
    """Print text, never broken into lines: it may hold a path, or be read by a program."""
    to.print(markup, highlight=False, soft_wrap=True)
