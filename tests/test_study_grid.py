"""A study's grid: read from YAML with errors that name the line, its cells, and what each is trained with."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from normsurgeon._util.yaml_lines import MAX_BYTES, parse_yaml
from normsurgeon.errors import UsageError
from normsurgeon.finetuning.config import FinetuneConfig
from normsurgeon.norms.target_names import TARGET_NAMES
from normsurgeon.study import grid as names
from normsurgeon.study.grid import Grid, Training, read_grid
from normsurgeon.study.records import AXES, Cell

LEAST = {"models": "resnet8", "norms": "gn", "datasets": "digits"}
HEAD = "models: resnet8\nnorms: gn\ndatasets: digits\n"
CONVERTED = f"{HEAD}start: converted\n"
WHOLE = """\
name: quick
title: Three norms on digits
models: [resnet8]
norms: [bn, gn, ln, "gn:8", gn:16, in]
datasets: [digits]
batch_sizes: [8, 64]
activations: default
preprocessing: standard
regularization: [none, {weight_decay: 5.0e-4}, {smoothing: 0.1, mixup: 0.2}]
learning_rates: 0.1
start: scratch
seeds: 3
training:
  epochs: 8
  optimizer: sgd
  lr_batch_size: 32
  train_images: 2000
  test_images: 2000
  image_size: 32
  augment: false
  judge: last
