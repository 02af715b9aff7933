"""Experiments that compare policies, one file each."""
