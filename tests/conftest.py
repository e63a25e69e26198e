"""Settings that every test shares."""

import os

# Several processes share the cores: OpenMP teams that wait for each other would spin them away.
os.environ.setdefault("OMP_NUM_THREADS", "1")
