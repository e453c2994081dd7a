"""Several processes, ranks, that train the same adapters over the same base, each on rows of its own."""

from mlora.parallel.ranks import ALONE, Lost, Ranks, places, ranks_started

__all__ = ["ALONE", "Lost", "Ranks", "places", "ranks_started"]
