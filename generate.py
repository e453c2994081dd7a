#!/usr/bin/env python3
"""Answer one instruction with the base model or with adapters."""

from mlora.cli.generate import generate

if __name__ == "__main__":
    generate()
