"""Data sets on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nin_text.errors import UserError, in_one_line

NETWORK_TIMEOUT = 5.0  # seconds
# What `datasets` says if it needs the name of a configuration, or there is none of a name.
CONFIGURATION_MISSING = ("Config name is missing", "BuilderConfig", "Available configs")


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model or data set on the hub: owner/name, and no path."""
    owner, _, rest = name.partition("/")
    looks_so = bool(owner and rest) and "/" not in rest and not owner.startswith((".", "~"))
    return looks_so and not Path(name).exists()


def load_from_hub(
    hub_id: str, advice: str, configuration: str | None = None, option: str = ""
) -> Any:
    """Load a data set, as `datasets` does, from the Hugging Face hub or its local cache.

    Args:
        hub_id: owner/name.
        advice: what to do if it cannot be had, the last part of the message.
        configuration: which of its configurations.
        option: by which the user names one, if there is any.

    Raises:
        UserError: if it cannot be had.
    """
    online = _hub_is_reachable()
    import datasets

    if not online:
        datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        try:
            return datasets.load_dataset(hub_id, configuration)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            # Older data sets are a script, which is never run; the hub keeps a Parquet copy.
            return datasets.load_dataset(hub_id, configuration, revision="refs/convert/parquet")
    except Exception as error:
        reason = in_one_line(error)
        if option and any(words in reason for words in CONFIGURATION_MISSING):
            raise UserError(
                f"the data set {hub_id} has several configurations ({reason}); name one with "
                f"{option}"
            ) from error
        if not online:
            raise UserError(
                f"the data set {hub_id} is not on this machine and the Hugging Face hub cannot be "
                f"reached; {advice}, or connect to the network"
            ) from error
        raise UserError(
            f"the data set {hub_id} could not be loaded from the Hugging Face hub ({reason}); "
            f"check the id, or {advice}"
        ) from error


def _hub_is_reachable() -> bool:
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        session = huggingface_hub.get_session()
        session.head(
            constants.ENDPOINT, timeout=NETWORK_TIMEOUT, follow_redirects=True
        ).raise_for_status()  # a proxy answers, too, when it does not let us through
    except Exception:
        # From here on nothing in this process tries again: each try would wait for a time-out.
        constants.HF_HUB_OFFLINE = True
        return False
    return True
