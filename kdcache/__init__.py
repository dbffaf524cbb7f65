"""Knowledge distillation from a cache: run the teacher once, train any student from its logits.

The names below are imported when they are first used, so that what needs no torch does not load it.
"""

from typing import TYPE_CHECKING

from kdcache._version import __version__
from kdcache.lazy import lazily

if TYPE_CHECKING:
    from kdcache.augment.specs import make_augmentation
    from kdcache.data.loading import load_dataset
    from kdcache.dumping.dump import dump
    from kdcache.models.zoo import build_model
    from kdcache.preprocessing import Preprocessing
    from kdcache.teachers.load import load_teacher
    from kdcache.teachers.teacher import Teacher
    from kdcache.training.preparation import train, train_together
    from kdcache.training.settings import Training
    from kdcache.views.cached import CachedViews
    from kdcache.views.cached_dataset import CachedDataset, ViewSampler
    from kdcache.views.plan import ViewPlan
    from kdcache_stores import KDCacheError, Store, StoreWriter, open_store

_HOMES = {
    "CachedDataset": "kdcache.views.cached_dataset",
    "CachedViews": "kdcache.views.cached",
    "KDCacheError": "kdcache_stores",
    "Store": "kdcache_stores",
    "Preprocessing": "kdcache.preprocessing",
    "StoreWriter": "kdcache_stores",
    "Teacher": "kdcache.teachers.teacher",
    "Training": "kdcache.training.settings",
    "ViewPlan": "kdcache.views.plan",
    "ViewSampler": "kdcache.views.cached_dataset",
    "build_model": "kdcache.models.zoo",
    "dump": "kdcache.dumping.dump",
    "load_dataset": "kdcache.data.loading",
    "load_teacher": "kdcache.teachers.load",
    "make_augmentation": "kdcache.augment.specs",
    "open_store": "kdcache_stores",
    "train": "kdcache.training.preparation",
    "train_together": "kdcache.training.preparation",
}

__all__ = [
    "CachedDataset",
    "CachedViews",
    "KDCacheError",
    "Preprocessing",
    "Store",
    "StoreWriter",
    "Teacher",
    "Training",
    "ViewPlan",
    "ViewSampler",
    "__version__",
    "build_model",
    "dump",
    "load_dataset",
    "load_teacher",
    "make_augmentation",
    "open_store",
    "train",
    "train_together",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
