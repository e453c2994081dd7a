#!/usr/bin/env python3
"""Train the adapters of a config; `launch.py run` starts this, and torchrun or `accelerate launch` may."""

from mlora.cli.run import train

if __name__ == "__main__":
    train()
