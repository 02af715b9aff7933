"""Contexts in fewer tokens: a policy that rewrites them."""
