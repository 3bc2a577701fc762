"""Pushing a run to the Hub: transformers' methods for it, so that a failure costs neither the run nor weights."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from transformers import Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..export.push import PushError, complete_card, explained, first_line, make_repository, upload
from .checkpoint import Checkpointer
from .config import DiffusionPreferenceConfig
from .pipelines import short_name


logger = logging.getLogger(__name__)

# What the Hub answers to a wrong token, a token that may not write, and a name that cannot be.
_REFUSALS = (400, 401, 403, 404)


def check_token(args: DiffusionPreferenceConfig) -> None:
    """Raises where a run is to be pushed and there is no token to do it with; asks nobody.

    Raises:
        ValueError: `push_to_hub` without `hub_token` and without a stored token.
    """
    if args.push_to_hub and not args.hub_token and get_token() is None:
        raise ValueError(
            "push_to_hub=True needs a token of the Hub, and none is stored on this machine. Run `hf auth login`, set "
            "HF_TOKEN or hub_token, or leave push_to_hub out and push the folder later with `trl-diffusion-pref push`."
        )


class PushingTrainer(Trainer):
    """transformers' trainer with its part about the Hub replaced; each method says what the inherited one does."""

    args: DiffusionPreferenceConfig
    checkpointer: Checkpointer
    hub_model_id: str | None  # type: ignore[assignment]  # transformers' annotations know None alone
    push_in_progress: PushInProgress | None = None  # type: ignore[assignment]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The inherited method ends the run where there is no network, after everything was encoded.

        Raises:
            ValueError: The Hub does not accept the token or the name, which no later attempt would change.
        """
        if not self.is_world_process_zero():
            return
        try:
            self._repository(token, private)
        except ValueError:
            raise  # the name
        except Exception as error:
            answer = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if answer in _REFUSALS:
                reason = " ".join(str(error).split())
                raise ValueError(f"push_to_hub=True: the Hub refuses {self._asked_name!r}. {reason}") from error
            logger.warning(
                f"The Hub cannot be reached now ({first_line(error)}). Training goes on, every push tries again, and "
                f"what is not pushed stays in {self.args.output_dir}."
            )

    @property
    def _asked_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name

    def _repository(
        self, token: str | None = None, private: bool | None = None, revision: str | None = None
    ) -> tuple[HfApi, str]:
        """The Hub, and the repository's whole name, once the repository is there."""
        api = HfApi(token=token or self.args.hub_token)
        revision = revision or self.args.hub_revision
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = make_repository(api, self._asked_name, private, revision)
        return api, self.hub_model_id

    def _explained(self, error: BaseException, private: bool | None = None, revision: str | None = None) -> str:
        private = self.args.hub_private_repo if private is None else private
        folder = Path(str(self.args.output_dir))
        return explained(error, folder, self._asked_name, private, revision or self.args.hub_revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The inherited method copies files by names that a diffusers checkpoint lacks, and so pushes no weights; and
        a push in the background that fails says nothing."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress and not (self.push_in_progress.is_done() or self.args.hub_always_push):
            return
        running = self._report_failed_pushes()
        checkpoint = Path(checkpoint_folder)
        self.checkpointer.copy_to_output(checkpoint, lora=(checkpoint / PEFT_CONFIG).is_file())
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card(model_name=short_name(self._asked_name))
        message = f"Training in progress, step {self.state.global_step}"
        within = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}

        def push() -> CommitInfo:
            api, repo_id = self._repository()
            commit = self._upload(api, repo_id, self.args.hub_revision, message)
            if place := within.get(HubStrategy(self.args.hub_strategy)):
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=checkpoint,
                    path_in_repo=place,
                    commit_message=f"{message}, checkpoint",
                    revision=self.args.hub_revision,
                    # transformers' options; the rest is needed to resume.
                    ignore_patterns=["training_args.bin"],
                )
            return commit

        self.push_in_progress = PushInProgress([*running, self._in_background(push)])  # type: ignore[arg-type]

    @cached_property
    def _in_background(self) -> Callable[[Callable[[], CommitInfo]], Future[CommitInfo]]:
        """Runs one push after the other in a thread."""
        return HfApi().run_as_future

    def _report_failed_pushes(self) -> list[Future[CommitInfo]]:
        """Warns of each push in the background that failed, once; gives those that still run."""
        jobs = cast(list[Future[CommitInfo]], self.push_in_progress.jobs) if self.push_in_progress else []
        ended = [job for job in jobs if job.done()]
        for job in ended:
            if (error := job.exception()) is not None:
                logger.warning(self._explained(error))
        running = [job for job in jobs if job not in ended]
        self.push_in_progress = PushInProgress(running)  # type: ignore[arg-type]  # it takes a list
        return running

    def _finish_current_push(self) -> None:
        """The inherited method forgets what failed."""
        super()._finish_current_push()
        self._report_failed_pushes()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves; see [`~transformers.Trainer.save_model`]. A push after it that fails is a warning: what should be
        saved is."""
        try:
            super().save_model(output_dir, _internal_call)
        except PushError as error:
            logger.warning(str(error))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Saves the model, and uploads it; see [`~transformers.Trainer.push_to_hub`].

        The inherited method makes the repository first, so that without a network nothing would be saved.

        Args:
            commit_message, token, revision, private: As there; defaults are those of the config.
            blocking: Whether to return only when everything is uploaded.
            **card: For `create_model_card`.

        Returns:
            The commit, or its `Future` unless `blocking`; in other processes than the first None.

        Raises:
            PushError: The Hub cannot be reached or refuses. The model is saved; the message has the command that
                pushes it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        # Trackio's callback leaves its tags at the model.
        tags = [card["tags"]] if isinstance(card.get("tags"), str) else card.get("tags") or []
        card["tags"] = [*tags, *(getattr(self.model, "model_tags", None) or ())]
        self.create_model_card(**{"model_name": short_name(self._asked_name), **card})
        revision = revision or self.args.hub_revision

        def push() -> CommitInfo:
            try:
                api, repo_id = self._repository(token, private, revision)
                return self._upload(api, repo_id, revision, commit_message)
            except Exception as error:
                raise PushError(self._explained(error, private, revision)) from error

        return push() if blocking else self._in_background(push)

    def _upload(self, api: HfApi, repo_id: str, revision: str | None, commit_message: str | None) -> CommitInfo:
        folder = Path(str(self.args.output_dir))
        complete_card(folder, repo_id)
        return upload(api, folder, repo_id, revision, commit_message)
