"""The command as a graph of stages: artifacts, checkpoints, reports."""
