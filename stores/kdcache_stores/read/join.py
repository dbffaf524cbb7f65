"""Which of several stores holds which field of which teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdcache_stores.errors import MismatchError, UsageError
from kdcache_stores.format.canonical_json import first_difference
from kdcache_stores.read.reader import Store


def join_fields(stores: Sequence[Store], fields: Sequence[str]) -> list[dict[str, Store]]:
    """Which store holds each wanted field of each teacher.

    Stores of one teacher (equal digest: weights, preprocessing, precision) join their fields; those of
    different teachers are the members of an ensemble, each of which must hold all of the fields.

    Args:
        stores: of one view plan, at least one.
        fields: names of the fields that are wanted, at least one.

    Returns one mapping from field to store per teacher, in order of first appearance. The views that
    all of them hold are `common_views`.

    Raises `MismatchError` for stores of different plans, for a field that two stores of a teacher hold,
    and for one that a teacher lacks: naming what there is and, where another store holds it under
    equal weights, what makes that one another teacher. `UsageError` without stores or fields.
    """
    if not stores or not fields:
        raise UsageError("expected at least one store and one field")
    teachers: dict[str, list[Store]] = {}
    for store in stores:
        _check_plan(stores[0], store)
        teachers.setdefault(store.teacher.digest, []).append(store)
    for own in teachers.values():
        _check_distinct(own)
    return [{name: _holder(name, own, stores) for name in fields} for own in teachers.values()]


def expected(paths: Sequence[str], digests: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each store with the content digest that `open_store` shall find in it, None where none is asked.

    Raises `UsageError` unless there is a digest for each store, or none at all.
    """
    if digests and len(digests) != len(paths):
        raise UsageError(
            f"expected a digest for each of {len(paths)} stores, found {len(digests)}: give --expect "
            "once for each, in their order"
        )
    return [(path, digests[i] if digests else None) for i, path in enumerate(paths)]


def common_views(stores: Iterable[Store]) -> range:
    """The numbers of the views that all of these stores hold; raises `MismatchError` if there is none."""
    stores = list(stores)
    views = range(
        max(store.view_range.start for store in stores),
        min(store.view_range.stop for store in stores),
    )
    if not views:
        held = "; ".join(f"{store.where}: {_views(store)}" for store in stores)
        raise MismatchError(
            f"these stores hold no view in common ({held}): pull or dump the views of one in the others"
        )
    return views


def _check_plan(first: Store, store: Store) -> None:
    if first.plan.digest == store.plan.digest:
        return
    names = ("fingerprint", "augmentation", "seed")
    plan, other_plan = ({name: getattr(s.plan, name) for name in names} for s in (first, store))
    difference = first_difference(plan, other_plan, "plan")
    assert difference is not None
    name, expected, other = difference
    raise MismatchError(
        f"{first.where} and {store.where} are of two view plans, so their rows are not of the same "
        f"images: {name} is {expected!r:.120} and {other!r:.120}. Give stores of one plan"
    )


def _check_distinct(own: Sequence[Store]) -> None:
    holder: dict[str, Store] = {}
    for store in own:
        for name in store.fields:
            if name in holder:
                raise MismatchError(
                    f"{holder[name].where} and {store.where} both hold {name} of one teacher "
                    f"({store.teacher.architecture}, {store.teacher.digest[:12]}): give one of them"
                )
            holder[name] = store


def _holder(name: str, own: Sequence[Store], stores: Sequence[Store]) -> Store:
    """The store of this teacher that holds the field."""
    for store in own:
        if name in store.fields:
            return store
    where = ", ".join(store.where for store in own)
    held = ", ".join(sorted({field for store in own for field in store.fields}))
    teacher = own[0].teacher
    message = f"{where}: no field {name} of {teacher.architecture}, it holds {held}"
    for other in stores:
        if name in other.fields and other.teacher.weights_sha256 == teacher.weights_sha256:
            used, other_used = (
                {"precision": t.precision, "preprocessing": t.preprocessing}
                for t in (teacher, other.teacher)
            )
            difference = first_difference(used, other_used, "teacher")
            assert difference is not None  # or it would be one of this teacher's own
            what, ours, theirs = difference
            raise MismatchError(
                f"{message}. {other.where} holds {name} of equal weights, but that is another teacher: "
                f"{what.removeprefix('teacher.')} is {ours!r:.120} here and {theirs!r:.120} there. Dump "
                f"{name} with the same"
            )
    raise MismatchError(
        f"{message}. Dump {name} of this teacher, or give another store of it that holds {name}"
    )


def _views(store: Store) -> str:
    return f"views {store.view_range.start} to {store.view_range.stop - 1}"
