"""What README shows runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S
)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(block, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(block)
    launcher = []
    if "torchrun" in block:
        if not ranks.available("cpu"):
            pytest.skip("torch was built without gloo")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([sys.executable, *launcher, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_there_are_blocks():
    assert len(BLOCKS) >= 5
