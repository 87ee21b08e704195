"""Backends: each runs graphs with one inference library."""
