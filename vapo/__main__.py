"""python -m vapo."""

from vapo.cli import main

main()
