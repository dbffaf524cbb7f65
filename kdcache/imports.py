"""Modules of the user's own, named on the user's own command line."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from kdcache_stores.errors import UsageError


def import_own(name: str) -> ModuleType:
    """Import a user's module, from the working directory first, as `python -m` would.

    Raises:
        UsageError: there is no such module, or it raises while it is imported.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        module = name.removesuffix(".py")
        named = f", named without .py: {module}" if module != name else ""
        raise UsageError(
            f"{error}: expected a module {module} in the Python path or in {here}{named}"
        ) from error
    except Exception as error:  # whatever a user's code raises
        raise UsageError(
            f"module {name} raised {type(error).__name__} while it was imported: {error} (--debug "
            "shows where)"
        ) from error
    finally:
        sys.path.remove(here)
        if here not in sys.path:  # last, for worker processes that unpickle what came from it
            sys.path.append(here)


def require_package(what: str, extra: str, error: ImportError) -> UsageError:
    """What to raise where an extra is not installed: which, and how to get it."""
    return UsageError(f"{what} needs the package {error.name}: pip install 'kdcache[{extra}]'")
