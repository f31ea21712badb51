from __future__ import annotations

import time

import pytest

from ray_tracking.config import get_config
from ray_tracking.config.yaml_text import MAX_DEPTH, MAX_NODES, parse
from ray_tracking.errors import ConfigError


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "starts", "hint"),
    [
        ("a: 1\nb: [1,\nc: 2\n", "f.yaml, line 4, column 1: not valid YAML", "brackets"),
        ("a: 1\nb: c: d\n", "f.yaml, line 2, column 5: not valid YAML: mapping values", "quote text"),
        ("a:\n\t- b", "f.yaml, line 2, column 1: not valid YAML", "Indent with spaces"),
        ("a: 1\n---\nb: 2", "f.yaml, line 2, column 1: not valid YAML", "one document per file"),
        ("a: *x", "f.yaml, line 1, column 4: not valid YAML: found undefined alias 'x'", "Check"),
        ("a: 1\nb: \x01", "f.yaml, line 2: a character that YAML does not allow (number 0x01)", "Remove"),
        (
            "a: {? [1]: 2}",
            "f.yaml, line 1, column 7: not valid YAML: while constructing a mapping; found unh",
            "",
        ),
        ("a: 1\nb: !!int x", "f.yaml, line 2, column 4: not valid YAML: 'x' can't be read as int.", "Change"),
        ("b: !!bool x", "f.yaml, line 1, column 4: not valid YAML: 'x' can't be read as bool.", "Change"),
        (
            "b: " + "9" * 5000,
            "f.yaml, line 1, column 4: not valid YAML: '99999999999999999999' can't",
            "Change",
        ),
    ],
)
def test_syntax_errors_name_the_line(text, starts, hint):
    message = error_of(text)
    assert message.startswith(starts)
    assert hint in message.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("a: 1\nb: !!python/object/apply:os.system [touch owned]", "!!python/object/apply:os.system"),
        ("a: 1\nb: !!python/name:os.system", "!!python/name:os.system"),
        ("a: 1\nb: !mine x", "!mine"),
        ("a: 1\nb: !!binary aGk=", "!!binary"),
        ("a: 1\n!!python/name:os.system : x", "!!python/name:os.system"),
    ],
)
def test_tags_are_refused_with_the_line(text, tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of(text).startswith(f"f.yaml, line 2: the tag {tag} is refused.\nAllowed: plain YAML")
    assert not list(tmp_path.iterdir()), "nothing was run"


def test_an_alias_bomb_is_refused_at_once():
    levels = [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    started = time.thread_time()
    message = error_of("a0: &a0 [x, x]\n" + "\n".join(levels))
    assert time.thread_time() - started < 2
    assert "too many values or levels, its aliases (*name) written out" in message
    assert f"Allowed: {MAX_NODES} values, {MAX_DEPTH} levels." in message


def test_a_bomb_of_merge_keys_is_refused():
    levels = [f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30)]
    assert "too many values" in error_of("a0: &a0 {x: 1}\n" + "\n".join(levels))


def test_an_alias_of_itself_is_refused():
    assert "too many values or levels" in error_of("a: &a [*a]")
    assert "too many values or levels" in error_of("a: &a\n  b: *a\n")


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "{b: " * 5000, "- " * 5000])
def test_deep_nesting_is_refused(text):
    assert f"nested more than {MAX_DEPTH} levels deep" in error_of(text)


def test_aliases_and_merge_keys_work():
    document = parse("base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}\nlist: [*b, *b]\n", "f")
    assert document.data["other"] == {"x": 1, "y": 3}
    assert document.data["list"] == [{"x": 1, "y": 2}] * 2
    assert not document.duplicates, "a key over a merged one is no repetition"


def test_repeated_keys_are_told_with_both_lines(write):
    file = write("name: a\ntraining:\n  default:\n    mode: min\n    save_steps: 1\n    mode: max\nname: b\n")
    with pytest.raises(ConfigError) as caught:
        get_config(file=file)
    assert str(caught.value).splitlines() == [
        "The configuration is not valid (2 problems):",
        f"  {file}, line 7: name stands there twice, first in line 1. Keep one of them.",
        f"  {file}, line 6: training.default.mode stands there twice, first in line 4. Keep one of them.",
    ]


def test_the_line_of_each_key():
    document = parse("a:\n  b: 1\n  c:\n    - d: 2\n", "f")
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", "0", "d"): 4}


def test_numbers_as_people_mean_them():
    text = "[1e-5, 1E5, 1., .5, -3, +4, 0x10, .inf, 1e, e5, 1.2.3, 08, 12:30, 2024-01-01, 1_0, =, 1e5x]"
    assert parse(text, "f").data == [
        1e-5,
        1e5,
        1.0,
        0.5,
        -3,
        4,
        16,
        float("inf"),
        "1e",
        "e5",
        "1.2.3",
        "08",
        "12:30",
        "2024-01-01",
        10,
        "=",
        "1e5x",
    ]
