"""`python -m qpass`."""

from qpass.cli import main

main()
