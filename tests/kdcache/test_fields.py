"""A second field goes all the way: `pooled` of a network, and (T, D) token states of a user's module."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.augment.specs import make_augmentation
from kdcache.checks.check import CheckRequest, check_stores
from kdcache.data.dataset import Dataset
from kdcache.data.loading import load_dataset
from kdcache.dumping.dump import dump
from kdcache.dumping.estimate import estimate
from kdcache.dumping.opening import Target
from kdcache.dumping.outputs import check_outputs
from kdcache.dumping.recheck import recheck
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.logits.kd import kd
from kdcache.methods.loss import Fields, Loss, TargetFields, Terms
from kdcache.methods.record import Defaults, Method
from kdcache.methods.table import METHODS
from kdcache.models.taps import tapped
from kdcache.models.weights import tensor_digest
from kdcache.models.zoo import build_model
from kdcache.preprocessing import Preprocessing
from kdcache.teachers.teacher import Teacher
from kdcache.training.optim import Optimization
from kdcache.training.preparation import prepared, train
from kdcache.training.settings import Training
from kdcache.views.cached import CachedViews
from kdcache.views.plan import ViewPlan
from kdcache.views.window import packed_bytes
from kdcache_cli import main
from kdcache_stores import (
    DataError,
    MismatchError,
    Store,
    UnfinishedStore,
    UsageError,
    describe,
    open_store,
    verify,
)
from kdcache_stores.objects.files import LocalFiles
from kdcache_stores.share.pull import pull_store
from kdcache_stores.share.push import push_store
from tests.conftest import Trained
from tests.kdcache.dumping.conftest import tree

BOTH = ("logits", "pooled")
EXACT = {"logits": "float32", "pooled": "float32"}
NORMAL = Preprocessing((0.4,), (0.3,))


@pytest.fixture(autouse=True)
def _fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").subset(range(120))


@pytest.fixture(scope="module")
def plan(digits: Dataset) -> ViewPlan:
    return ViewPlan(digits, make_augmentation("pad-crop-flip", digits), seed=0)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_model("resnet8", 10, 1, 8).eval().requires_grad_(False)
    weights = tensor_digest(module.state_dict())
    return Teacher("resnet8", module, NORMAL, 10, weights, fields=BOTH, shapes={"pooled": (64,)})


@pytest.fixture(scope="module")
def both(plan: ViewPlan, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of both fields, 3 views."""
    path = tmp_path_factory.mktemp("both") / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        dump(plan, [(teacher, path)], 3, encoding=EXACT, batch_size=50)
    return path


