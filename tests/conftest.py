"""Settings that every test shares."""

import glob
import os

from hypothesis import settings

# A busy machine stops a process for longer than the 0.2 s that an example may take by default.
settings.register_profile("tasuki", deadline=None)
settings.load_profile("tasuki")

# Several processes share the cores: OpenMP teams that wait for each other would spin them away.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton 3.9 warns, and so fails tests, where nobody says whether products and sums are fused.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Without a GPU the Triton kernels are tested in Triton's interpreter, chosen when it is imported.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
