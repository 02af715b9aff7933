"""Measurements beside other libraries; nothing here is needed to train."""
