"""moesr."""
