"""Operators with more than one form: a plain reference beside each, and forms that backends can run."""
