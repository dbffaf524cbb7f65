"""`python -m kdcache` is the `kdcache` command."""

import sys
from importlib import import_module

if __name__ == "__main__":
    # By name: the library never depends on the command line, except to be started as one.
    sys.exit(import_module("kdcache_cli").main())
