"""A method in plain values: the records of the table in `kdcache.methods.table`.

Neither this module nor the table imports torch or the store, so that a list of methods, a page of help or
a recipe costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """The published weights and temperature of a method.

    Attributes:
        ce_weight: of cross-entropy with the labels.
        kd_weight: of the distillation term.
        temperature: T, or τ of standardized logits; None where the method has none, or fits its own.
    """

    ce_weight: float
    kd_weight: float
    temperature: float | None = None


@dataclass(frozen=True)
class Option:
    """An option of one method alone.

    Attributes:
        name: as in `ObjectiveConfig.options`.
        default: the published value; its type is that of every value.
        help: what it is, one line.
        least: the smallest value.
        above: the values are larger than this.
        choices: the values there are; empty for numbers.
        standardized: the published value on standardized logits, where it is another one.
    """

    name: str
    default: float | int | str
    help: str
    least: float | None = None
    above: float | None = None
    choices: tuple[str, ...] = ()
    standardized: float | int | str | None = None


@dataclass(frozen=True)
class Method:
    """All that the rest of kdcache needs to know of a method.

    Attributes:
        name: as on the command line.
        title: what it computes, one line.
        source: the paper.
        loss: "module:Class", a `kdcache.methods.loss.Loss`; None for cross-entropy alone.
        teacher_fields: fields that the loss reads of each teacher, none where there is no teacher;
            "last" and "attention" stand for maps of the size that the student needs.
        student_fields: fields that it reads of the student, beside the logits of cross-entropy;
            "stages" stands for the map of every stage.
        student_variants: other fields of the student, by (option, its value).
        student: "module:function" from the student's network and `Nets` to the network that is trained,
            where that is another one.
        needs_head: the teacher's last layer is part of it.
        one_teacher: it is made for a single teacher.
        online: it needs more of its teacher than a store holds, so that it runs in the loop.
        batch_statistics: the (option, its value) by which its teacher's batch norms use the mean and
            variance of each batch.
        peers: it learns from the logits of the students that are trained beside it, and no teacher.
        needs_labels: a sample without a label is refused.
        pairs: every sample comes as a weak and a strong view.
        whole_batch: the term compares samples with each other: it is one number for a batch, which
            cannot be weighed sample by sample.
        plain_kl: the term is T²·KL of two softmaxes at a given T, for which the bounds on the two
            weights were measured that `kdcache check` warns by.
        takes: the options of the objective that only some methods have: "temperature",
            "teacher_temperature", "student_temperature", "ablation", "reverse".
        plain: the published defaults.
        standardized: those on standardized logits; None where standardization is not of the method.
        options: of this method alone.
        variants: other published defaults, by (option, its value).
    """

    name: str
    title: str
    source: str
    loss: str | None
    plain: Defaults
    standardized: Defaults | None = None
    teacher_fields: tuple[str, ...] = ("logits",)
    student_fields: tuple[str, ...] = ("logits",)
    student_variants: tuple[tuple[tuple[str, str], tuple[str, ...]], ...] = ()
    needs_labels: bool = False
    student: str | None = None
    needs_head: bool = False
    one_teacher: bool = False
    online: bool = False
    batch_statistics: tuple[str, str] | None = None
    peers: bool = False
    pairs: bool = False
    whole_batch: bool = False
    plain_kl: bool = False
    takes: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    variants: tuple[tuple[tuple[str, str], Defaults], ...] = ()

    @property
    def needs_teacher(self) -> bool:
        """Whether it distils, instead of training from labels alone."""
        return bool(self.teacher_fields)

    def defaults(self, options: Mapping[str, object], standardize: bool) -> Defaults:
        """The published weights and temperature, for options that were given."""
        for (name, value), defaults in self.variants:
            if options.get(name) == value:
                return defaults
        if not standardize:
            return self.plain
        assert self.standardized is not None
        return self.standardized

    def student_reads(self, options: Mapping[str, object]) -> tuple[str, ...]:
        """`student_fields`, or those of a variant, for options that were given."""
        for (name, value), fields in self.student_variants:
            if options.get(name) == value:
                return fields
        return self.student_fields

    def flag(self, option: Option) -> str:
        """An option's name among those of all methods: "dkd_beta", on the command line --dkd-beta."""
        return f"{self.name}_{option.name}".replace("-", "_")
