"""Backends, each of which runs graphs with one inference library."""
