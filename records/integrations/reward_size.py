"""How much one step's allocation moves the PSNR, against how much batches differ.

python records/integrations/reward_size.py > records/integrations/reward_size.json
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import pipeline
from fakequant import Grid, QuantConv

from sparkir import Spark
from sparkir.spark.reward import psnr_db

STEPS, LEFT_OUT = 60, 20


def main() -> None:
    """Train as `examples/plain_pytorch.py` does, with a reward of PSNR alone at every step."""
    torch.set_num_threads(1)
    spark = Spark("spark-paper", reward_every=1, beta=0.0)
    student = pipeline.student(0, conv=QuantConv, quant=Grid)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-4)
    rewards, gaps = [], []
    learn = spark.weighting.learn

    def noted(reward: torch.Tensor) -> dict[str, float]:
        rewards.append(float(reward.abs().mean()))
        return learn(reward)

    spark.weighting.learn = noted
    for lq, gt in pipeline.batches(0, STEPS):
        output, teacher = student(lq), pipeline.teacher(lq)
        gaps.append(float((psnr_db(output, gt) - psnr_db(teacher, gt)).mean()))
        kd, _ = spark.weigh(output, teacher, gt)
        optimizer.zero_grad()
        ((output - gt).abs().mean() + kd).backward()
        spark.learn(optimizer, student, lq)
        optimizer.step()
    found = {
        "steps": f"{LEFT_OUT} to {STEPS}",
        "batch_deviation_db": float(torch.tensor(gaps[LEFT_OUT:]).std()),
        "mean_absolute_reward_db": sum(rewards[LEFT_OUT:]) / (STEPS - LEFT_OUT),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
