"""One sampler step over whole canvases: update and noise in one launch."""
