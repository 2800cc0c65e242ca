"""Transports: alone, N workers in one process, a process group; and how workers are started."""
