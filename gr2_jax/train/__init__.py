"""How the parameters of a policy change."""
