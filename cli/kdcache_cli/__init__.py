"""The `kdcache` command: parses, calls the library, prints."""

from kdcache_cli.app import main

__all__ = ["main"]
