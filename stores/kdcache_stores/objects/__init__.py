"""Named objects: on a disk, in a bucket, on a web server, on the Hub, in the local cache."""
