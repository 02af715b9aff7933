"""Logs in, slates out."""
