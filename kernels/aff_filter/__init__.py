"""The adaptive frequency filter: a spectrum is multiplied by a mask that is computed from it."""
