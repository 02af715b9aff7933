"""Authors and judges of reasoning."""
