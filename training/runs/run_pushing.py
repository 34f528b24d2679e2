"""Pushing what a run trains: checked before it begins, then done by the one way that models are pushed in.

Upstream's Trainer uploads its whole output folder, makes an empty repository when it is built, and pushes a pickled
file with every save. Ours pushes the model and nothing else, and makes no repository before there is a model.
"""

import logging
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy

from poly_encoders.hub.pushing import check_push, push_folder

logger = logging.getLogger(__name__)


class HubTrainer:
    """What a Trainer needs to push its model safely; mixed in before it."""

    nested_models: tuple[str, ...] = ()  # folders in the output folder, each with a model that goes along

    args: Any
    callback_handler: Any
    control: Any
    model: Any
    state: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find out, before anything is trained, whether the model can be pushed, and where to.

        Raises:
            PushError: it cannot.
        """
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        args = self.args
        self.hub_model_id = check_push(
            args.hub_model_id or Path(args.output_dir).absolute().name,
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
            create_pr=args.hub_create_pr,
        )
        self.push_in_progress = None
        if (card := getattr(self.model, "model_card_data", None)) is not None:
            card.set_model_id(self.hub_model_id)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        create_pr: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model, its card with it, and push both; as upstream's, in one commit and without other files.

        Every process must call it; the main one pushes. What is left out comes from the options. With `blocking=False`
        the result is a `Future`; `kwargs` are what `create_model_card` takes.

        Returns:
            The commit, whose `commit_url` and `pr_url` say where it is; None in other processes.

        Raises:
            PushError, HfHubHTTPError: it did not arrive. The command that repeats the push is logged.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)  # type: ignore[attr-defined]
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return None
        if not getattr(self, "is_fsdp_enabled", False):  # where one process alone cannot rank the card's example
            self.create_model_card(model_name=str(self.hub_model_id).split("/")[-1], **kwargs)  # type: ignore[attr-defined]
        options = {"token": token, "revision": revision, "private": private, "create_pr": create_pr}
        options["commit_message"] = commit_message or "End of training"
        if blocking:
            return self._push(self.args.output_dir, **options)
        return HfApi().run_as_future(self._push, self.args.output_dir, **options)

    def _push(self, folder: str, **options: Any) -> CommitInfo:
        args, name = self.args, str(self.hub_model_id)
        chosen = {
            "token": args.hub_token,
            "revision": args.hub_revision,
            "private": args.hub_private_repo,
            "create_pr": args.hub_create_pr,
            **{key: value for key, value in options.items() if value is not None},
        }
        try:
            return push_folder(folder, name, nested=self.nested_models, exist_ok=True, **chosen)
        except Exception:
            again = ["poly-encoders", "push", folder, name, "--exist-ok"]
            again += ["--private"] if chosen["private"] else []
            again += ["--revision", chosen["revision"]] if chosen["revision"] else []
            again += ["--create-pr"] if chosen["create_pr"] else []
            again += [word for part in self.nested_models for word in ("--nested", part)]
            logger.error("The model was not pushed. It is in %s; push it with: %s", folder, shlex.join(again))
            raise

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Upstream's would push the pickled options. A push that fails is no reason to stop training.
        if not self.is_world_process_zero() or HubStrategy(self.args.hub_strategy) == HubStrategy.END:  # type: ignore[attr-defined]
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._push(checkpoint_folder, commit_message=f"Training in progress, step {self.state.global_step}")
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("%s Training goes on, and the next save is pushed again.", error)


def push_if_asked(trainer: Any) -> bool:
    """Push the model at the end of a run whose options ask for it; whether that went well, if it was asked."""
    if not trainer.args.push_to_hub:
        return True
    try:
        commit = trainer.push_to_hub()
    except (OSError, RuntimeError, ValueError) as error:
        logger.error("%s", error)
        return False
    if commit is not None:
        logger.info("Pushed to %s", commit.pr_url or commit.commit_url)
    return True
