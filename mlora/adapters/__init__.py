"""Adapter methods, one file each; importing this package registers every file in the folder. Imports no torch."""

import importlib
import pkgutil

from mlora.adapters.base import METHODS, BlockSite, EmbeddingSite, Init, LinearSite, Method, Segment, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "BlockSite", "EmbeddingSite", "Init", "LinearSite", "Method", "Segment", "register"]
