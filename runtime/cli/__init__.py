"""The command-line programs `moesr-run` and `moesr-doctor`."""
