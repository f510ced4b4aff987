"""The command line, as `python -m streamlab`."""

from .cli import main

main()
