"""Adapters that give moesr the interfaces of other tools; each imports its tool only when it is used."""
