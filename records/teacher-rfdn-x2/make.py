"""Makes the packaged teacher again, and measures it.

    python records/teacher-rfdn-x2/make.py CID22 [SET ...]

CID22 is the folder of the 512 x 512 training photographs of the CID22 set (Cloudinary, CC BY-SA
4.0); SET are folders of clean benchmark images. Takes an hour or more on two cores, and goes on
where it was stopped. The training images are not part of this repository.
"""

import json
import shutil
import sys
from pathlib import Path

from sparkir.assemble import build_network, convention_of, gather, open_pairs
from sparkir.data.degrade import bicubic_resize
from sparkir.evaluate.benchmark import evaluate, mean
from sparkir.models.checkpoint import save_weights
from sparkir.recipe import Network, load
from sparkir.report.events import EventLog
from sparkir.run import train_student, versions

HERE = Path(__file__).parent
NAME = "teacher-rfdn-x2"
WEIGHTS = HERE.parents[1] / "src" / "sparkir" / "models" / "weights" / "rfdn-x2-small.safetensors"
CREDIT = {
    "licence": "weights trained on CID22 photographs (CC BY-SA 4.0, Cloudinary)",
    "record": f"records/{NAME}",
}


def main(photographs: str, *sets: str) -> None:
    """Train, copy the log, save the weights, measure."""
    recipe = load(NAME, [f"data.train={photographs!r}"])
    folder = Path("runs") / NAME
    folder.mkdir(parents=True, exist_ok=True)
    with EventLog(folder / "events.jsonl") as log:
        trained = train_student(recipe, gather(recipe), folder, report=log)
    shutil.copy(folder / "events.jsonl", HERE / "events.jsonl")
    save_weights(trained.student, WEIGHTS, CREDIT)
    (HERE / "recipe.toml").write_text(load(NAME).to_toml())
    measure(WEIGHTS, ["photographs:test", *sets])


def measure(weights: Path, sets: list[str]) -> None:
    """Teacher and bicubic on every set."""
    recipe = load(NAME)
    network = build_network(
        Network(model="rfdn", options=recipe.student.options, weights=str(weights))
    ).eval()
    convention = convention_of(recipe)
    rows = {}
    for where in sets:
        data = recipe.data.model_copy(update={"border": "symmetric"})
        pairs = open_pairs(data, where)
        found = mean(evaluate(network, pairs, convention))
        plain = mean(evaluate(lambda lq: bicubic_resize(lq, scale=2), pairs, convention))
        name = where if ":" in where else Path(where.removesuffix("/HR")).name
        rows[name] = {
            "images": len(pairs),
            "bicubic": {"psnr_db": plain.psnr_db, "ssim": plain.ssim},
            "teacher": {"psnr_db": found.psnr_db, "ssim": found.ssim},
        }
    values = {"versions": versions(), "convention": convention.label, "sets": rows}
    (HERE / "result.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
