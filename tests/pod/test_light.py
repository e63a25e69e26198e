"""A pod's HTTP process stays light: what costs memory lives in the engine process."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "transformers", "safetensors", "nixl"}


@pytest.mark.parametrize("service", ["tasuki_prefill.main", "tasuki_decode.main"])
def test_the_http_process_imports_no_tensors(service: str) -> None:
    program = f"import sys, {service}; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert not HEAVY & set(output.stdout.split())
