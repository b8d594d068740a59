"""Settings as text make the same objects as settings in Python, or say in one line why not."""

import pytest

import vecinfer_jax as vj
from vecinfer_jax import specs
from vecinfer_jax.caches import METHODS
from vecinfer_jax.errors import InputError
from vecinfer_jax.evaluation.table import TASKS, TextTask


def method(text: str, **defaults):
    return specs.parse(text, METHODS, "method", **defaults)


def test_a_name_alone_has_the_defaults():
    assert method("vecinfer") == vj.VecInfer()
    assert method("full") == vj.FullPrecision()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vecinfer:bits=1.5,residual=0", vj.VecInfer(bits=1.5, residual=0)),
        ("vecinfer:bits=2.0", vj.VecInfer(bits=2)),
        ("vecinfer:key=d4b10,value=d8b12", vj.VecInfer(key="d4b10", value="d8b12")),
        ("vecinfer:key=none,transform=none", vj.VecInfer(transform="none")),
        ("vecinfer:interpret=true", vj.VecInfer(interpret=True)),
        ("tailorkv:roles=quantised+sparse*2,tokens=7", vj.TailorKV(roles=("quantised", "sparse", "sparse"), tokens=7)),
        (
            "tailorkv:quantised=vecinfer:bits=1+residual=64,host=vecinfer-4",
            vj.TailorKV(quantised=vj.VecInfer(bits=1, residual=64), host="vecinfer-4"),
        ),
    ],
)
def test_fields_are_set(text, expected):
    assert method(text) == expected


def test_options_stand_behind_the_text():
    assert method("vecinfer:bits=4", bits=2.0, residual=7, sink=None) == vj.VecInfer(bits=4, residual=7)


def test_tasks_have_paths_and_several_values():
    task = specs.parse("perplexity:path=a/b.txt,length=64", TASKS, "task")
    assert isinstance(task, TextTask) and str(task.path) == "a/b.txt" and task.length == 64 and task.windows is None
    assert specs.parse("needle:lengths=512+1024,depths=0+0.5+1", TASKS, "task").lengths == (512, 1024)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "choose from"),
        ("vecinfer:colour=red", "has no colour"),
        ("full:bits=2", "has no bits"),
        ("vecinfer:bits", "not field=value"),
        ("vecinfer:bits=2,bits=4", "twice"),
        ("vecinfer:residual=many", "not a number"),
        ("vecinfer:bits=nan", "not a number"),
        ("vecinfer:residual=1.5", "whole number"),
        ("tailorkv:quantised=magic", "choose from"),
        ("tailorkv:roles=lazy", "is no role"),
    ],
)
def test_a_mistake_is_one_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        method(text)
    assert "\n" not in str(error.value)


def test_an_option_that_a_method_does_not_have_is_named_as_an_option():
    with pytest.raises(InputError, match="--residual"):
        method("full", residual=4)


def test_a_setting_that_must_be_given_is_asked_for():
    with pytest.raises(InputError, match="needs path"):
        specs.parse("perplexity", TASKS, "task")