analysis: false
keep_checkpoints: false
"""


def written(tmp_path: Path, text: str, name: str = "study.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(tmp_path: Path, text: str) -> str:
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=r"^[^\n]+$") as caught:
        read_grid(path)
    return str(caught.value).replace(str(path), "study.yaml")


def refused(**changes) -> str:
    with pytest.raises(UsageError, match=r"^[^\n]+$") as caught:
        Grid.from_dict({**LEAST, **changes})
    return str(caught.value)


# What is read


def test_the_whole_file_becomes_the_axes_and_the_shared_settings(tmp_path):
    grid = read_grid(written(tmp_path, WHOLE))
    assert grid == Grid(
        models=("resnet8",),
        norms=("bn", "gn", "ln", "gn:8", "gn:16", "in"),
        datasets=("digits",),
        batch_sizes=(8, 64),
        activations=("default",),
        preprocessing=("standard",),
        regularization=((), (("weight_decay", 0.0005),), (("mixup", 0.2), ("smoothing", 0.1))),
        learning_rates=(0.1,),
        start=("scratch",),
        seeds=(0, 1, 2),
        training=Training(epochs=8, opt="sgd", train_images=2000, test_images=2000, image_size=32),
        name="quick",
        title="Three norms on digits",
    )


def test_three_keys_are_enough_and_the_name_is_the_files(tmp_path):
    grid = read_grid(written(tmp_path, HEAD, "norms-on-digits.yaml"))
    assert grid == Grid.from_dict({**LEAST, "name": "norms-on-digits"})
    assert (grid.batch_sizes, grid.learning_rates, grid.seeds, grid.start) == ((32,), (0.1,), (0, 1, 2), ("scratch",))
    assert (grid.activations, grid.preprocessing, grid.regularization) == (("default",), ("standard",), ((),))
    assert (grid.training.epochs, grid.training.steps, grid.training.judge) == (8, None, "last")
    assert not grid.analysis
    assert not grid.keep_checkpoints


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "'1e-4'", "+1e-04", ".0001"])
def test_a_number_may_be_written_as_people_write_it(tmp_path, text):
    assert read_grid(written(tmp_path, f"{HEAD}learning_rates: {text}\n")).learning_rates == (0.0001,)
    found = read_grid(written(tmp_path, f"{HEAD}regularization: {{weight_decay: {text}}}\n"))
    assert found.regularization == ((("weight_decay", 0.0001),),)


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "N", "1:30", "2026-01-01", "in"])
def test_words_that_are_something_else_in_yaml_1_1_stay_texts(word):
    assert parse_yaml(f"- {word}").value == [word]


@pytest.mark.parametrize(
    ("word", "meant"), [("yes", True), ("true", True), ("on", True), ("no", False), ("False", False), ("off", False)]
)
def test_a_truth_value_may_be_any_word_for_it(tmp_path, word, meant):
    grid = read_grid(written(tmp_path, f"{HEAD}analysis: {word}\ntraining: {{augment: {word}}}\n"))
    assert (grid.analysis, grid.training.augment) == (meant, meant)


@pytest.mark.parametrize("empty", ["regularization:", "regularization: none", "regularization: {}", "preprocessing:"])
def test_no_regularization_can_be_said_in_several_ways(tmp_path, empty):
    grid = read_grid(written(tmp_path, f"{HEAD}{empty}\n"))
    assert grid.regularization == ((),)
    assert grid.preprocessing == (("none",) if empty == "preprocessing:" else ("standard",))


def test_what_is_nothing_anyway_is_no_setting_of_its_own_but_a_dropout_of_0_is():
    same = [{"weight_decay": 0}, "none", {"mixup": 0.0, "smoothing": 0}]
    assert Grid.from_dict({**LEAST, "regularization": same}).regularization == ((),)
    assert Grid.from_dict({**LEAST, "regularization": {"dropout": 0}}).regularization == ((("drop", 0.0),),)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text("abcé -:#'\"yesno\n", max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc:# ", min_size=1), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_pyyaml_writes_is_read_back_as_it_was(value):
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data):
            return True

    text = yaml.dump({"value": value}, Dumper=Plain, allow_unicode=True)
    assert parse_yaml(text).value == {"value": value}


@given(st.integers(1, 30), st.integers(0, 5))
def test_every_key_and_entry_has_the_line_that_it_is_written_on(keys, blank):
    text = "".join("\n" * blank + f"k{i}:\n- a\n# -\n- b\n" for i in range(keys))
    document, rows = parse_yaml(text), text.split("\n")
    for i in range(keys):
        at = rows.index(f"k{i}:") + 1
        assert [document.line(path) for path in [(f"k{i}",), (f"k{i}", 0), (f"k{i}", 1)]] == [at, at + 1, at + 3]
        assert document.line((f"k{i}", 1, "deeper")) == at + 3


def test_the_grid_in_the_documentation_is_one():
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    grid = Grid.from_dict(parse_yaml(block).value)
    assert (len(grid.cells()), grid.pretraining.epochs) == (126, 6)
    for key in grid.to_dict()["pretraining"]:
        assert f"`{key}`" in text or key in grid.training.to_dict(), key


# What is refused, and the line that it is on


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            f"{HEAD}\n# sizes\n\nbatchsizes: 8\n",
            "study.yaml, line 7: unknown key 'batchsizes'; did you mean batch_sizes?",
        ),
        (
            f"{HEAD}regularisation: none\n",
            "study.yaml, line 4: unknown key 'regularisation'; did you mean regularization?",
        ),
        (
            f"{HEAD}lr: 1\n",
            "study.yaml, line 4: unknown key 'lr'; did you mean learning_rates?",
        ),
        (
            f"{HEAD}epochs: 1\n",
            "study.yaml, line 4: unknown key 'epochs'; it goes under training",
        ),
        (
            f"{HEAD}dropout: 1\n",
            "study.yaml, line 4: unknown key 'dropout'; it goes under regularization",
        ),
        (
            f"{HEAD}training:\n  augment: true\n  epoch: 1\n",
            "study.yaml, line 6: unknown key 'epoch' under training; did you mean epochs?",
        ),
        (
            f"{HEAD}training:\n  mixup: 1\n",
            "study.yaml, line 5: unknown key 'mixup' under training; it goes under regularization",
        ),
        (
            f"{HEAD}training:\n  lr: 1\n",
            "study.yaml, line 5: unknown key 'lr' under training; it is the axis learning_rates, next to training",
        ),
        (
            f"{HEAD}training:\n  epochs: 1\n  steps: 1\n",
            "study.yaml, line 6: give epochs or steps, and not both",
        ),
        (
            f"{HEAD}training:\n  opt: sgd\n  optimizer: sgd\n",
            "study.yaml, line 6: 'optimizer' and 'opt' are the same; give one of them",
        ),
        (
            f"{HEAD}training:\n  optimizer: sgdd\n",
            "study.yaml, line 5: unknown optimizer 'sgdd'; did you mean sgd?",
        ),
        (
            f"{HEAD}training:\n  optimizer: 5\n",
            "study.yaml, line 5: optimizer=5 must be text",
        ),
        (
            f"{HEAD}training:\n  momentum: 2\n",
            "study.yaml, line 5: momentum=2 must be a number from 0 to 1",
        ),
        (
            f"{HEAD}training:\n  momentum:\n",
            "study.yaml, line 5: momentum=None must be a number from 0 to 1",
        ),
        (
            f"{HEAD}training:\n  epochs: 0\n",
            "study.yaml, line 5: epochs=0 must be a whole number of at least 1",
        ),
        (
            f"{HEAD}training:\n  judge: never\n",
            "study.yaml, line 5: judge='never' is unknown; choose one of: last, epoch",
        ),
        (
            f"{HEAD}training:\n  sched: cosin\n",
            "study.yaml, line 5: sched='cosin' is unknown; did you mean cosine?",
        ),
        (
            f"{HEAD}training:\n  scale: [1]\n",
            "study.yaml, line 5: scale=[1] must be two shares of an image, the smaller first",
        ),
        (
            f"{HEAD}training:\n  augment: maybe\n",
            "study.yaml, line 5: augment='maybe' must be True or False",
        ),
        (
            f"{HEAD}training: 8\n",
            "study.yaml, line 4: training=8 must be a mapping, such as training: {epochs: 8}",
        ),
        (
            f"{HEAD}regularization:\n- none\n- weight_deca: 1\n",
            "study.yaml, line 6: unknown regularization 'weight_deca'; did you mean weight_decay?",
        ),
        (
            f"{HEAD}regularization:\n  mixup: 0.2\n  drop: 2\n",
            "study.yaml, line 6: drop=2 must be a number from 0 to 1",
        ),
        (
            f"{HEAD}regularization:\n  drop: [0, 1]\n",
            "study.yaml, line 5: drop=[0, 1] must be a number from 0 to 1",
        ),
        (
            f"{HEAD}regularization:\n  drop: true\n",
            "study.yaml, line 5: drop=True must be a number from 0 to 1",
        ),
        (
            f"{HEAD}regularization:\n  drop: 0.1\n  dropout: 0.1\n",
            "study.yaml, line 6: 'dropout' and 'drop' are the same; give one of them",
        ),
        (
            f"{HEAD}regularization: some\n",
            "study.yaml, line 4: regularization='some' must be none or a mapping, such as {weight_decay: 5.0e-4}",
        ),
        (
            f"{HEAD}batch_sizes:\n- 8\n- eight\n",
            "study.yaml, line 6: batch_sizes='eight' must be a valid integer, unable to parse string as an integer",
        ),
        (
            f"{HEAD}batch_sizes: 0\n",
            "study.yaml, line 4: batch_sizes=0 must be greater than or equal to 1",
        ),
        (
            f"{HEAD}batch_sizes: 8.5\n",
            "study.yaml, line 4: batch_sizes=8.5 must be a valid integer, got a number with a fractional part",
        ),
        (
            f"{HEAD}batch_sizes: true\n",
            "study.yaml, line 4: batch_sizes=True must not be a flag",
        ),
        (
            f"{HEAD}batch_sizes: []\n",
            "study.yaml, line 4: batch_sizes is an empty list; give at least one value",
        ),
        (
            f"{HEAD}learning_rates: 0\n",
            "study.yaml, line 4: learning_rates=0 must be greater than 0",
        ),
        (
            f"{HEAD}learning_rates: .nan\n",
            "study.yaml, line 4: learning_rates=nan must be a finite number",
        ),
        (
            f"{HEAD}learning_rates: fast\n",
            "study.yaml, line 4: learning_rates='fast' must be a valid number, unable to parse string as a number",
        ),
        (
            f"{HEAD}seeds: 0\n",
            "study.yaml, line 4: seeds=0 must be a count, 1 to 10000, or a list of seeds",
        ),
        (
            f"{HEAD}seeds: [0, -1]\n",
            "study.yaml, line 4: seeds=-1 must be greater than or equal to 0",
        ),
        (
            f"{HEAD}activations: relo\n",
            "study.yaml, line 4: unknown activation 'relo'; did you mean relu?",
        ),
        (
            f"{HEAD}preprocessing: zca2\n",
            "study.yaml, line 4: unknown pre-processing 'zca2'; did you mean zca?",
        ),
        (
            f"{HEAD}start: convert\n",
            "study.yaml, line 4: unknown start 'convert'; did you mean converted?",
        ),
        (
            f"{HEAD}start:\n- scratch\n- converted\n",
            "study.yaml, line 4: start: converted starts from trained weights, and there are none of resnet8; "
            "add pretraining: {epochs: 8}, which trains them, or give a file of weights as the model",
        ),
        (
            f"{HEAD}start: scratch\npretraining: {{epochs: 8}}\n",
            "study.yaml, line 5: pretraining trains the networks that start: converted starts from, and no cell "
            "does; try start: [scratch, converted], or leave it out",
        ),
        (
            f"{CONVERTED}pretraining: 8\n",
            "study.yaml, line 5: pretraining=8 must be a mapping, such as pretraining: {epochs: 8}",
        ),
        (
            f"{CONVERTED}pretraining:\n  epoch: 8\n",
            "study.yaml, line 6: unknown key 'epoch' under pretraining; did you mean epochs?",
        ),
        (
            f"{CONVERTED}pretraining:\n  lr: 0.1\n",
            "study.yaml, line 6: unknown key 'lr' under pretraining; did you mean learning_rate?",
        ),
        (
            f"{CONVERTED}pretraining:\n  image_size: 8\n",
            "study.yaml, line 6: unknown key 'image_size' under pretraining; all networks of a study share that "
            "of training",
        ),
        (
            f"{CONVERTED}pretraining:\n  weight_decay: 0.1\n",
            "study.yaml, line 6: unknown key 'weight_decay' under pretraining; it goes under regularization",
        ),
        (
            f"{CONVERTED}pretraining:\n  regularization:\n    drop: 2\n",
            "study.yaml, line 7: drop=2 must be a number from 0 to 1",
        ),
        (
            f"{CONVERTED}pretraining:\n  learning_rate: 0\n",
            "study.yaml, line 6: learning_rate=0 must be a number above 0",
        ),
        (
            f"{CONVERTED}pretraining:\n  epochs: 8\n  steps: 8\n",
            "study.yaml, line 7: give epochs or steps, and not both",
        ),
        (
            f"{CONVERTED}pretraining:\n  optimizer: sgdd\n",
            "study.yaml, line 6: unknown optimizer 'sgdd'; did you mean sgd?",
        ),
        (
            f"{HEAD}analysis: 2\n",
            "study.yaml, line 4: analysis=2 must be a valid boolean, unable to interpret input",
        ),
        (
            f"{HEAD}name: a/b\n",
            "study.yaml, line 4: name='a/b' must do as a folder's name: at most 100 characters, without slashes",
        ),
        (
            "models: resnet8\nnorms:\n- bn\n- xyz\ndatasets: digits\n",
            "study.yaml, line 4: unknown norm 'xyz'; choose one of: bn, gn, ln, ln2d, in, rms, rms2d, affine, fold",
        ),
        (
            "models: resnet8\nnorms: [bn,\n  ln:4]\ndatasets: digits\n",
            "study.yaml, line 3: norm 'ln:4': only gn takes a number of groups; try ln, or gn:4",
        ),
        (
            "models: resnet8\nnorms: gn:0\ndatasets: digits\n",
            "study.yaml, line 2: norm 'gn:0': the groups must be a whole number, at least 1, as in gn:8",
        ),
        (
            "models: resnet8\nnorms:\n- gn: 8\ndatasets: digits\n",
            "study.yaml, line 3: norm {'gn': 8}: write gn:8, without a space",
        ),
        (
            "models: resnet8\nnorms:\ndatasets: digits\n",
            "study.yaml, line 2: unknown norm None; choose one of: bn, gn, ln, ln2d, in, rms, rms2d, affine, fold",
        ),
        (
            "models: 18\nnorms: gn\ndatasets: digits\n",
            "study.yaml, line 1: models=18 must be a valid string; put it in quotes",
        ),
        (
            "# nothing else\nnorms: gn\n",
            "study.yaml, line 2: the key 'models' is missing; add it, as in models: [resnet8]",
        ),
        (
            "- models\n",
            "study.yaml, line 1: a study is a mapping with the keys models, norms, datasets, …, and this is a list",
        ),
        (
            f"{HEAD}models: resnet14\n",
            "study.yaml, line 4: the key 'models' comes twice; it is on line 1 already",
        ),
        (
            f"{HEAD}training:\n  epochs: 1\n  epochs: 2\n",
            "study.yaml, line 6: the key 'epochs' comes twice; it is on line 5 already",
        ),
        (
            f"{HEAD}training:\n\tepochs: 1\n",
            "study.yaml, line 5: not YAML: there is a tab; indent with spaces",
        ),
        (
            "models: [resnet8\nnorms: gn\n",
            "study.yaml, line 2: not YAML: while parsing a flow sequence from line 1 on: expected ',' or ']', "
            "but got ':'",
        ),
        (
            "models: a: b\n",
            "study.yaml, line 1: not YAML: mapping values are not allowed here",
        ),
        (
            f"{HEAD}title: \x07\n",
            "study.yaml, line 4: not YAML: the character U+0007 is not allowed",
        ),
        (
            f"{HEAD}title: !!python/object/apply:os.system [echo]\n",
            "study.yaml, line 4: the tag tag:yaml.org,2002:python/object/apply:os.system is not read here; leave "
            "it out",
        ),
        (
            "models: &m resnet8\nnorms: *m\n",
            "study.yaml, line 1: anchors and aliases (& and *) are not read here; write the value out",
        ),
        (
            "",
            "study.yaml is empty; a study has at least models, norms and datasets",
        ),
        (
            "# nothing\n",
            "study.yaml is empty; a study has at least models, norms and datasets",
        ),
        (
            "[" * 3000,
            "study.yaml is nested too deeply; simplify it",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_line_number(tmp_path, text, error):
    assert error_of(tmp_path, text) == error


def test_an_unknown_key_without_a_near_one_gets_all_of_them(tmp_path):
    assert error_of(tmp_path, f"{HEAD}xyzzy: 1\n") == (
        "study.yaml, line 4: unknown key 'xyzzy'; choose one of: models, norms, datasets, batch_sizes, activations, "
        "preprocessing, regularization, learning_rates, start, seeds, training, pretraining, analysis, "
        "keep_checkpoints, name, title"
    )


def test_an_enormous_grid_is_refused_with_its_product(tmp_path):
    text = f"{HEAD}batch_sizes: [1, 2, 4]\nactivations: [relu, silu]\nseeds: 2000\n"
    assert error_of(tmp_path, text) == (
        "study.yaml, line 1: the grid has 2 activations × 3 batch sizes × 2000 seeds = 12,000 cells, more than 10,000; "
        "shorten an axis"
    )
    assert refused(seeds=10**18) == f"seeds={10**18} must be a count, 1 to 10000, or a list of seeds"


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    missing = tmp_path / "no.yaml"
    with pytest.raises(UsageError, match=rf"^there is no file {missing}; give a YAML file$"):
        read_grid(missing)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(
        UsageError, match=r"pipe.yaml is no regular file \(a pipe, a socket or a device\); give a YAML f"
    ):
        read_grid(tmp_path / "pipe.yaml")
    with pytest.raises(UsageError, match=rf"^{tmp_path} is a folder; give a YAML file, such as {tmp_path}/"):
        read_grid(tmp_path)
    with pytest.raises(UsageError, match=r"^a\x00b cannot be read \(embedded null byte\)$"):
        read_grid("a\0b")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"models: a\nnorms: \xff\xfe\n")
    with pytest.raises(UsageError, match=rf"^{binary}, line 2: not a text in UTF-8; is it the right file\?$"):
        read_grid(binary)
    binary.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match=rf"^{binary} has more than 1,000,000 bytes; is it the right file\?$"):
        read_grid(binary)


def test_a_file_from_windows_is_read(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode() + b"batch_sizes: 0\r\n")
    with pytest.raises(UsageError, match=r", line 4: batch_sizes=0 must be greater than or equal to 1$"):
        read_grid(path)


@given(st.text("models: [bn]{},&*!|>'\"%@`\t\n-#?gnlr0.", max_size=60))
def test_any_text_is_a_grid_or_one_line(text):
    said = "a grid"
    try:
        Grid.from_dict(parse_yaml(text).value)
    except UsageError as error:
        said = str(error)
    assert re.fullmatch(r"[^\n]+", said)


@given(
    st.sampled_from(sorted({*Grid.model_fields} - {"title", "name"})),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key, value):
    said = "a grid"
    try:
        assert Grid.from_dict({**LEAST, key: value}).cells()
    except UsageError as error:
        said = str(error)
    assert re.fullmatch(r"[^\n]+", said)


# A grid in Python


def test_a_dict_makes_the_same_grid_and_its_errors_have_no_line():
    assert refused(batchsizes=8) == "unknown key 'batchsizes'; did you mean batch_sizes?"
    with pytest.raises(UsageError, match=r"^the key 'norms' is missing; add it, as in norms: \[bn, gn\]$"):
        Grid.from_dict({"models": "resnet8", "datasets": "digits"})
    with pytest.raises(UsageError, match=r"^batch_sizes=0 must be greater than or equal to 1$"):
        Grid(**LEAST, batch_sizes=0)
    assert Grid(models="resnet8", norms=["gn"], datasets="digits") == Grid.from_dict(LEAST)


def test_a_grid_is_frozen_and_a_changed_one_is_checked_again():
    grid = Grid.from_dict(LEAST)
    with pytest.raises(ValidationError, match="Instance is frozen"):
        grid.norms = ("bn",)
    assert grid.replace(norms="bn").norms == ("bn",)
    with pytest.raises(UsageError, match=r"^unknown norm 'bm'; did you mean bn\?$"):
        grid.replace(norms="bm")


@given(
    st.lists(st.sampled_from(["bn", "gn", "ln", "gn:4", "gn:08"]), min_size=1),
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.lists(st.sampled_from(["none", {"mixup": 0.2}, {"dropout": 0.5, "weight_decay": 1e-4}]), min_size=1, max_size=3),
    st.integers(1, 4) | st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
    st.sampled_from([{}, {"steps": 7}, {"optimizer": "adamw", "scale": [0.5, 1]}, {"lr_batch_size": None}]),
    st.sampled_from([None, {}, {"epochs": 2}, {"steps": 9, "opt": "sgd", "regularization": {"drop": 0.1}}]),
)
def test_a_grid_survives_json_and_yaml(norms, sizes, regularization, seeds, training, pretraining):
    grid = Grid.from_dict(
        {
            **LEAST,
            "norms": norms,
            "batch_sizes": sizes,
            "regularization": regularization,
            "seeds": seeds,
            "training": training,
            "start": "scratch" if pretraining is None else ["random", "converted"],
            "pretraining": pretraining,
        }
    )
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid
    assert Grid.from_dict(parse_yaml(yaml.safe_dump(grid.to_dict())).value) == grid
    cells = grid.cells()
    assert [Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) for cell in cells] == list(cells)


# Its cells


def test_the_cells_are_every_combination_once_the_seeds_fastest():
    grid = Grid.from_dict(
        {
            **LEAST,
            "norms": ["bn", "gn:8", "bn"],
            "batch_sizes": [8, 64, 8],
            "seeds": [5, 1],
            "learning_rates": [0.1, 0.2],
        }
    )
    expected = [
        (size, rate * size / 32, norm, seed)
        for size, rate, norm, seed in itertools.product([8, 64], [0.1, 0.2], ["bn", "gn:8"], [5, 1])
    ]
    found = [(cell.batch_size, cell.lr, cell.norm, cell.seed) for cell in grid.cells()]
    assert found == [(size, pytest.approx(lr, rel=1e-12), norm, seed) for size, lr, norm, seed in expected]
    assert len({cell.key for cell in grid.cells()}) == 16
    assert grid.cells() == grid.cells()


def test_every_axis_of_the_grid_reaches_its_own_field_of_a_cell():
    values = {
        "models": "resnet14",
        "datasets": "fashion-mnist",
        "start": "converted",
        "activations": "silu",
        "preprocessing": "zca",
        "regularization": {"drop": 0.1},
        "batch_sizes": 16,
        "learning_rates": 0.3,
        "norms": "rms",
        "seeds": [9],
        "training": {"lr_batch_size": None},
        "pretraining": {"epochs": 2},
    }
    (cell,) = Grid.from_dict(values).cells()
    assert cell == Cell("resnet14", "fashion-mnist", "converted", "silu", "zca", (("drop", 0.1),), 16, 0.3, "rms", 9)
    assert len(AXES) == 10


def test_a_pretraining_is_as_the_training_but_for_what_it_says():
    training = {"steps": 20, "optimizer": "adamw", "image_size": 16, "test_images": 50, "judge": "epoch"}
    values = {**LEAST, "start": "converted", "training": training}
    grid = Grid.from_dict({**values, "pretraining": {"epochs": 3, "dataset": "fashion-mnist"}})
    assert (grid.pretraining.epochs, grid.pretraining.steps) == (3, None)
    beneath = grid.of_originals()
    assert (beneath.training.opt, beneath.training.image_size, beneath.training.test_images) == ("adamw", 16, 50)
    assert (beneath.training.judge, beneath.analysis, beneath.start) == ("last", False, ("scratch",))
    same = Grid.from_dict({**values, "pretraining": {}})
    assert same.of_originals().training == same.training.replace(judge="last")
    assert Grid.from_dict({**values, "pretraining": {"optimizer": "sgd"}}).pretraining.opt == "sgd"


def test_every_norm_rate_and_batch_size_starts_from_one_network():
    axes = {"norms": ["bn", "gn"], "learning_rates": [0.1, 0.2], "batch_sizes": [8, 64], "seeds": [4, 9]}
    pretraining = {"learning_rate": 0.05, "batch_size": 64, "regularization": {"weight_decay": 5e-4}}
    grid = Grid.from_dict({**LEAST, **axes, "start": "converted", "pretraining": pretraining})
    assert list(dict.fromkeys(grid.original(cell) for cell in grid.cells())) == [
        Cell("resnet8", "digits", regularization=(("weight_decay", 5e-4),), batch_size=64, lr=0.1, seed=seed)
        for seed in (4, 9)
    ]


def test_a_file_of_weights_is_not_trained_before_it_is_converted(tmp_path):
    file = tmp_path / "bn.safetensors"
    file.touch()
    text = f"models:\n- resnet8\n- {file}\nnorms: gn\ndatasets: digits\nstart: converted\npretraining: {{epochs: 8}}\n"
    assert error_of(tmp_path, text) == (
        f"study.yaml, line 3: {file} is a file of trained weights, and pretraining starts from random ones; leave "
        "pretraining out, or name the network"
    )


def test_two_names_of_one_thing_are_one_cell():
    grid = Grid.from_dict({**LEAST, "activations": ["swish", "silu"], "norms": ["gn:8", "gn:08"], "seeds": 1})
    assert [(cell.activation, cell.norm) for cell in grid.cells()] == [("silu", "gn:8")]


@given(st.floats(1e-6, 10), st.integers(1, 4096), st.none() | st.integers(1, 4096))
def test_the_learning_rate_is_linear_in_the_batch_size(lr, size, base):
    grid = Grid.from_dict({**LEAST, "learning_rates": lr, "batch_sizes": size, "training": {"lr_batch_size": base}})
    assert grid.cells()[0].lr == pytest.approx(lr if base is None else lr * size / base, rel=1e-12)


@pytest.mark.parametrize(
    "training", [{}, {"steps": 20}, {"epochs": 3, "optimizer": "lamb", "augment": True, "aa": "rand"}]
)
def test_the_settings_of_a_cell_are_settings_of_fine_tuning(training):
    grid = Grid.from_dict({**LEAST, "regularization": {"smoothing": 0.1, "dropout": 0.2}, "training": training})
    cell = grid.cells()[1]
    settings = FinetuneConfig(**grid.settings_for(cell))
    assert (settings.batch_size, settings.lr, settings.seed) == (32, 0.1, 1)
    assert (settings.weight_decay, settings.smoothing, settings.drop, settings.drop_path) == (0, 0.1, 0.2, None)
    assert (settings.ce, settings.kl, settings.features) == (1, 0, 0)
    assert settings.steps == training.get("steps")
    assert settings.epochs == training.get("epochs", 5 if "steps" in training else 8)
    assert settings.opt == training.get("optimizer", "sgd")
    assert settings.augment == training.get("augment", False)


def test_weight_decay_is_what_the_regularization_says():
    grid = Grid.from_dict({**LEAST, "regularization": ["none", {"weight_decay": 5e-4}], "seeds": 1})
    assert [grid.settings_for(cell)["weight_decay"] for cell in grid.cells()] == [0, 5e-4]


@pytest.mark.parametrize(
    ("regularization", "size", "training", "reason"),
    [
        ({"mixup": 0.2}, 1, {}, "mixup mixes pairs of images, and batch_size=1 is odd; try an even one"),
        ({"cutmix": 0.2}, 7, {}, "cutmix mixes pairs of images, and batch_size=7 is odd; try an even one"),
        ({"distance": 0.1}, 1, {}, "distance compares the images of a batch, and batch_size=1; try 2 or more"),
        ({"reprob": 0.25}, 8, {}, "reprob=0.25 is a part of the augmentation; try augment: true"),
        ("none", 64, {"train_images": 32}, "batch_size=64 is more than train_images=32; try a smaller batch"),
        ("none", 1, {}, None),
        ({"mixup": 0.2, "distance": 0.1}, 2, {"train_images": 2}, None),
        ({"reprob": 0.25, "drop": 0.1}, 7, {"augment": True}, None),
    ],
)
def test_a_cell_that_cannot_be_run_says_why(regularization, size, training, reason):
    values = {**LEAST, "regularization": regularization, "batch_sizes": size, "training": training}
    grid = Grid.from_dict(values)
    assert [grid.impossible(cell) for cell in grid.cells()] == [reason] * 3


# The names


def test_the_names_are_those_of_the_libraries():
    from timm.layers import get_act_layer
    from timm.optim import list_optimizers

    for name in {*names.ACTIVATIONS, *names.ALIASES} - {"default", "leakyrelu", "random"}:
        assert get_act_layer(name) is get_act_layer(names.ALIASES.get(name, name)), name
    assert set(names.OPTIMIZERS) <= set(list_optimizers())
    assert set(names.NORMS) == {"bn", *TARGET_NAMES}
    with pytest.raises(UsageError, match=r"^unknown optimizer 'nadamv'; did you mean nadam\?$"):
        Training(opt="nadamv")
    assert Training(opt="adopt").settings()["opt"] == "adopt"  # which only timm knows


@pytest.mark.system
def test_a_grid_is_read_without_torch(tmp_path):
    path = written(tmp_path, WHOLE)
    code = (
        "import sys; from normsurgeon.study.grid import read_grid; grid = read_grid(sys.argv[1]); "
        "[grid.impossible(cell) for cell in grid.cells()]; grid.settings_for(grid.cells()[0]); "
        "print(len(grid.cells()), [name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("108 []", "")
