"""Many machines: folders, buckets and large images on a cluster of Ray."""
