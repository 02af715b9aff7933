"""Where logs come from: each module has `load(config) -> Log`."""
