"""Who writes or judges reasoning."""
