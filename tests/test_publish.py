"""Runs to the Hub and back: by huggingface_hub itself, to a server that speaks its protocol."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from helpers import IN_FLOAT, call, contents, load_image, write_recipe
from hub_server import TOKEN, Repo, running
from sparkir import publish, recipe
from sparkir.assemble import load_student, save_student
from sparkir.deploy.card import read_card
from sparkir.models.checkpoint import load_weights, read_metadata, read_weights, save_weights
from sparkir.models.registry import build

pytest_plugins = ["helpers"]
# huggingface_hub's own way of sending a large file, of which its HTTP client complains.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
needs_hub = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="needs huggingface_hub"
)
REPO = "somebody/tiny-x2"
SENT = {
    *("README.md", "recipe.toml", "student.safetensors", "student.onnx", "student.md"),
    *("report.md", "report.json", "comparison.png"),
}


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, with the state of its training."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


def forget_hub():
    """Have huggingface_hub imported again: it reads its settings once."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, known to huggingface_hub in this process by its own settings."""
    with running() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")  # the stand-in has git-lfs's transfer
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        forget_hub()
        yield served
        forget_hub()


def metadata_of(readme):
    import yaml

    _, head, body = readme.split("---\n", 2)
    return yaml.safe_load(head), body


# What would be sent ---------------------------------------------------------------------------


def test_a_dry_run_lists_what_is_for_others_and_sends_nothing(run):
    said = call("push", run, REPO, "--dry-run", "--private")
    assert said.code == 0, said
    for name in SENT:
        assert f"\n{name} " in f"\n{said.out}"
    for line in said.out.splitlines():
        name, _, size = line.partition(" ")
        if name in SENT - {"README.md"}:
            assert size.strip() == f"{(run / name).stat().st_size / 1024:,.1f} KiB"
    assert "training" not in said.out
    assert "events" not in said.out
    assert f"one commit to {REPO}, a private model repository" in said.text
    assert "huggingface_hub" not in sys.modules


