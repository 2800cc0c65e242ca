"""Runs: what is run, by one worker; what it leaves in its folder; runs side by side."""
