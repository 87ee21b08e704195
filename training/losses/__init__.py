"""Losses of every training stage."""
