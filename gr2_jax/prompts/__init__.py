"""Slates in, token ids out, and back."""
