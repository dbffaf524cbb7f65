"""What names there are, by kind, with a line and a page about each: for `list`, and for completion."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping

from kdcache.methods.record import Method
from kdcache.methods.table import METHODS


def _models() -> dict[str, str]:
    from kdcache.models.zoo import MODELS

    others = {
        "torchvision:NAME": "A classifier of torchvision; @WEIGHTS takes its own weights.",
        "timm:NAME": "A classifier of timm (extra `timm`).",
        "pkg.module:factory": "Your own function of (classes, channels, size), or (classes, shape).",
    }
    return dict.fromkeys(MODELS, "") | others


def _datasets() -> dict[str, str]:
    from kdcache.data.loading import DATASETS, PREFIXES

    return {name: _first_line(loader) for name, loader in DATASETS.items()} | PREFIXES


def _methods() -> dict[str, str]:
    def line(method: Method) -> str:
        reads = ", ".join(method.teacher_fields) or "no teacher"
        return f"{method.title} ({method.source}) [{reads}]"

    return {name: line(method) for name, method in METHODS.items()}


def _augmentations() -> dict[str, str]:
    from kdcache.augment.specs import AUGMENTATIONS

    return {name: _first_line(kind) for name, kind in AUGMENTATIONS.items()}


def _fields() -> dict[str, str]:
    from kdcache.fields.spelling import FIELDS

    own = {"NAME": "A field that your own module gives: its forward returns {NAME: tensor}."}
    return FIELDS | own


def _encodings() -> dict[str, str]:
    from kdcache_stores import ENCODINGS

    return {name: _first_line(kind) for name, kind in ENCODINGS.items()}


def _recipes() -> dict[str, str]:
    from kdcache.recipes.published import names

    return dict(names())


def _words() -> dict[str, str]:
    return WORDS


#: What the words mean that every page uses; the first five are in the README.
WORDS = {
    "store": "A folder of what one teacher gives for every view of a dataset: Zarr and Parquet files.",
    "view": "One augmentation of one sample: seed, key and number of a view give the same pixels anywhere.",
    "plan": "Dataset, augmentation and seed: what makes the views. Stores of one plan fit together row by row.",
    "seal": "The digest that is written last. With it a store is whole, and any later change is noticed.",
    "break-even": "The student epochs after which a store has saved the teacher forward passes that it took.",
    "field": "One named output of a teacher for a view, of one shape: logits, pooled, a map of a stage.",
    "encoding": "How the rows of a field become bytes, with what it loses.",
    "replay proof": "A few views made anew before the first step, and compared with what the teacher saw.",
    "shard": "The rows of a view that are written together: the grain of ranks, parts and interrupts.",
    "run": "A folder of one training: configuration, metrics, weights, checkpoint, summary.",
    "recipe": "The settings of a publication, by name.",
}
#: Kind -> the names of it, each with a line.
KINDS: dict[str, Callable[[], Mapping[str, str]]] = {
    "models": _models,
    "datasets": _datasets,
    "methods": _methods,
    "fields": _fields,
    "augmentations": _augmentations,
    "encodings": _encodings,
    "recipes": _recipes,
    "words": _words,
}
#: How names of a kind are written, where there is more to it.
SPELLING = {
    "augmentations": "Written NAME, NAME:option=value,option=value, or a chain NAME+NAME, mixup and cutmix "
    "last: pad-crop-flip:padding=4,flip=false+erase. A list of values has slashes: 0.5/1.",
    "encodings": "Written NAME, or NAME:NUMBER for its one setting; of a field other than logits FIELD=NAME.",
    "datasets": "A name that ends with a colon is followed by a path, a pattern or a name of its own.",
    "recipes": "Options of the command line override those of a recipe.",
}


def page_of(kind: str, name: str) -> str:
    """All there is to say of a name.

    Raises:
        UnknownName: there is no such name of that kind.
    """
    from kdcache_stores.errors import UnknownName

    names = KINDS[kind]()
    if name not in names:
        raise UnknownName(kind.removesuffix("s"), name, names)
    page = _PAGES[kind](name) if kind in _PAGES else ""
    return page or names[name] or name


def _method_page(name: str) -> str:
    method = METHODS[name]
    plain, standardized = method.plain, method.standardized
    lines = [method.title, f"source: {method.source}"]
    lines.append(f"reads of the teacher: {', '.join(method.teacher_fields) or 'nothing'}")
    for title, values in (("published", plain), ("with --standardize", standardized)):
        if values is not None:
            temperature = "" if values.temperature is None else f", T {values.temperature:g}"
            weights = f"cross-entropy {values.ce_weight:g}, distillation {values.kd_weight:g}"
            lines.append(f"{title}: {weights}{temperature}")
    for option in method.options:
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        flag = method.flag(option).replace("_", "-")
        lines.append(f"--{flag} {option.default}{choices}: {option.help}")
    return "\n".join(lines)


def _augmentation_page(name: str) -> str:
    from kdcache.augment.specs import AUGMENTATIONS, OF_THE_DATASET

    of_dataset = OF_THE_DATASET.keys() & inspect.signature(AUGMENTATIONS[name]).parameters.keys()
    text = "; ".join(f"{key}: {line}" for key, line in OF_THE_DATASET.items() if key in of_dataset)
    page = _page_of_class(AUGMENTATIONS[name], of_dataset)
    return f"{page}\n\nDefaults that the dataset decides: {text}" if text else page


def _encoding_page(name: str) -> str:
    from kdcache_stores import ENCODINGS

    return _page_of_class(ENCODINGS[name])


def _dataset_page(name: str) -> str:
    from kdcache.data.loading import DATASETS

    return inspect.getdoc(DATASETS[name]) or "" if name in DATASETS else ""


def _recipe_page(name: str) -> str:
    from kdcache.recipes.published import resolve

    options = resolve(name, "")
    lines = [f"--{key.replace('_', '-')}{_text(value)}" for key, value in options.items()]
    return "\n".join(
        [KINDS["recipes"]()[name], *lines, "By student and pair, other values may hold."]
    )


_PAGES: dict[str, Callable[[str], str]] = {
    "methods": _method_page,
    "augmentations": _augmentation_page,
    "encodings": _encoding_page,
    "datasets": _dataset_page,
    "recipes": _recipe_page,
}


def _page_of_class(kind: type | Callable[..., object], others: Collection[str] = ()) -> str:
    """Its docstring, and the defaults of its options but for some others."""
    options = [
        f"{name}={parameter.default}"
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is not parameter.empty
        and name not in others
        and isinstance(parameter.default, (int, float, str))
    ]
    return "\n\n".join(
        [inspect.getdoc(kind) or "", *(["Defaults: " + ", ".join(options)] if options else [])]
    )


def _text(value: object) -> str:
    """What follows a flag on the command line."""
    if value is True:
        return ""
    return " " + (",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


def _first_line(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    paragraph = (thing.__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(paragraph.split())
