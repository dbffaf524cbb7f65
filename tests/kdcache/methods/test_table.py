"""The table of methods, and what is made of its records: losses, options, flags."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

import kdcache.methods
from kdcache.methods.config import ObjectiveConfig
from kdcache.methods.loss import Loss
from kdcache.methods.objective import loss_class
from kdcache.methods.record import Method
from kdcache.methods.table import METHODS
from kdcache_stores.errors import UnknownName, UsageError

DISTILLING = [method for method in METHODS.values() if method.needs_teacher]
OPTIONS = [(method, option) for method in METHODS.values() for option in method.options]


@pytest.mark.parametrize("method", DISTILLING, ids=lambda method: method.name)
def test_a_record_names_a_loss_and_published_values(method: Method) -> None:
    assert issubclass(loss_class(method), Loss)
    for standardize in (False, "unbiased") if method.standardized else (False,):
        config = ObjectiveConfig(method=method.name, standardize=standardize).resolved()
        assert set(config.options) == {option.name for option in method.options}
        assert (config.temperature is not None) == ("temperature" in method.takes)


@pytest.mark.parametrize("method", DISTILLING, ids=lambda method: method.name)
def test_the_plain_function_has_the_defaults_of_the_record(method: Method) -> None:
    assert method.loss is not None
    module = importlib.import_module(method.loss.partition(":")[0])
    parameters = inspect.signature(getattr(module, method.name.replace("-", "_"))).parameters
    record = {option.name: option.default for option in method.options}
    if method.plain.temperature is not None:
        record["temperature"] = method.plain.temperature
    for name in parameters.keys() & record.keys():
        assert parameters[name].default == record[name]


@pytest.mark.parametrize(("method", "option"), OPTIONS, ids=lambda value: value.name)
def test_own_options_have_flags(method: Method, option: Any) -> None:
    flag = method.flag(option)
    assert flag in ObjectiveConfig.flags()
    config = ObjectiveConfig.from_flags({"method": method.name, flag: option.default})
    assert config.options == {option.name: option.default}
    assert type(config.options[option.name]) is type(option.default)
    assert ObjectiveConfig.from_flags({"method": method.name, flag: None}).options == {}
    for other in METHODS.values():
        if other is not method:
            with pytest.raises(UsageError, match=f"{flag} is an option of {method.name}, found"):
                ObjectiveConfig.from_flags({"method": other.name, flag: option.default})


def test_flags_are_those_of_the_command_line() -> None:
    config = ObjectiveConfig.from_flags(
        {
            "method": "dkd",
            "standardize": True,
            "noise": "laplace:0.2",
            "kd_weight": 3,
            "dkd_beta": 2,
        }
    )
    assert config == ObjectiveConfig.from_dict(config.to_dict())
    assert (config.standardize, str(config.noise), config.options) == (
        "unbiased", "laplace:0.2", {"beta": 2.0},
    )  # fmt: skip
    with pytest.raises(UnknownName, match="did you mean 'dkd'"):
        ObjectiveConfig.from_flags({"method": "dkdd", "dkd_beta": 2})
    with pytest.raises(UnknownName, match="did you mean 'kd_weight'"):
        ObjectiveConfig.from_flags({"kd_wieght": 1.0})


def test_the_command_line_refuses_another_method_s_option(kdcache: Any) -> None:
    for command in (("train-student", "--out", "out"), ("check", "store.zarr")):
        done = kdcache(
            *command, "--dataset", "digits", "--student", "resnet8", "--method", "kd",
            "--dkd-beta", 2,
        )  # fmt: skip
        assert done.code == 2
        assert "dkd_beta is an option of dkd, found method kd" in done.err


def test_the_package_exports_what_it_says() -> None:
    assert set(dir(kdcache.methods)) == set(kdcache.methods.__all__)
    assert all(getattr(kdcache.methods, name) is not None for name in kdcache.methods.__all__)
    with pytest.raises(AttributeError, match=r"'kdcache\.methods' has no attribute 'dkdd'"):
        kdcache.methods.dkdd  # noqa: B018
