"""Where a model's files are: a local folder, or one fetched from the Hugging Face Hub."""

from pathlib import Path

from tasuki_common.errors import ConfigError

_FILES = ["*.json", "*.safetensors", "*.jinja"]
_COPIES = ["*/*", "consolidated*"]  # the same weights in other formats


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of `model`: a path, `file:///folder`, `org/name` or `hf://org/name`.

    Hub models are downloaded once into Hugging Face's cache.

    Raises:
        ConfigError: when there is no such folder, or the Hub does not give it.
    """
    explicit = model.startswith("hf://")
    name = model.removeprefix("hf://").removeprefix("file://")
    folder = Path(name).expanduser()
    if not explicit and folder.is_dir():
        return folder.resolve()
    if not explicit and (model.startswith(("file://", "/", ".", "~")) or name.count("/") != 1):
        raise ConfigError(f"model is {model!r}, but there is no folder {folder}.")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_FILES, ignore_patterns=_COPIES
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model is {name!r}, which is no local folder and which the Hub did not give: {reason}"
        ) from error
