"""One module a stage, each with `run(config, inputs, workdir) -> dict`.

`pipeline/graph.py` lists the config sections and the artifacts that a stage
reads. `inputs` maps each artifact's name to its folder, `workdir` is the folder
of the stage itself, and the returned dict becomes its results.json.
"""
