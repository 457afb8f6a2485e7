"""Experiments with more sessions than the device holds; run by ``overspill bench sessions``."""
