"""Answers served on this machine: a web page and an OpenAI-compatible endpoint."""
