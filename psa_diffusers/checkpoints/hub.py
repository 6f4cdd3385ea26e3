"""Files from the Hugging Face hub or from its local cache; what keeps one from being had is one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psa_diffusers.errors import InputError


def hub_file(shown: str, what: str, repository: str, file: str, absent: str, revision: str | None = None) -> Path:
    """The path of one file of a repository, which is downloaded unless it is in the cache.

    Args:
        shown: the option and its value, with which an error begins.
        what: what the repository is, such as "model".
        absent: what it means that the repository does not have the file.
        revision: the branch, if it is not main.

    Raises:
        InputError: it cannot be had.
    """
    from huggingface_hub import errors, hf_hub_download

    with _told(shown, what, file):
        try:
            return Path(hf_hub_download(repository, file, revision=revision))
        except errors.LocalEntryNotFoundError:  # a kind of the next one
            raise
        except errors.EntryNotFoundError as error:
            raise InputError(f"{shown}: {absent}") from error


def hub_files(shown: str, what: str, repository: str, ending: str) -> list[str]:
    """The files of a repository with an ending; if the hub cannot be asked, those in the cache.

    Raises:
        InputError: nothing can be had of it.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    with _told(shown, what, "its list of files"):
        if not constants.HF_HUB_OFFLINE:
            try:
                return sorted(file for file in HfApi().list_repo_files(repository) if file.endswith(ending))
            except (errors.RepositoryNotFoundError, errors.HFValidationError):
                raise
            except Exception:  # what no connection becomes depends on the client's version
                pass
        folder = Path(snapshot_download(repository, local_files_only=True))
        return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{ending}"))


@contextmanager
def _told(shown: str, what: str, file: str) -> Iterator[None]:
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            reason = f"HF_HUB_OFFLINE is set and the {what} is not in the local cache; unset it to download the {what}"
        else:
            reason = f"the hub cannot be reached and the {what} is not in the local cache"
        raise InputError(f"{shown}: {reason}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"{shown}: the hub has no such {what}, or it needs a login") from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise InputError(f"{shown}: cannot fetch {file} ({type(error).__name__})") from error
