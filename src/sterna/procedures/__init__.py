"""Algorithms of several phases, each of which trains: they read like the box in the paper."""
