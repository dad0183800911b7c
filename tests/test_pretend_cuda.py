"""What pretend_cuda.py pretends: a device apart, which refuses what a GPU refuses."""

import os
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(
        torch.version.cuda is not None or Path("/dev/nvidiactl").exists(),
        reason="there is a device that is not pretended",
    ),
]

PROGRAM = """
import pretend_cuda
import pytest
import torch
from sparse_ce import fused_sparse_ce

torch.manual_seed(0)
there, here = torch.randn(3, 5, device="cuda"), torch.randn(3, 5)

def refused(what, function, *arguments, error=RuntimeError):
    with pytest.raises(error, match=what):
        function(*arguments)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRITON_INTERPRET", "SPARSE_CE_EMULATE")
    } | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, text=True, capture_output=True
    )


def passes(program: str) -> None:
    done = run(PROGRAM + program)
    assert done.returncode == 0, done.stderr


def test_a_tensor_is_of_the_device():
    passes("""
assert str(there.device) == "cuda:0" and there.is_cuda
assert str((there * 2).device) == str(there[1:, 2].device) == "cuda:0"
assert here.device.type == there.cpu().device.type == "cpu"
assert torch.equal(here.cuda().cpu(), here)
""")


def test_another_device_is_refused():
    passes("""
for mixed in (lambda: there + here, lambda: there.gather(1, here.long()), lambda: there @ here.T):
    refused("same device", mixed)
refused("generator", lambda: torch.rand(3, device="cuda", generator=torch.Generator()))
refused("numpy", there.numpy, error=TypeError)
# a number is none of another device, but a tensor of one number is
assert torch.equal((there * torch.tensor(2.0)).cpu(), there.cpu() * 2)
refused("same device", lambda: there * torch.tensor([2.0]))
""")


@pytest.mark.parametrize(
    "wait",
    ["there.sum().item()", "there.cpu()", "here.cuda()", "there.nonzero()", "there[there > 0]"],
)
def test_a_wait_is_refused(wait):
    passes(f"""
{wait}
torch.cuda.set_sync_debug_mode("error")
there * 2
refused("synchronizing", lambda: {wait})
torch.cuda.set_sync_debug_mode("default")
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    there * 2
    refused("capturing", lambda: {wait})
{wait}
""")


def test_the_kernels_of_cuda_run():
    passes("""
target = torch.randint(5, (3,))
inputs = [here.clone().requires_grad_(), here.cuda().requires_grad_()]
losses = []
for logits, backend in zip(inputs, ("cpu", "cuda")):
    losses.append(fused_sparse_ce(logits, target.to(logits.device), k=3, backend=backend))
    losses[-1].backward()
assert losses[1].is_cuda and inputs[1].grad.is_cuda and inputs[0].grad.abs().sum() > 0
torch.testing.assert_close(losses[1].cpu(), losses[0])
torch.testing.assert_close(inputs[1].grad.cpu(), inputs[0].grad)
refused("cuda tensors", lambda: fused_sparse_ce(here, target, k=3, backend="cuda"))
""")


def test_memory_of_nobody_is_nan_and_is_counted():
    passes("""
before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
memory = torch.empty(1000, device="cuda")
assert memory.isnan().all() and torch.cuda.memory_allocated() - before == 4096
del memory
assert torch.cuda.memory_allocated() == before
assert torch.cuda.max_memory_allocated() - before >= 4096
""")


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("import torch", "torch, which looks for devices when it is imported"),
        ("import pathlib; pathlib.Path.exists = lambda path: True", "this machine has a GPU"),
    ],
)
def test_not_everywhere(before, reason):
    done = run(f"{before}\nimport pretend_cuda")
    assert f"pretend_cuda: a GPU is not pretended: {reason}" in done.stderr
