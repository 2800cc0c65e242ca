"""``python -m sterna``; for ``torchrun -m sterna run ...``."""

from sterna.cli import main

main()
