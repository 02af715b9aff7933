"""One module a stage, each with `run(config, inputs, workdir) -> dict`."""
