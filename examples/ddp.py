"""Post-hoc EMA of a model that DDP trains. On a CPU:

torchrun --nproc-per-node 2 examples/ddp.py
"""

import sys

import torch
import torch.distributed as dist
from torch.nn import Linear, SiLU
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from nitrous_ema import AsyncPostHocEMA

folder = sys.argv[1] if len(sys.argv) > 1 else "ddp-checkpoints"
dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Sequential(Linear(1, 64), SiLU(), Linear(64, 1)))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

# On every rank, after init_process_group(). Each rank averages; the first one writes.
ema = AsyncPostHocEMA(model, checkpoint_folder=folder, checkpoint_every_num_steps=20)

torch.manual_seed(1 + dist.get_rank())  # other data on each rank
for _ in range(400):
    x = 2 * torch.rand(32, 1) - 1
    loss = mse_loss(model(x), torch.sin(5 * x) + torch.randn(32, 1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update()  # local: no communication, and no rank waits for another

with ema.average_parameters(0), torch.no_grad():  # works on every rank, too
    x = torch.linspace(-1, 1, 100)[:, None]
    print(f"rank {dist.get_rank()}: {mse_loss(model.module(x), torch.sin(5 * x)):.4f}")
ema.close()
dist.destroy_process_group()
