"""Which adapters of a config are compared, and by what."""

from __future__ import annotations

from mlora.config import RunConfig, resolved
from mlora.report.grid import Place


def swept(config: RunConfig) -> tuple[list[str], dict[str, Place]]:
    """Return the keys that adapters are ranked by, and where each adapter stands: seeds are averaged over."""
    keys = [key for key in config.sweep if key != "seed"]
    entries = {entry["name"]: entry for entry in resolved(config)["lora"]}
    places = {
        name: Place(tuple(str(entry.get(key)) for key in keys), entry["seed"] or 0) for name, entry in entries.items()
    }
    return keys, places
