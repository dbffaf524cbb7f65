"""The `kdcache` command: parses, calls the library, prints."""
