"""The one error of the index."""

from tasuki_common.errors import TasukiError


class IndexUnavailable(TasukiError):  # noqa: N818 - a state of the index, met every day
    """Redis did not answer in time, or not usefully. Go on without it and ask again later."""
