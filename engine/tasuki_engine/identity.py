"""What two engines must have alike before one may use what the other computed."""

import hashlib

from tasuki_engine.models import Model
from tasuki_engine.storage import LAYOUT_VERSION


def hash_revision(model: Model) -> str:
    """What makes the numbers in a block, beside its tokens: weights and dtypes."""
    spec = model.cache_spec
    dtypes = [model.dtype, spec.kv_dtype]
    if spec.state is not None:
        dtypes += [spec.state.conv_dtype, spec.state.ssm_dtype]
    return "-".join([model.revision, *(str(dtype).removeprefix("torch.") for dtype in dtypes)])


def fingerprint(model: Model, block_size: int) -> str:
    """Equal for two engines whose spans have the same layout and mean the same."""
    parts = (hash_revision(model), block_size, model.cache_spec, LAYOUT_VERSION)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
