"""Whether the Hugging Face hub answers, found out once and before anything is wanted of it.

Its libraries ask a host that does not answer six times for each file, half a minute of it, before they look into their
cache. Here it is asked once; where nobody answers, they go offline and look into their cache alone.
"""

from __future__ import annotations

import logging
import sys

SECONDS = 10.0
"""How long an answer may take."""
ASKED_FOR = "hub offline mode is set (HF_HUB_OFFLINE or --hub_offline)"

_silent: dict[str, str | None] = {}
"""Why an address cannot be reached, of each that was asked; None where it answered."""

log = logging.getLogger(__name__)


def ask_hub() -> None:
    """Ask the hub whether it is there, once in a process; where it is not, put its libraries into offline mode."""
    from huggingface_hub import constants, get_session

    address = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE or address in _silent:
        return
    try:
        get_session().head(address, timeout=SECONDS)  # whatever is answered is an answer
        _silent[address] = None
    except Exception as error:  # httpx's or httpx2's, by the version of the hub's library
        _silent[address] = f"{address} cannot be reached ({str(error) or type(error).__name__})"
        log.info("%s: cached copies are used", _silent[address])
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it has taken its own copy
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def why_offline() -> str | None:
    """Return why nothing is fetched: nobody answers, or the user has said so; None where things are fetched."""
    from huggingface_hub import constants

    return (_silent.get(constants.ENDPOINT) or ASKED_FOR) if constants.HF_HUB_OFFLINE else None
