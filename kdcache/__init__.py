"""Knowledge distillation from a cache: run the teacher once, train any student from its logits."""

from kdcache._version import __version__

__all__ = ["__version__"]
