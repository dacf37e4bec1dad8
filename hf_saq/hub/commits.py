"""Push to the Hub the files that a save writes and nothing else, all in one commit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils.hub import hf_api

from ..export.layout import MODEL_FILE
from ..storage.weight_files import is_weight_file

logger = logging.getLogger(__name__)


def publish(
    directory: TemporaryDirectory,
    repo_id: str,
    commit_message: str,
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Make the files in `directory` the model at the top level of a repository, in one commit; then remove them.

    The same commit deletes weight files at the top level, and an exported graph, that are not among the new ones: a
    file that stayed would be a second model, and `from_pretrained` might prefer it. Either all of it happens or
    nothing: a push that is cut off leaves the repository as it was. `TRAINING_ARGS_NAME`, a pickle that `Trainer`
    saves, is not pushed.

    Raises:
        HfHubHTTPError: If the Hub refuses; if a right is missing, the message says what to do.
        ConnectionError: If it cannot be reached or the connection breaks.
    """
    api = hf_api()
    with directory as path, explained(f"pushing to {repo_id!r}"):
        files = {
            file.relative_to(path).as_posix(): file
            for file in sorted(Path(path).rglob("*"))
            if file.is_file() and file.name != TRAINING_ARGS_NAME
        }
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        return api.create_commit(
            repo_id,
            operations=[
                *(CommitOperationAdd(name, file) for name, file in files.items()),
                *(CommitOperationDelete(name) for name in _models_in(api, repo_id, token, revision) - set(files)),
            ],
            commit_message=commit_message,
            token=token,
            revision=revision,
        )


def publish_in_background(directory: TemporaryDirectory, repo_id: str, commit_message: str, **kwargs) -> Future:
    """Run [`publish`] in the thread of `huggingface_hub` that makes one push after the other. Log a failure."""
    future = hf_api().run_as_future(publish, directory, repo_id, commit_message, **kwargs)
    return log_failure(future, repo_id, commit_message)


def log_failure(push: Future, repo_id: str, commit_message: str) -> Future:
    """Log it if a push in the background fails: perhaps nobody ever asks for its result."""

    def done(push: Future) -> None:
        if not push.cancelled() and push.exception() is not None:
            logger.warning(
                "The push %r to %s failed and training goes on: %s", commit_message, repo_id, push.exception()
            )

    push.add_done_callback(done)
    return push


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Add to an error of the Hub inside the block what was being done and how to solve it."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            error.append_to_message(
                f"\nThe Hub refused {what}. It needs a token with write permission: run `hf auth login`, set "
                "HF_TOKEN, or pass one (`hub_token` in TrainingArguments, `token` to push_to_hub)."
            )
        raise
    except HTTPError as error:  # there was no answer at all
        raise ConnectionError(
            f"The connection broke while {what} ({type(error).__name__}: {error}). A push is one commit, made as a "
            "whole or not at all, and the saved model is still in the output directory: call `push_to_hub` again."
        ) from error


def _models_in(api: HfApi, repo_id: str, token: str | None, revision: str | None) -> set[str]:
    names = api.list_repo_files(repo_id, revision=revision, token=token)
    return {name for name in names if is_weight_file(name) or name == MODEL_FILE}
