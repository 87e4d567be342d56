import torch
from torch.nn import Linear, SiLU
from torch.nn.functional import mse_loss

torch.manual_seed(0)
model = torch.nn.Sequential(Linear(1, 64), SiLU(), Linear(64, 64), SiLU(), Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)


def make_batch(size, noise):
    x = 2 * torch.rand(size, 1) - 1
    return x, torch.sin(5 * x) + noise * torch.randn(size, 1)


held_out_x, held_out_y = make_batch(2000, noise=0)


@torch.no_grad()
def evaluate(model):
    return mse_loss(model(held_out_x), held_out_y).item()


for _ in range(2000):
    x, y = make_batch(32, noise=1)
    loss = mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print(f"raw weights: {evaluate(model):.4f}")
