#!/usr/bin/env python3
"""Answer in a web page: the base model and adapters side by side."""

from mlora.cli.inference import inference

if __name__ == "__main__":
    inference()
