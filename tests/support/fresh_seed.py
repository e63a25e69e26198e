"""A new random seed for each run of a test, printed so that a failure can be repeated."""

import os
import secrets


def fresh_seed() -> int:
    """A seed from the system, or TASUKI_TEST_SEED where it is set; printed either way."""
    seed = int(os.environ.get("TASUKI_TEST_SEED") or secrets.randbits(31))
    print(f"TASUKI_TEST_SEED={seed}")
    return seed
