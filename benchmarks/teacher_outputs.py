"""How far a teacher's stored outputs are from the teacher run on each crop.

    python benchmarks/teacher_outputs.py                  # the demo's teacher and photographs
    python benchmarks/teacher_outputs.py RECIPE [KEY=VALUE ...]    # any recipe with a teacher

Stored outputs are cut from whole images and flipped afterwards; run on a crop, the teacher sees
padding beyond its border, and run on a flipped crop, it sees it flipped. Printed are PSNR on RGB in
dB between the outputs, and of each to the ground truth, over the whole crop and over its inner
part, which leaves a quarter of the side out all round.
"""

import sys

import numpy as np
import torch
from torch import Tensor

from sparkir.assemble import gather
from sparkir.data.pairs import PatchSampler
from sparkir.models.facts import restore
from sparkir.recipe import load
from sparkir.teacher import teacher_outputs

BATCHES = 16


def psnr_db(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


def inner(x: Tensor) -> Tensor:
    margin = x.shape[-1] // 4
    return x[..., margin:-margin, margin:-margin]


def main() -> None:
    torch.set_num_threads(1)
    changes = ["train.teacher_cache=true", *sys.argv[2:]]
    recipe = load(sys.argv[1] if len(sys.argv) > 1 else "demo", changes)
    materials = gather(recipe)
    teacher = materials.teacher
    assert teacher is not None
    store = teacher_outputs(recipe, materials, lambda event: print(event, file=sys.stderr))
    options = {"patch_px": recipe.data.patch_px, "batch": recipe.data.batch, "seed": 0}
    sampler = PatchSampler(materials.train, outputs=store, **options)
    plain = PatchSampler(materials.train, augment=False, outputs=store, **options)
    rows: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, a: Tensor, b: Tensor) -> None:
        rows.setdefault(name, []).append((psnr_db(a, b), psnr_db(inner(a), inner(b))))

    for _ in range(BATCHES):
        for name, source in (("upright", plain), ("flipped and turned", sampler)):
            lq, gt, stored = source.next()
            with torch.no_grad():
                ran = restore(teacher, lq.float() / 255)
                turned = restore(teacher, lq.float().flip(-1) / 255).flip(-1)
            truth = gt.float() / 255
            note(f"stored and run, {name}", stored, ran)
            note(f"run flipped and flipped back, and run, {name}", turned, ran)
            note(f"stored and truth, {name}", stored, truth)
            note(f"run and truth, {name}", ran, truth)
    print(f"{recipe.name}: {teacher.facts.name}, crops of {recipe.data.patch_px} px, dB RGB;")
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread\n")
    print("| between | whole crop | inner part |\n|---|---:|---:|")
    for name, found in rows.items():
        whole, middle = np.mean(found, axis=0)
        print(f"| {name} | {whole:.2f} | {middle:.2f} |")


if __name__ == "__main__":
    main()
