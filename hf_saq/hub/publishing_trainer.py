"""Publish the model of a `Trainer` in the form for use: packed, with a card of what the run measured."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from ..storage.saved_directory import copy_files
from .card import CARD, PICTURE
from .card_facts import LANDSCAPE
from .card_trainer import CardTrainer
from .commits import explained, log_failure, publish, publish_in_background


class PublishingTrainer(CardTrainer):
    """Publishes models for [`SAQTrainer`]. Models without quantized layers are published as `Trainer` does."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository as `Trainer` does; an error says what to do."""
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        with explained(f"creating the repository {name!r}"):
            super().init_hf_repo(token, private)

    def push_to_hub(  # type: ignore[override]  # `Trainer` returns the same three and declares one
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Publish the packed model, the image processor and a model card; nothing else that is in `output_dir`.

        All of it is one commit. It replaces weight files that the repository already has at its top level.

        Args:
            commit_message: Message of the commit.
            blocking: Whether to wait for the end of the upload.
            token: Token with write permission. Default: `hub_token` of the training arguments, then that of the login.
            revision: Branch to commit to; it is made if it does not exist. Default: `hub_revision`.
            private: Whether a repository that must be made is private. Default: `hub_private_repo`.
            **kwargs: Arguments of `create_model_card`.

        Returns:
            The commit, or its `Future` if not `blocking`; `None` on all processes but the first.

        Raises:
            HfHubHTTPError: If the Hub refuses; if a right is missing, the message says what to do.
            ConnectionError: If the connection breaks. Then nothing is published.
        """
        if not self._is_quantized():
            return super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        revision = revision if revision is not None else self.args.hub_revision
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        staged = self._stage()
        if not self.is_world_process_zero():
            staged.cleanup()
            return None
        with self._arguments(hub_revision=revision):
            self.create_model_card(**kwargs)
        copy_files([CARD, PICTURE, LANDSCAPE], Path(str(self.args.output_dir)), Path(staged.name))
        self._finish_current_push()
        push = publish if blocking else publish_in_background
        return push(staged, str(self.hub_model_id), commit_message or "Upload model", token=token, revision=revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish the present packed model while training goes on; with such a `hub_strategy` also the checkpoint.

        The checkpoint goes into a folder of its own. `Trainer` would put its float weights at the top level.
        """
        if not self._is_quantized():
            super()._push_from_checkpoint(checkpoint_folder)
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        first = self.is_world_process_zero()
        running: PushInProgress | None = self.push_in_progress if first else None
        is_busy = running is not None and not running.is_done() and not self.args.hub_always_push
        if (is_busy or not first) and not self.is_fsdp_enabled:
            return
        staged = self._stage()  # under FSDP every process takes part in it
        if is_busy or not first:
            staged.cleanup()
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with self._arguments(output_dir=staged.name):
            self.create_model_card()
        when = f"step {self.state.global_step}"
        if self.args.save_strategy != SaveStrategy.STEPS:
            when = f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {when}"
        token, revision, repository = self.args.hub_token, self.args.hub_revision, str(self.hub_model_id)
        jobs = [publish_in_background(staged, repository, message, token=token, revision=revision)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            message += ", checkpoint"
            upload = hf_api().upload_folder(
                repo_id=repository,
                folder_path=checkpoint_folder,
                ignore_patterns=[TRAINING_ARGS_NAME],  # leave out a pickle that holds the token; no resume needs it
                path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                commit_message=message,
                run_as_future=True,
                token=token,
                revision=revision,
            )
            jobs.append(log_failure(upload, repository, message))
        if running is None or running.is_done():
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment, arg-type]
        else:
            running.jobs.extend(jobs)  # type: ignore[union-attr]

    def _stage(self) -> TemporaryDirectory:
        """Save the model as `save_model` does, but into a new temporary directory.

        All that is in this directory gets published, and later saves do not change it during the upload.
        """
        staged = TemporaryDirectory(prefix="hf_saq-")
        with self._arguments(output_dir=staged.name):
            self.save_model(_internal_call=True)
        return staged

    @contextmanager
    def _arguments(self, **changes: Any) -> Iterator[None]:
        """Change some training arguments inside the block."""
        before = {name: getattr(self.args, name) for name in changes}
        vars(self.args).update(changes)
        try:
            yield
        finally:
            vars(self.args).update(before)
