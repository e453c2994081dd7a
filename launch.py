#!/usr/bin/env python3
"""Write configs, start runs, and look at what came out; `python launch.py` tells how."""

from mlora.cli import main

if __name__ == "__main__":
    main()
