"""Two processes of two threads train a model with a tied embedding to the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RUN = """
import hashlib
import torch
import torch.nn.functional as F
from torch import nn
import fusion_compile as fc

torch.set_num_threads(2)
torch.manual_seed(0)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(64, 128), nn.Parameter(torch.randn(63, 63, 128) * 0.02)
        self.body, self.drop = nn.Linear(128, 128), nn.Dropout(0.1)

    def forward(self, x):
        at = torch.arange(x.shape[1]) % 17
        hidden = self.tokens(x) + self.places[at, at]  # the gradients of both are sums over repeated indices
        return self.drop(self.body(hidden)) @ self.tokens.weight.T


model = Tied()
step = fc.compile_training_step(
    model, lambda m, x: F.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()), optimizer="adamw",
    mode="default",
)
for _ in range(4):
    step(torch.randint(64, (32, 64)))
print(hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest())
"""


@pytest.mark.exhaustive
def test_runs_of_two_threads_end_with_the_same_bits() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    ends = set()
    for _ in range(3):
        ran = subprocess.run([sys.executable, "-c", RUN], env=env, capture_output=True, text=True, check=True)
        ends.add(ran.stdout.split()[-1])
    assert len(ends) == 1
