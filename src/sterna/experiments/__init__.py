"""Full configurations: one function each, which returns a `sterna.runs.run.Run`."""
