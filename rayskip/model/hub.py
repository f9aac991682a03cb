"""Models from the Hugging Face hub, into the hub's own cache.

A model that is refused costs no download of its weights: its json files come first, then the headers of its
safetensors, and its weights when both are good.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rayskip.errors import ModelError
from rayskip.model.files import SMALL_FILES, Header, weight_names
from rayskip.model.quantised import dequantised_headers
from rayskip.model.refusals import check_configs, check_tensors

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""owner/name."""

HEADERS_AT_ONCE = 8


def download(name: str, revision: str | None, missing: str) -> Path:
    """The local folder of a hub id's safetensors, config and tokenizer.

    missing: what to say first when there is no such model. Raises ModelError.
    """
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its own name for its HTTP library

    try:
        folder = _snapshot(name, revision, SMALL_FILES)
        check_configs(folder)
        weights = weight_names(folder)
        if all((folder / file).is_file() for file in weights):
            return folder
        commit = folder.name
        check_tensors(dequantised_headers(folder, _headers(name, commit, weights)))
        return _snapshot(name, commit, (*SMALL_FILES, *weights))
    except RevisionNotFoundError as error:
        raise ModelError(f"model.revision: hub model {name} has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{missing}, and no hub model of that name that you may read (HF_TOKEN)") from error
    except RemoteEntryNotFoundError as error:
        raise ModelError(
            f"model.path: hub model {name} lacks some of {', '.join(weights)}, and nothing else is read"
        ) from error
    except SafetensorsParsingError as error:
        raise ModelError(f"model.path: hub model {name} has damaged safetensors ({error})") from error
    except (LocalEntryNotFoundError, httpx.HTTPError, ConnectionError) as error:
        raise ModelError(f"{missing}, and the hub cannot be reached") from error
    except OSError as error:
        raise ModelError(f"model.path: hub model {name} cannot be stored ({error})") from error


def _snapshot(name: str, revision: str | None, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"])
    )


def _headers(name: str, commit: str, files: Sequence[str]) -> dict[str, Header]:
    """Of the safetensors `files`, by requests for the first bytes of each."""
    from huggingface_hub import HfApi

    def read(file: str) -> dict[str, Header]:
        tensors = HfApi().parse_safetensors_file_metadata(name, file, revision=commit).tensors
        return {
            tensor: Header(Path(name) / file, str(info.dtype), tuple(info.shape))
            for tensor, info in tensors.items()
        }

    with ThreadPoolExecutor(HEADERS_AT_ONCE) as threads:
        return {tensor: header for part in threads.map(read, files) for tensor, header in part.items()}
