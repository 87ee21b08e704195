"""Training images: photographs, crops and degradations."""
