"""One of two processes that train together: python two_ranks.py FOLDER PRESET RANK."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

from sparkir import Spark

folder, preset, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(rank)
student = DistributedDataParallel(nn.Conv2d(3, 3, 3, padding=1))
optimizer = optim.Adam(student.parameters(), lr=0.01)
spark = Spark(preset, reward_every=2, strength=20.0, seed=rank)
start = torch.cat([p.detach().flatten().clone() for p in spark.parameters()])
if rank == 0:
    with torch.no_grad():  # a look before training, which the others do not take
        spark.weigh(*(torch.rand(1, 3, 16, 16) for _ in range(3)))
rewards, overflowed = [], []
for step in range(6):
    gt = torch.rand(4, 3, 16, 16)
    lq, teacher = gt + 0.1 * torch.randn_like(gt), gt + 0.05 * torch.randn_like(gt)
    output = student(lq)
    if step == 2 and rank == 0:  # half precision's overflow, in one process alone
        spark.weigh(output * torch.inf, teacher, gt)
        kd = 0 * output.sum()
    else:
        kd, weights = spark.weigh(output, teacher, gt)
    optimizer.zero_grad()
    ((output - gt).abs().mean() + kd).backward()
    told = spark.learn(optimizer, student, lq)
    rewards += [] if told is None else [told["policy_loss"]]
    overflowed += [step] if told is None else []
    optimizer.step()
end = torch.cat([p.detach().flatten() for p in spark.parameters()])
state = {f"student.{name}": value for name, value in student.state_dict().items()}
state |= {f"spark.{name}": p.detach() for name, p in spark.named_parameters()}
state |= {"moved.policy": (end - end.mean()).abs().max(), "own.rewards": torch.tensor(rewards)}
state |= {"steps.without": torch.tensor(overflowed), "own.weights": weights, "own.start": start}
torch.save(state, folder / f"{rank}.pt")
dist.destroy_process_group()
