"""Tables of providers x problems: see run.py."""

import os

# Read when torch loads. Its profiler, which weighs passes on the CPU, is chatty otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