def test_the_readme_is_a_card_with_the_hubs_metadata(run):
    shipment = publish.shipment_of(run, REPO, licence="apache-2.0")
    metadata, body = metadata_of(shipment.files["README.md"].decode())
    row = json.loads((run / "report.json").read_text())["rows"][-1]
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "sparkir"
    assert metadata["pipeline_tag"] == "image-to-image"
    assert {"super-resolution", "edsr", "w4a4", "onnx"} <= set(metadata["tags"])
    (entry,) = metadata["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "tiny"
    assert result["dataset"] == {"type": "test", "name": "test"}
    values = {metric["type"]: metric for metric in result["metrics"]}
    assert values["psnr"]["value"] == round(row["psnr_db"], 4)
    assert values["ssim"]["value"] == round(row["ssim"], 4)
    assert "PSNR-Y studio range, uint8, crop 2 px" in values["psnr"]["name"]
    assert body.startswith("\n# tiny\n")
    for words in (
        *(f"sparkir pull {REPO} model", "| task | enlarges 2 times |", "int8 kernel"),
        *("bicubic", "(comparison.png)", "learning_rate = "),
    ):
        assert words in body
    assert body.count("\n# ") == 1


def test_a_readme_of_the_users_own_is_sent_as_it_is(run):
    (run / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    said = call("push", run, REPO, "--dry-run")
    assert "README.md is the folder's own" in said.err
    assert publish.shipment_of(run, REPO).files["README.md"] == run / "README.md"
    said = call("push", run, REPO, "--dry-run", "--licence", "mit")
    assert said.code == 1
    assert "is sent as it is; write the licence there" in said.err


def test_paths_of_this_machine_are_pointed_out(run, tmp_path):
    student, chosen = load_student(run / "student.safetensors")
    data = chosen.data.model_copy(update={"train": "/home/me/photos"})
    moved = chosen.model_copy(update={"data": data})
    save_student(moved, student, run / "student.safetensors")
    (run / "recipe.toml").write_text(moved.to_toml())
    said = call("push", run, REPO, "--dry-run")
    assert "shows paths of this machine: /home/me/photos" in said.err


def rewritten(path, change):
    """The file with its metadata changed."""
    words, state = read_metadata(path), read_weights(path)
    save_weights(state, path, words | change(words))


def exported_as(run, **changes):
    model = onnx.load(run / "student.onnx")
    card = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, card | changes)
    onnx.save(model, run / "student.onnx")


REFUSED = {
    "another recipe": (
        lambda run: (run / "recipe.toml").write_text(
            recipe.load(run / "recipe.toml", ["train.steps=99"]).to_toml()
        ),
        "recipe.toml is not the student's: train.steps: 99 -> 12",
    ),
    "an exported file cut off": (
        lambda run: (run / "student.onnx").write_bytes((run / "student.onnx").read_bytes()[:3000]),
        "ONNX Runtime cannot open ",
    ),
    "one of other bits": (lambda run: exported_as(run, quantization="W8A8"), "different networks"),
    "one for another runtime": (lambda run: exported_as(run, target="openvino"), "different netw"),
    "a recipe that is no JSON": (
        lambda run: rewritten(run / "student.safetensors", lambda words: {"recipe": "{"}),
        "student.safetensors has a damaged recipe: Expecting property name",
    ),
    "a recipe without an end": (
        lambda run: rewritten(run / "student.safetensors", lambda words: {"recipe": "[" * 200_000}),
        "student.safetensors has a damaged recipe: maximum recursion depth",
    ),
    "a student of a size that there is not": (
        lambda run: rewritten(
            run / "student.safetensors",
            lambda words: {"recipe": words["recipe"].replace('"width": 8', '"width": 10000000')},
        ),
        "cannot build the student of ",
    ),
    "a report without rows": (
        lambda run: (run / "report.json").write_text('{"rows": []}'),
        "report.json is damaged (list index out of range); delete it",
    ),
    "a report that is none": (
        lambda run: (run / "report.json").write_text("[]"),
        "report.json holds no report; delete it",
    ),
    "a card that is no text": (
        lambda run: (run / "student.md").write_bytes(b"\xff\xfe"),
        "cannot read ",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_nothing_is_sent_that_could_not_be_used(run, what):
    spoil, says = REFUSED[what]
    spoil(run)
    said = call("push", run, REPO, "--dry-run")
    assert said.code == 1
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    assert says in said.err


def test_an_infinite_mean_is_left_out_of_the_hubs_metadata(run):
    report = json.loads((run / "report.json").read_text())
    report["rows"][-1]["psnr_db"] = None
    (run / "report.json").write_text(json.dumps(report))
    metadata, _ = metadata_of(publish.shipment_of(run, REPO).files["README.md"].decode())
    assert [m["type"] for m in metadata["model-index"][0]["results"][0]["metrics"]] == ["ssim"]


def test_a_card_that_is_made_anew_names_the_target(run):
    for name in ("student.md", "student.onnx"):
        (run / name).unlink()
    readme = publish.shipment_of(run, REPO).files["README.md"].decode()
    assert "| made for | onnxruntime |" in readme


MISTAKES = {
    "no run": (["nowhere", REPO], ["nowhere is no run folder", "sparkir distill"]),
    "unfinished": (["begun", REPO], ["is not finished", "--resume"]),
    "name": (["run", "tiny"], ["'tiny' is no name of a repository; write OWNER/NAME"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_before_anything_is_sent(run, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "recipe.toml", tmp_path / "begun")
    arguments, says = MISTAKES[mistake]
    said = call("push", *arguments)
    assert said.code == 1
    for words in says:
        assert words in said.err


@pytest.mark.parametrize("command", [["push", "run", REPO], ["pull", REPO, "out"]])
def test_without_the_package_the_fix_is_said(run, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "huggingface_hub" else find(n)
    )
    said = call(*command)
    assert said.code == 1
    assert "pip install 'sparkir[hub]'" in said.err


# To the Hub and back --------------------------------------------------------------------------


@needs_hub
def test_pushed_and_pulled_by_the_commands_it_restores_the_same(run, hub, tmp_path, finished):
    """In processes of their own, as a user's."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def sparkir(*arguments):
        command = [sys.executable, "-m", "sparkir", *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "Fetching" not in done.stderr  # huggingface_hub's own bars
        return " ".join(done.stdout.split())

    assert f"pushed to {hub.address}/{REPO}" in sparkir("push", run, REPO)
    (commit, files) = hub.repos[REPO].commits[-1]
    assert files.keys() == SENT
    for name in SENT - {"README.md"}:
        assert files[name] == (run / name).read_bytes()
    assert any(asked.startswith("PUT /upload/") for asked in hub.asked)  # git-lfs's
    assert "POST /api/validate-yaml" in hub.asked
    said = sparkir("pull", REPO, "out")
    assert f"{REPO} at {commit}, in out" in said
    assert "sparkir restore out IN OUT" in said
    assert contents(tmp_path / "out") == files
    picture = finished.project / "test" / "c.png"
    for folder, result in (("run", "a.png"), ("out", "b.png")):
        assert call("restore", tmp_path / folder, picture, tmp_path / result).code == 0
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), load_image(tmp_path / "b.png"))


@needs_hub
def test_pushed_again_what_is_gone_is_deleted_and_strangers_stay(run, hub):
    hub.repos[REPO] = Repo()
    old = {"student.pte": b"of an earlier push", "LICENSE": b"the user's"}
    hub.repos[REPO].commits.append(("1" * 40, old))
    assert call("push", run, REPO).code == 0
    assert hub.repos[REPO].commits[-1][1].keys() == SENT | {"LICENSE"}
    assert len(hub.repos[REPO].commits) == 3  # one commit
    asked = len(hub.asked)
    assert call("push", run, REPO).code == 0  # nothing is new
    assert len(hub.repos[REPO].commits) == 3
    assert not any(a.startswith("PUT") for a in hub.asked[asked:])


@needs_hub
def test_a_private_repository_is_made_private_and_needs_a_token(run, hub, tmp_path, monkeypatch):
    assert call("push", run, REPO, "--private").code == 0
    assert hub.repos[REPO].private
    assert call("pull", REPO, tmp_path / "mine").code == 0
    monkeypatch.delenv("HF_TOKEN")
    said = call("pull", REPO, tmp_path / "out")
    assert said.code == 1
    assert f"no model {REPO} on the Hub that you may see; check the name" in said.err


@needs_hub
def test_an_old_revision_can_be_pulled_and_a_pulled_model_pushed_on(run, hub, tmp_path):
    call("push", run, REPO)
    first = hub.repos[REPO].commits[-1][0]
    (run / "README.md").write_text("---\nlicense: mit\n---\n# Second\n")
    call("push", run, REPO)
    assert call("pull", REPO, tmp_path / "old", "--revision", first).code == 0
    assert call("pull", REPO, tmp_path / "new").code == 0
    assert "# Second" in (tmp_path / "new" / "README.md").read_text()
    assert "# Second" not in (tmp_path / "old" / "README.md").read_text()
    assert call("push", tmp_path / "old", "else/where").code == 0
    assert hub.repos["else/where"].commits[-1][1] == contents(tmp_path / "old")
    said = call("pull", REPO, tmp_path / "none", "--revision", "v9")
    assert f"{REPO} has no such revision" in said.err


@needs_hub
def test_a_float_run_comes_back_as_a_teacher(project, hub):
    write_recipe(project / "float.toml", {"train.steps": 1}, without=IN_FLOAT)
    assert call("distill", "float.toml", "--out", "run").code == 0
    assert call("push", "run", REPO).code == 0
    assert "student.onnx" not in hub.repos[REPO].commits[-1][1]
    metadata, body = metadata_of(hub.repos[REPO].commits[-1][1]["README.md"].decode())
    assert "onnx" not in metadata["tags"]
    assert "| quantization | float |" in body
    said = call("pull", REPO, "out")
    assert "--teacher out/student.safetensors, with teacher.model = 'edsr'" in said.text
    teacher = build("edsr", width=8, blocks=1, scale=2)
    load_weights(teacher, project / "out" / "student.safetensors")
    expected = read_weights(project / "run" / "student.safetensors")
    assert all(torch.equal(expected[k], v) for k, v in teacher.state_dict().items())
    chosen = recipe.load("tiny.toml", ["teacher.weights=out/student.safetensors"])
    assert publish.shipment_of(project / "out", REPO)
    assert chosen.teacher.weights == "out/student.safetensors"
    assert call("distill", "tiny.toml", "--teacher", "out/student.safetensors").code == 0


@needs_hub
def test_a_dry_pull_fetches_nothing(run, hub, tmp_path):
    call("push", run, REPO)
    said = call("pull", REPO, tmp_path / "out", "--dry-run")
    assert said.code == 0
    size = (run / "student.onnx").stat().st_size / 1024
    assert f"student.onnx {size:,.1f} KiB" in said.text
    assert "nothing was fetched" in said.text
    assert not (tmp_path / "out").exists()
    assert not any("/resolve/" in asked for asked in hub.asked)


# What goes wrong ------------------------------------------------------------------------------


@needs_hub
def test_nobody_is_logged_in(run, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = call("push", run, REPO)
    assert said.code == 1
    assert "nobody is logged in to the Hub; log in with `hf auth login`" in said.err
    assert hub.asked == []


@needs_hub
def test_a_token_that_is_not_accepted(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = call("push", run, REPO)
    assert said.code == 1
    assert "the Hub does not accept your token" in said.err
    assert "hf auth login" in said.err


@needs_hub
def test_somebody_elses_repository(run, hub):
    hub.read_only.add(REPO)
    said = call("push", run, REPO)
    assert said.code == 1
    assert f"you may not write to {REPO}" in said.err
    assert "write access" in said.err


@needs_hub
def test_a_large_file_that_cannot_be_stored(run, hub):
    hub.storage_full = True
    said = call("push", run, REPO)
    assert said.code == 1
    assert re.search(r"Error while uploading '[\w.]+' to the Hub\. .*Storage limit", said.err)
    assert said.err.count("\n") == 1
    assert len(hub.repos[REPO].commits) == 1


@needs_hub
@pytest.mark.parametrize("command", ["push", "pull"])
def test_no_network(run, hub, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    forget_hub()
    arguments = [run, REPO] if command == "push" else [REPO, tmp_path / "out"]
    said = call(command, *arguments)
    assert said.code == 1
    assert "the Hub cannot be reached" in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@needs_hub
def test_offline_by_a_setting(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget_hub()
    said = call("pull", REPO, tmp_path / "out")
    assert said.code == 1
    assert "the Hub cannot be reached" in said.err
    assert "HF_HUB_OFFLINE" in said.err


@needs_hub
def test_no_such_repository_or_one_of_something_else(hub, tmp_path):
    said = call("pull", REPO, tmp_path / "out")
    assert "no model somebody/tiny-x2 on the Hub that you may see" in said.err
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commits.append(("1" * 40, {"pytorch_model.bin": b"?"}))
    said = call("pull", REPO, tmp_path / "out")
    assert said.code == 1
    assert "it has no student.safetensors and no recipe.toml" in said.err
    assert not (tmp_path / "out").exists()


@needs_hub
def test_a_link_to_an_empty_folder_is_filled(run, hub, tmp_path, monkeypatch):
    call("push", run, REPO)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    said = call("pull", REPO, tmp_path / "link")
    assert said.code == 0, said
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "student.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert call("pull", REPO, ".").code == 0
    assert (tmp_path / "here" / "student.onnx").is_file()


@needs_hub
def test_the_folder_is_taken(run, hub, tmp_path):
    call("push", run, REPO)
    said = call("pull", REPO, run)
    assert said.code == 1
    assert "is there already and not empty; choose another OUT" in said.err


@needs_hub
@pytest.mark.parametrize("name", ["student.safetensors", "report.md"])
def test_a_file_that_arrives_damaged_is_refused(run, hub, tmp_path, name):
    call("push", run, REPO)
    content = (run / name).read_bytes()
    hub.damaged[name] = content[:-1] + bytes([content[-1] ^ 1])
    said = call("pull", REPO, tmp_path / "out")
    assert said.code == 1
    assert f"{name} is not what the Hub has under its hash" in said.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))
    assert "Pull again" in said.err
    hub.damaged.clear()
    again = call("pull", REPO, tmp_path / "out")
    assert again.code == 0, again
    assert (tmp_path / "out" / name).read_bytes() == content


def push_files(hub, run, changes):
    """As somebody might by hand."""
    files = {name: (run / name).read_bytes() for name in SENT if (run / name).is_file()}
    files |= changes
    commit = hashlib.sha1(b"".join(files.values())).hexdigest()
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commits.append((commit, files))


@needs_hub
def test_a_model_that_does_not_open_is_refused(run, hub, tmp_path):
    push_files(hub, run, {"student.onnx": b"no model"})
    said = call("pull", REPO, tmp_path / "out")
    assert said.code == 1
    assert f"what came cannot be used: ONNX Runtime cannot open {REPO}/student.onnx" in said.err
    assert not (tmp_path / "out").exists()
    push_files(hub, run, {"student.safetensors": b"no weights"})
    said = call("pull", REPO, tmp_path / "out")
    assert f"cannot read weights from {REPO}/student.safetensors" in said.err
    other = recipe.load(run / "recipe.toml", ["train.steps=99"]).to_toml().encode()
    push_files(hub, run, {"recipe.toml": other})
    said = call("pull", REPO, tmp_path / "out")
    assert "recipe.toml is not the student's: train.steps: 99 -> 12" in said.err


@needs_hub
def test_an_exported_file_of_another_network_is_refused(run, hub, tmp_path):
    model = onnx.load(run / "student.onnx")
    card = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, card | {"facts": card["facts"].replace("255.0", "1.0")})
    push_files(hub, run, {"student.onnx": model.SerializeToString()})
    said = call("pull", REPO, tmp_path / "out")
    assert said.code == 1
    assert "student.onnx and student.safetensors are of different networks" in said.err


def test_a_student_says_its_facts_to_everybody(run):
    words = read_metadata(run / "student.safetensors")
    student, _ = load_student(run / "student.safetensors")
    assert read_card(words, "student").facts == student.facts
    assert json.loads(words["facts"])["value_range"] == 255.0


@needs_hub
def test_a_function_that_a_pulled_recipe_names_is_not_called(run, hub, tmp_path):
    """Or pulling a model would run whatever its author likes."""
    mark = tmp_path / "called"
    values = json.loads(read_metadata(run / "student.safetensors")["recipe"])
    values["student"] |= {"model": "os:mkdir", "options": {"path": str(mark)}}
    values["student"] |= {"weights": ""}
    state = read_weights(run / "student.safetensors")
    save_weights(state, run / "student.safetensors", {"recipe": json.dumps(values)})
    Path(run / "recipe.toml").write_text(recipe.from_values(values, "made").to_toml())
    push_files(hub, run, {})
    said = call("pull", REPO, tmp_path / "out")
    assert said.code == 0, said
    assert "built by the function os:mkdir" in said.text
    assert "was not called" in said.text
    assert not mark.exists()
