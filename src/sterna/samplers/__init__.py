"""Samplers: which examples?"""

from sterna.samplers.shuffle import Shuffle

__all__ = ["Shuffle"]
