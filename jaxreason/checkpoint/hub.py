"""hf://org/name[@revision]: a repository of a Hugging Face hub as a local directory.

huggingface_hub does the work, so its cache (HF_HOME), HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean
what they mean everywhere.
"""

import functools
import pathlib

_SCHEME = "hf://"
_WEIGHTS = "*.safetensors"  # never .bin, .pt or .pth: those are pickles
_SMALL = ("*.json", "*.jinja", "tokenizer.model")


def is_address(text: str) -> bool:
    return text.startswith(_SCHEME)


@functools.cache  # one look at the hub a process
def resolve(address: str, *, weights: bool = True) -> pathlib.Path:
    """The directory of the address in the local cache, downloaded where it is not there yet.

    Args:
      weights: False fetches the configuration and the tokenizer alone.

    Offline, or with the hub out of reach, what the cache holds whole is taken. Raises ValueError,
    one line, when there is no such repository or revision, it is gated, or it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = address.removeprefix(_SCHEME).partition("@")
    if name.count("/") != 1 or not all(name.split("/")) or address.endswith("@"):
        raise ValueError(f"{address!r} is no repository; write hf://ORG/NAME or hf://ORG/NAME@REV")
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*_SMALL, *([_WEIGHTS] if weights else [])],
            ignore_patterns=["*/*.safetensors", "*/*.json"],  # copies in other formats
        )
    except errors.GatedRepoError:
        raise ValueError(
            f"{address} is gated: accept its terms on the hub, then set HF_TOKEN or run "
            "`hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{address}: the repository has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{address}: no such repository at {_endpoint()}, or a private one (set HF_TOKEN)"
        ) from None
    except errors.HFValidationError as error:
        raise ValueError(f"{address!r} is no repository: {error}") from None
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(_why_absent(address, error)) from None
    except (errors.HfHubHTTPError, ConnectionError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{address}: {_endpoint()} answered: {first}") from None
    return pathlib.Path(folder)


def _why_absent(address: str, error: Exception) -> str:
    from huggingface_hub.errors import IncompleteSnapshotError

    held = "only in part" if isinstance(error, IncompleteSnapshotError) else "not"
    if _offline():
        return f"{address} is {held} in the local cache, and HF_HUB_OFFLINE forbids fetching it"
    reason = type(error.__cause__).__name__ if error.__cause__ else "no answer"
    return f"{address} is {held} in the local cache, and {_endpoint()} is out of reach ({reason})"


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
