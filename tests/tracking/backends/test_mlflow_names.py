"""Names that every MLflow store accepts and keeps apart."""

from __future__ import annotations

import posixpath
import re

from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.tracking.backends.mlflow_names import Names, original_name, path_name

ODD = ["a//b", "../up", "/abs", ".", "a/", "", "new\nline", "nul\0", "🎉", "x" * 300, "trailing\n", "\ud800"]


@given(st.one_of(st.sampled_from(ODD), st.text(max_size=300)))
def test_any_key_gets_a_name_that_leads_back(key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    name, tags = Names()(key)
    _validate_metric_name(name)
    assert len(name) <= 250
    assert (name == key) or tags
    if len(key) < 500:
        assert original_name(name, tags) == key


def test_plain_names_stay() -> None:
    for key in ("loss", "train/loss", "a b", "x:y", "é"):
        assert Names()(key) == (key, {})


def test_names_that_differ_only_in_case_are_kept_apart_where_a_store_may_merge_them() -> None:
    first = Names(folds_case=True)
    assert first("Loss") == ("Loss", {})
    name, tags = first("loss")
    assert name.casefold() != "loss"
    assert original_name(name, tags) == "loss"
    later = Names(["Loss", name], tags, folds_case=True)
    assert later("loss")[0] == name  # whichever comes first in a later process
    assert later("Loss")[0] == "Loss"


def test_the_original_is_sent_until_it_arrived() -> None:
    names = Names()
    assert names("?")[1] == names("?")[1] != {}
    names.remember()
    assert names("?")[1] == {}


@given(st.text(max_size=300))
def test_paths_stay_below(key: str) -> None:
    path = path_name(key)
    assert re.fullmatch(r"[A-Za-z0-9/_.=@+-]+", path)
    assert posixpath.normpath(path) == path
    assert not path.startswith(("/", "."))
