"""A `Trainer` that publishes what is to be used: the packed model and a card of what the run measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from ..config import SAQConfig, SAQQuantizationConfig
from ..conversion.report import ConversionReport
from ..layers import QuantizedLayer
from .card import PICTURE, CardFacts, ResultRow, has_processor, measured, model_card, weight_file_bytes
from .commits import copy_files, explained, log_failure, publish, publish_in_background
from .training_picture import draw_training_curve

CARD = "README.md"
DATASET_LOADERS = {"imagefolder", "webdataset", "generator", "arrow", "csv", "json", "pandas", "parquet", "text"}
"""Builders of `datasets` that read files of the user: their names are not those of datasets on the Hub."""


class PublishingTrainer(Trainer):
    """What [`SAQTrainer`] does with the Hub. A model without quantized layers is published as `Trainer` does it.

    Attributes:
        card_arguments (`dict`): Arguments of `create_model_card` for all cards of this trainer, also of those that
            are written by `save_model` and while training goes on. What is passed to a call wins.
    """

    saq_config: SAQConfig
    model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any):
        self._measured: dict[str, float] = {}  # by `evaluate`, on the weights as they are now
        self.card_arguments: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    # What was measured -----------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`. What is measured under the prefix `eval` goes into the model card."""
        metrics = super().evaluate(*args, **kwargs)
        self._measured = {**self._measured, **_of_evaluation(metrics)}
        return metrics

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As in `Trainer`. An optimizer step follows, after which nothing is known of the weights."""
        self._measured = {}
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def train(self, *args: Any, **kwargs: Any):
        """As in `Trainer`."""
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            logs = [entry for entry in self.state.log_history if entry.get("step") == self.state.best_global_step]
            self._measured = {name: value for entry in logs for name, value in _of_evaluation(entry).items()}
        return output

    # The card --------------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        comparison: Sequence[ResultRow] | None = None,
    ) -> None:
        """Write `README.md`, and a picture of the training if matplotlib is installed, into `output_dir`.

        Metrics are those of the last `evaluate` if the weights did not change since; sizes are those of the files in
        `output_dir`. What was not measured is left out.

        Args:
            comparison: Results of other models that this run measured, for the table of results.
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args: As in
                [`transformers.Trainer.create_model_card`].
        """
        given: dict[str, Any] = dict(
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
            comparison=comparison,
        )
        given = {**self.card_arguments, **{name: value for name, value in given.items() if value is not None}}
        if not self._is_quantized():
            given.pop("comparison", None)
            super().create_model_card(**given)
        elif self.is_world_process_zero():
            directory = Path(str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            has_picture = draw_training_curve(self.state.log_history, directory / PICTURE)
            model_card(self._card_facts(directory, has_picture, **given)).save(directory / CARD)

    def _card_facts(
        self, directory: Path, has_picture: bool, comparison: Sequence[ResultRow] = (), **given: Any
    ) -> CardFacts:
        model = self.accelerator.unwrap_model(self.model)
        repository = self.hub_model_id or self.args.hub_model_id
        own_name = directory.absolute().name
        about: dict[str, Any] = {"hyperparameters": self._hyperparameters()}
        if isinstance(model, PreTrainedModel):
            # An empty name keeps the summary from taking a directory for a model on the Hub.
            given["finetuned_from"] = on_the_hub(given.get("finetuned_from") or model.config._name_or_path) or ""
            summary = TrainingSummary.from_trainer(self, **given)
            datasets = [tag for tag in _listed(summary.dataset_tags) if tag not in DATASET_LOADERS and on_the_hub(tag)]
            config = getattr(model.config, "quantization_config", None)
            if isinstance(config, SAQQuantizationConfig):
                packed = any(isinstance(m, QuantizedLayer) and m.weight_quantizer for m in model.modules())
                about["config"] = config.replace(storage="packed" if packed else "float")
            about |= {
                "load_from": repository or own_name,
                "base_model": summary.finetuned_from or None,
                "datasets": datasets,
                "dataset_name": ", ".join(_listed(given.get("dataset"))) or None,
                "license": summary.license,
                "language": summary.language,
                "tags": [*_listed(summary.tags), *(model.model_tags or [])],
                "hyperparameters": {**(summary.hyperparameters or {}), **about["hyperparameters"]},
            }
        report = getattr(model, "quantization_report", None)
        logs = self.state.log_history
        return CardFacts(
            **{"config": None, **about},
            name=given.get("model_name") or (repository or own_name).split("/")[-1],
            revision=self.args.hub_revision,
            architecture=type(model).__name__,
            layers=report.layers if isinstance(report, ConversionReport) else (),
            has_processor=has_processor(directory),
            weight_bytes=weight_file_bytes(directory),
            metrics=self._measured,
            comparison=comparison,
            method=self._method(),
            bit_operations=next((int(entry["bit_operations"]) for entry in logs if "bit_operations" in entry), None),
            sharpness=[(int(entry["step"]), entry["sharpness"]) for entry in logs if "sharpness" in entry],
            has_picture=has_picture,
        )

    def _method(self) -> str:
        case = self.saq_config.case
        if case is None:
            return "QAT (plain quantization-aware training)"
        name = "SAQ" if case == 3 else f"SAQ case {case}"
        return f"{name} ([Sharpness-Aware Quantization](https://arxiv.org/abs/2111.12273), case {case})"

    def _hyperparameters(self) -> dict[str, Any]:
        return {} if self.saq_config.case is None else self.saq_config.to_dict()

    # Pushing ---------------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
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

        All of it is one commit. Weight files that the repository has at its top level from before are replaced.

        Args:
            commit_message: Message of the commit.
            blocking: Whether to wait for the end of the upload.
            token: With write permission. Default: `hub_token` of the training arguments, then the one logged in with.
            revision: Branch to commit to; made if it is not there. Default: `hub_revision`.
            private: Whether the repository is private, should it have to be made. Default: `hub_private_repo`.
            **kwargs: Those of `create_model_card`.

        Returns:
            The commit, or its `Future` if not `blocking`; `None` on all processes but the first.

        Raises:
            HfHubHTTPError: If the Hub refuses; where it is about rights, the message says what to do.
            ConnectionError: If the connection breaks. Nothing is then half published.
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
        copy_files([CARD, PICTURE], Path(str(self.args.output_dir)), Path(staged.name))
        self._finish_current_push()
        push = publish if blocking else publish_in_background
        return push(staged, str(self.hub_model_id), commit_message or "Upload model", token=token, revision=revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """While training goes on, publish the packed model of now; and with a `hub_strategy` that says so, the
        checkpoint in a folder of its own. `Trainer` would put the checkpoint's float weights at the top level."""
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
        staged = self._stage()  # under FSDP every process has a share in it
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
                ignore_patterns=[TRAINING_ARGS_NAME],  # a pickle that holds the token; nothing needs it to resume
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
        """Save the model as `save_model` does, but where nothing else is: what is there then is what gets published,
        and later saves do not change it while it is on its way."""
        staged = TemporaryDirectory(prefix="hf_saq-")
        with self._arguments(output_dir=staged.name):
            self.save_model(_internal_call=True)
        return staged

    @contextmanager
    def _arguments(self, **changes: Any) -> Iterator[None]:
        """Train with other arguments for a moment."""
        before = {name: getattr(self.args, name) for name in changes}
        vars(self.args).update(changes)
        try:
            yield
        finally:
            vars(self.args).update(before)

    def _is_quantized(self) -> bool:
        return any(isinstance(module, QuantizedLayer) for module in self.model.modules())


def on_the_hub(name: str | None) -> str | None:
    """`name` if it can be that of a repository: not empty, not a path that exists here, and well-formed."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _of_evaluation(metrics: dict[str, Any]) -> dict[str, float]:
    return measured({name: value for name, value in metrics.items() if name.startswith("eval_")})


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
