"""Adaptive frequency filter: a spectrum multiplied by a mask that is made from it."""
