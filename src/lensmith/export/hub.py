"""To the Hugging Face Hub, only when asked to and only with a token."""

from __future__ import annotations

from pathlib import Path

from lensmith.errors import RunError


def check_token(name: str) -> None:
    """Before anything is written. Raises RunError for no token, or a name that is none."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as cause:
        raise RunError(f"--push {name}: not a name of the Hub, which are like owner/model. Give one.") from cause
    if get_token() is None:
        raise RunError(
            f"--push {name}: there is no token of the Hub here, so nothing was exported or pushed. "
            "Run `hf auth login`, or set HF_TOKEN; or leave --push out."
        )


def push_folder(folder: Path, name: str) -> str:
    """Uploads a whole export to the private repository `name`, made if it is not there; returns its address.

    Raises RunError with what the Hub said; the export stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by Lensmith")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as cause:
        said = str(cause).strip().partition("\n")[0]
        raise RunError(
            f"--push {name}: the Hub did not take it: {said} The export is whole in {folder}; "
            f"try again with `hf upload {name} {folder}`."
        ) from cause
    return str(address)
