"""Export directories to a repository of the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from dspark_jax.config import InputError
from dspark_jax.convert.output import EXPORT_FILES


def push(directory: Path, repository: str, *, private: bool = False, api: Any = None) -> str:
    """Uploads a directory in one commit; the repository is created if need be.

    What an export there had that this one does not have goes with the same commit; other files stay.

    Args:
      directory: an export.
      repository: NAME or OWNER/NAME.
      private: of a repository that is created.
      api: a `huggingface_hub.HfApi`, or None for one with the user's own login.

    Returns:
      The repository's address.

    Raises:
      InputError: no connection, no login, or no right to write there. The directory stays as it is.
    """
    api = huggingface_hub.HfApi() if api is None else api
    remedy = f"the export is complete: hf upload {repository} {directory} pushes it later"
    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=directory,
            commit_message=f"Add {directory.name}",
            delete_patterns=list(EXPORT_FILES),
        )
    except errors.OfflineModeIsEnabled:
        raise InputError(f"--push {repository}: offline mode is on (HF_HUB_OFFLINE); unset it; {remedy}") from None
    except errors.HFValidationError as error:
        raise InputError(f"--push {repository}: no name of a repository ({error}); use OWNER/NAME; {remedy}") from None
    except errors.LocalTokenNotFoundError:
        raise InputError(f"--push {repository}: not logged in; run hf auth login, or set HF_TOKEN; {remedy}") from None
    except errors.HfHubHTTPError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"--push {repository}: the hub refused ({reason}); check login and name; {remedy}") from None
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]  (of its HTTP library)
        raise InputError(f"--push {repository}: no connection to the hub ({error}); {remedy}") from None
    return str(created)
