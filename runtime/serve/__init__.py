"""The HTTP service: images and jobs over HTTP, a page for people, metrics. Needs the extra `serve`."""
