"""Recorded results, ``<method>/<scale>.json``, installed as ``ftlib.records``."""