@pytest.fixture(scope="module")
def apart(
    plan: ViewPlan, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same in two stores."""
    folder = tmp_path_factory.mktemp("apart")
    for field in BOTH:
        single = (replace(teacher, fields=(field,)), folder / field)
        dump(plan, [single], 3, encoding={field: "float32"}, batch_size=50)
    return {field: folder / field for field in BOTH}


class Interrupt:
    """Ctrl-C after so many rows."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, done: int, total: int) -> None: ...

    def written(self, nbytes: int) -> None: ...

    def batch(self, rows: int, top1: float | None) -> None:
        self.left -= rows
        if self.left < 0:
            raise KeyboardInterrupt


def live(plan: ViewPlan, teacher: Teacher, view: int) -> dict[str, Tensor]:
    """The teacher's outputs, in the batches of the dump."""
    rows = np.arange(len(plan))
    cuts = [(rows[i : i + 50], view) for i in range(0, len(rows), 50)]
    parts = [teacher(batch.images) for batch in plan.stream(cuts)]
    return {name: torch.cat([part[name] for part in parts]) for name in teacher.fields}


# -- dump, verify, share ---------------------------------------------------------------------------
def test_a_store_of_two_fields_holds_what_the_teacher_gives(
    plan: ViewPlan, teacher: Teacher, both: Path
) -> None:
    with open_store(both) as store:
        assert verify(store).ok
        for view in range(3):
            for name, values in live(plan, teacher, view).items():
                assert np.array_equal(store.read(view, field=name), values.numpy())
        assert store.head is not None
        assert teacher.head is not None
        for kept, own in zip(store.head, teacher.head, strict=True):
            assert np.array_equal(kept, own.numpy())
        weight, bias = store.head
        again = store.read(1, field="pooled") @ weight.T + bias
        np.testing.assert_allclose(again, store.read(1), rtol=1e-4, atol=1e-4)
        fields = describe(store)["fields"]
    assert fields["logits"]["top1"] is not None
    assert fields["pooled"]["top1"] is fields["pooled"]["fidelity"] is None


def test_a_stopped_dump_goes_on_and_grows_byte_for_byte(
    plan: ViewPlan, teacher: Teacher, both: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        dump(plan, [(teacher, path)], 2, encoding=EXACT, batch_size=50, watch=Interrupt(200))
    with pytest.raises(UnfinishedStore):
        open_store(path)
    dump(plan, [(teacher, path)], 2, encoding=EXACT, batch_size=50)
    with open_store(path) as two, open_store(both) as three:
        assert two.view_digests == three.view_digests[:2]
    dump(plan, [(teacher, path)], 3, batch_size=50)  # the store's own encodings
    with open_store(path) as grown, open_store(both) as whole:
        assert grown.digest == whole.digest
        assert verify(grown).ok
    shutil.rmtree(path)
    with pytest.raises(KeyboardInterrupt):
        dump(plan, [(teacher, path)], 3, encoding=EXACT, batch_size=50, watch=Interrupt(200))
    dump(plan, [(teacher, path)], 3, encoding=EXACT, batch_size=50)
    assert tree(path) == tree(both)


def test_repair_writes_a_damaged_shard_of_any_field_anew(
    plan: ViewPlan, teacher: Teacher, both: Path, tmp_path: Path
) -> None:
    shutil.copytree(both, tmp_path / "s")
    shard = next(f for f in (tmp_path / "s").glob("pooled/values/c/1/**/*") if f.is_file())
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    dump(plan, [(teacher, tmp_path / "s")], 3, batch_size=50, repair=True)
    assert tree(tmp_path / "s") == tree(both)


def test_push_and_a_part_pulled(both: Path, tmp_path: Path) -> None:
    with open_store(both) as whole:
        push_store(both, str(tmp_path / "pushed"))
        pull_store(str(tmp_path / "pushed"), tmp_path / "part", (1, 3))
        with open_store(tmp_path / "part") as part:
            assert verify(part).ok
            assert part.view_range == range(1, 3)
            for name in BOTH:
                assert np.array_equal(part.read(2, field=name), whole.read(2, field=name))
            assert part.head is not None


def test_the_estimate_counts_every_field(plan: ViewPlan, teacher: Teacher, tmp_path: Path) -> None:
    cost = estimate(plan, [Target(teacher, tmp_path / "s")], 2, encoding=EXACT)
    assert cost.encodings == EXACT
    assert cost.bytes_per_row == pytest.approx((10 + 64) * 4, rel=0.05)


def test_a_store_s_fields_are_fixed(
    plan: ViewPlan, teacher: Teacher, apart: dict[str, Path], both: Path
) -> None:
    with pytest.raises(
        MismatchError, match=r"holds the fields logits .* --fields pooled to another"
    ):
        dump(plan, [(teacher, apart["logits"])], 3, batch_size=50)
    alone = replace(teacher, fields=("logits",))
    with pytest.raises(MismatchError, match="Go on with --fields logits,pooled"):
        dump(plan, [(alone, both)], 3, batch_size=50)
    with pytest.raises(UsageError, match="an encoding is given for tokens, and the fields"):
        dump(plan, [(alone, both)], 3, encoding={"tokens": "float16"})


def test_recheck_compares_every_field(
    plan: ViewPlan, teacher: Teacher, both: Path, apart: dict[str, Path], tmp_path: Path
) -> None:
    half = {"logits": "float16", "pooled": "float16"}
    dump(plan, [(teacher, tmp_path / "half")], 1, encoding=half)
    for path in (both, *apart.values(), tmp_path / "half"):
        with open_store(path) as store:
            result = recheck(store, plan, teacher, rows=60, batch_size=7)
        assert result.ok, result.problems
        assert result.measured.keys() == store.fields.keys()
        if "pooled" in store.fields:
            assert 0 <= result.measured["pooled"]["head_kl"] < 1e-5

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taps = tapped(teacher.module, BOTH)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            outputs = self.taps(images)
            return outputs | {"pooled": 1.01 * outputs["pooled"]}

    with open_store(both) as store:
        result = recheck(store, plan, replace(teacher, module=Scaled()), rows=60)
        assert [text.split(";")[0] for text in result.problems] == [
            f"error between live and stored pooled is {result.measured['pooled']['error']:.3g}"
        ]
        assert result.worst["field"] == "pooled"
        with pytest.raises(UsageError, match="holds pooled, and the teacher gives logits"):
            recheck(store, plan, replace(teacher, fields=("logits",)))


# -- reading -----------------------------------------------------------------------------------------
def batches(
    dataset: Dataset, stores: list[Path], fields: tuple[str, ...]
) -> list[dict[str, Tensor]]:
    with CachedViews(dataset, stores, 32, fields) as views:
        assert [set(stored) for stored in views.teachers] == [set(fields)]
        return [dict(batch.teachers[0]) for epoch in range(3) for batch in views.epoch(epoch)]


def test_batches_carry_the_fields_of_their_views(digits: Dataset, both: Path) -> None:
    with CachedViews(digits, [both], 32, BOTH) as views, open_store(both) as store:
        for epoch in range(3):
            for images, labels, teachers, rows in views.epoch(epoch):
                assert len(images) == len(labels)
                for name in BOTH:
                    expected = store.read(epoch, rows, field=name)
                    assert np.array_equal(teachers[0][name].numpy(), expected)


def test_two_stores_of_one_teacher_join_their_fields(
    digits: Dataset, both: Path, apart: dict[str, Path]
) -> None:
    one = batches(digits, [both], BOTH)
    two = batches(digits, [apart["pooled"], apart["logits"]], BOTH)
    for expected, joined in zip(one, two, strict=True):
        for name in BOTH:
            assert torch.equal(expected[name], joined[name])
    with pytest.raises(MismatchError, match="both hold"):
        CachedViews(digits, [both, apart["pooled"]], 32, BOTH)
    with pytest.raises(MismatchError, match="no field pooled of resnet8, it holds logits"):
        CachedViews(digits, [apart["logits"]], 32, BOTH)


def test_teachers_of_an_ensemble_each_give_their_fields(
    digits: Dataset, plan: ViewPlan, teacher: Teacher, both: Path, tmp_path: Path
) -> None:
    other = replace(teacher, precision="bf16")
    dump(plan, [(other, tmp_path / "other")], 3, encoding=EXACT, batch_size=50)
    with CachedViews(digits, [both, tmp_path / "other"], 32, BOTH) as views:
        batch = next(views.epoch(0))
    assert [set(fields) for fields in batch.teachers] == [set(BOTH), set(BOTH)]
    assert not torch.equal(batch.teachers[0]["pooled"], batch.teachers[1]["pooled"])


class Watched(LocalFiles):
    """A folder that notes which objects are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.keys: list[str] = []

    def get(self, key: str, most: int | None = None) -> bytes:
        self.keys.append(key)
        return super().get(key, most)


@pytest.mark.parametrize("fields", [("logits",), ("pooled",), ()])
def test_no_byte_of_another_field_is_read(
    fields: tuple[str, ...], digits: Dataset, both: Path
) -> None:
    files = Watched(both)
    with Store(files) as store:
        files.keys.clear()
        with CachedViews(digits, [store], 32, fields) as views:
            for epoch in range(3):
                assert all(len(batch.teachers) == bool(fields) for batch in views.epoch(epoch))
    assert {key.split("/")[0] for key in files.keys if "/c/" in key} == set(fields)


def test_memory_is_by_the_fields_specs(
    digits: Dataset, plan: ViewPlan, teacher: Teacher, tmp_path: Path
) -> None:
    """What is stored as float16 stays so in memory."""
    mixed = {"logits": "float32", "pooled": "float16"}
    dump(plan, [(teacher, tmp_path / "s")], 1, encoding=mixed)
    with CachedViews(digits, [tmp_path / "s"], 32, BOTH) as views:
        assert views.resident is not None
        assert packed_bytes(views.teachers, 7) == (7 * (10 * 4 + 64 * 2), 0)
        assert views.resident.nbytes == len(digits) * (10 * 4 + 64 * 2)
        assert next(views.epoch(0)).teachers[0]["pooled"].dtype == torch.float32


def test_what_is_of_logits_alone_says_so(apart: dict[str, Path], tmp_path: Path) -> None:
    """Reports tell what there is of any field; the checks look at logits."""
    assert (
        main(
            ["report", "--store", str(apart["pooled"]), "--out", str(tmp_path / "page"), "--quiet"]
        )
        == 0
    )
    page = next((tmp_path / "page").glob("*.html")).read_text()
    assert "Field pooled" in page
    assert "64, 256." in page
    with pytest.raises(MismatchError, match="no field logits of resnet8, it holds pooled"):
        check_stores(CheckRequest(stores=(str(apart["pooled"]),)))
    stores = tuple(str(path) for path in apart.values())
    assert check_stores(CheckRequest(stores=stores)) == check_stores(
        CheckRequest(stores=stores[:1])
    )


# -- a loss ------------------------------------------------------------------------------------------
def test_a_loss_in_a_user_s_loop(digits: Dataset, both: Path) -> None:
    torch.manual_seed(0)
    student = tapped(build_model("resnet8", 10, 1, 8), BOTH).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    with CachedViews(digits, [both], 40, BOTH) as views:
        for epoch in range(9):
            for images, _, (taught,), _ in views.epoch(epoch):
                outputs = student(NORMAL(images))
                loss = kd(outputs["logits"], taught["logits"]) + F.mse_loss(
                    outputs["pooled"], taught["pooled"]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


class Hint(Loss):
    """Squared error of the pooled vectors."""

    def forward(self, student: Fields, target: TargetFields, *_: object, **__: object) -> Terms:
        pooled = target["pooled"]
        assert isinstance(pooled, Tensor)
        return {"kd": (student["pooled"] - pooled).square().mean(1)}


def test_a_training_reads_the_fields_that_its_method_names(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached and online, from one store and from two; the logits of the teacher are never read."""
    hint = Method(
        name="hint", title="pooled vectors", source="a test", loss="tests.kdcache.test_fields:Hint",
        teacher_fields=("pooled",), student_fields=("pooled",), plain=Defaults(1.0, 1.0),
    )  # fmt: skip
    monkeypatch.setitem(METHODS, "hint", hint)
    words = ["dump-teacher", "--dataset", "digits", "--teacher", str(trained.teacher), "--views", "2",
             "--fields", "pooled", "--encoding", "pooled=float32", "--device", "cpu", "--quiet",
             "--out", str(tmp_path / "pooled")]  # fmt: skip
    assert main(words) == 0
    training = Training(
        dataset="digits", model="resnet8", objective=ObjectiveConfig(method="hint"),
        stores=(str(tmp_path / "pooled"),), train_samples=100,
        optimization=Optimization(epochs=2, batch_size=50, lr=0.01),
    )  # fmt: skip
    with prepared(training, tmp_path / "look") as loop:
        assert [set(stored) for stored in loop.views.teachers] == [{"pooled"}]
    runs = {
        "cached": train(training, tmp_path / "cached"),
        "online": train(replace(training, online=(str(trained.teacher),)), tmp_path / "online"),
    }
    losses = {name: [r["train_kd"] for r in run.metrics()] for name, run in runs.items()}
    assert losses["cached"] == pytest.approx(losses["online"], rel=1e-3)
    assert losses["cached"][1] < losses["cached"][0]


# -- (T, D) ------------------------------------------------------------------------------------------
class Tokens(nn.Module):
    """(T, D) states of 4 patches, and logits of their mean."""

    def __init__(self, states: Callable[[Tensor], Tensor] = lambda states: states) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.classify = nn.Linear(16, 6), nn.Linear(6, 10)
        self.states = states

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        patches = F.unfold(images, 4, stride=4).transpose(1, 2)
        tokens = self.embed(patches)
        return {"logits": self.classify(tokens.mean(1)), "tokens": self.states(tokens)}


def tokens(states: Callable[[Tensor], Tensor] = lambda states: states) -> Teacher:
    module = Tokens(states).eval().requires_grad_(False)
    return Teacher("tokens", module, NORMAL, 10, tensor_digest(module.state_dict()),
                   fields=("logits", "tokens"), shapes={"tokens": (4, 6)})  # fmt: skip


def test_token_states_through_dump_kill_resume_verify_read(
    plan: ViewPlan, digits: Dataset, tmp_path: Path
) -> None:
    teacher, encoding = tokens(), {"tokens": "float32"}
    dump(plan, [(teacher, tmp_path / "whole")], 2, encoding=encoding, batch_size=50)
    with pytest.raises(KeyboardInterrupt):
        dump(plan, [(teacher, tmp_path / "s")], 2, encoding=encoding, batch_size=50,
             watch=Interrupt(150))  # fmt: skip
    dump(plan, [(teacher, tmp_path / "s")], 2, encoding=encoding, batch_size=50)
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")
    with open_store(tmp_path / "s") as store:
        assert verify(store).ok
        assert recheck(store, plan, teacher, rows=50).ok
        assert np.array_equal(
            store.read(1, field="tokens"), live(plan, teacher, 1)["tokens"].numpy()
        )
        assert store.head is None
    with CachedViews(digits, [tmp_path / "s"], 32, ("tokens",)) as views:
        assert next(views.epoch(0)).teachers[0]["tokens"].shape == (32, 4, 6)


def test_rows_of_differing_length_are_refused(plan: ViewPlan, tmp_path: Path) -> None:
    """Cut to the longest row of each batch, as collate functions pad: each batch has its own length."""
    ragged = tokens(lambda states: states[:, : 4 if len(states) == 50 else 3])
    with pytest.raises(MismatchError, match=r"one shape for every view\. Pad or pool"):
        dump(plan, [(ragged, tmp_path / "s")], 1, batch_size=50)
    listed = tokens(lambda states: [row[:2] for row in states])  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match="tokens comes as rows of differing length"):
        dump(plan, [(listed, tmp_path / "listed")], 1)


def test_values_of_any_field_must_be_finite(plan: ViewPlan, tmp_path: Path) -> None:
    spoilt = tokens(lambda states: torch.where(states > 0.5, torch.inf, states))
    with pytest.raises(DataError, match="gave tokens that are not finite for sample"):
        dump(plan, [(spoilt, tmp_path / "s")], 1)
    with pytest.raises(DataError, match="gives tokens that are not finite for"):
        check_outputs(spoilt, plan.images(np.arange(32), 0))
    random = tokens(lambda states: states + torch.rand_like(states))
    with pytest.raises(MismatchError, match="gives other tokens for the same image"):
        check_outputs(random, plan.images(np.arange(32), 0))
