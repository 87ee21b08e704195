"""Engine directories: the manifest, the graphs that it lists, and where engines are found."""
