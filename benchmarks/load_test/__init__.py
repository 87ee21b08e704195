"""Parts of `serving.py`: the server process, its clients, hostile clients, and the page of results."""
