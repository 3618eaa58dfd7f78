"""Options, precisions and recipe files: what is taken, and what is refused with a way out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from qpass.api import make_options
from qpass.errors import RecipeError
from qpass.options import TUNE_STEPS, Options, parse_bytes
from qpass.program import Policy, Precision
from qpass.recipe import read_recipe


@pytest.mark.parametrize(
    ("text", "number"),
    [("17", 17), ("2GiB", 2 << 30), ("1.5 KiB", 1536), ("3mb", 3_000_000), ("2kB", 2000),
     ("1TiB", 1 << 40), (" 5 B ", 5)],
)  # fmt: skip
def test_bytes(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "2 PiB", "-1", "1e9", "2GiB!"])
def test_bytes_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "weight", "activation", "simulated"),
    [("w8a8", 8, 8, False), ("w8", 8, None, False), ("w4", 4, None, False), ("w4a8", 4, 8, True),
     ("w8a16", 8, 16, True), ("w6a6", 6, 6, True), ("w6a8", 6, 8, False), ("w2a2", 2, 2, True)],
)  # fmt: skip
def test_precision(text: str, weight: int, activation: int | None, simulated: bool) -> None:
    found = Precision.parse(text)
    assert (found.weight, found.activation, found.simulated) == (weight, activation, simulated)
    assert str(found) == text


@pytest.mark.parametrize("text", ["int8", "w8a", "a8", "w1a8", "w9", "w8a17", "w8a1", "W8A8", ""])
def test_precision_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        Precision.parse(text)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"holdout": 1.0}, "--holdout 1.0"),
        ({"holdout": -0.5}, "--holdout -0.5"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_drop": 1.0}, "--max-drop needs --eval"),
        ({"memory": "lots"}, "'lots'"),
        ({"memory": "0"}, "--memory 0 is less than 16MiB"),
        ({"memory": "1KiB"}, "--memory 1KiB is less"),
        ({"jobs": -1}, "--jobs -1"),
        ({"jobs": 100_000}, "--jobs 100000 is not 0 to 1024"),
        ({"seed": -1}, "--seed -1"),
        ({"min_sqnr": math.nan}, "--min-sqnr nan"),
        ({"min_sqnr": math.inf}, "--min-sqnr inf"),
        ({"min_speedup": math.nan}, "--min-speedup nan"),
        ({"min_speedup": 0.0}, "--min-speedup 0.0"),
        ({"max_drop": math.nan, "eval": "a:b"}, "--max-drop nan"),
        ({"max_drop": -1.0, "eval": "a:b"}, "--max-drop -1.0"),
        ({"static_norm": math.nan}, "--static-norm nan"),
        ({"precision": "W4A8"}, "write w4a8"),
        ({"precision": "int8"}, "'int8'"),
        ({"round": "nearest"}, "--round nearest"),
        ({"weight_range": "sigma"}, "--weight-range sigma"),
        ({"round": "mse", "weight_range": "percentile"}, "--round rtn --weight-range percentile"),
        ({"row_weights": "loss"}, "--row-weights loss"),
        ({"round": "rtn", "row_weights": "gradient"}, "--round rtn looks at no rows"),
        ({"mixed_cost": "watts", "mixed": True, "min_sqnr": 1.0}, "--mixed-cost watts"),
        ({"mixed_cost": "latency", "min_sqnr": 1.0}, "--mixed-cost latency is for --mixed"),
        ({"sampels": 3}, "no option sampels"),
    ],
)
def test_options_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_options(**options)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"precision": "w4", "activations": "dynamic"}, "--activations dynamic"),
        ({"precision": "w4", "calibrate": "entropy"}, "--calibrate entropy"),
        ({"precision": "w8", "stats": "s.npz"}, "--stats"),
        ({"precision": "w4", "tune": 100}, "--tune 100"),
        ({"precision": "w4", "tune": 100, "round": "mse"}, "--tune 100"),
        ({"precision": "w4", "compensate": "qwt"}, "--compensate qwt"),
        ({"precision": "w4", "fit": "mm"}, "--fit mm"),
        ({"precision": "w4", "allow_runtime_ops": True}, "--allow-runtime-ops"),
        ({"iterations": 50}, "--iterations 50"),
        ({"iterations": 50, "round": "unit"}, "--iterations 50"),
        ({"accuracy_level": 0}, "--accuracy-level 0"),
        ({"low_bit_edges": True}, "--low-bit-edges"),
        ({"low_bit_edges": True, "precision": "w8"}, "--low-bit-edges"),
        ({"low_bit_edges": True, "precision": "w8a16"}, "--low-bit-edges"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=f"{what} has no effect") as caught:
        make_options(**options)
    assert f"or leave {what} out" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "dynamic", "calibrate": "entropy"},
        {"precision": "w4", "round": "gptq", "tune": 100, "compensate": "qwt", "fit": "mm"},
        {"precision": "w4", "compensate": "none", "tune": 0},  # nothing is what comes of it
        {"precision": "w4a4", "activations": "dynamic"},  # stem and head have 8 bits
        {"round": "adaround", "iterations": 50},
        {"precision": "w4", "accuracy_level": 0},
        {"bits": ("a=w4",), "accuracy_level": 0},
        {"precision": "w8a4", "low_bit_edges": True},
        {"precision": "w7", "low_bit_edges": True},
    ],
)
def test_options_with_an_effect_are_taken(options: dict[str, Any]) -> None:
    make_options(**options)


def test_integer_activations_of_a_node_need_a_run_that_has_some() -> None:
    with pytest.raises(RecipeError, match="a is to have w8a8, and --precision w4 leaves all"):
        make_options(precision="w4", bits=("a=w8a8",))


def test_the_command_line_may_bring_what_a_recipe_needs(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("low-bit-edges = true\nblock-size = 64\nmixed = true\n")
    found = make_options(path, precision="w4", min_sqnr=20.0)
    assert (found.low_bit_edges, found.block_size, found.mixed) == (True, 64, True)
    with pytest.raises(RecipeError, match="--block-size is for weights alone"):
        make_options(path)


def test_none_is_the_default() -> None:
    assert make_options(target=None, samples=None) == Options()


def test_recipe_then_explicit_options(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('target = "openvino"\nbatch-size = 4\nkeep = ["a*"]\nmin_sqnr = 20\n')
    found = make_options(path, batch_size=2)
    assert (found.target, found.batch_size, found.keep) == ("openvino", 2, ("a*",))
    assert found.min_sqnr == 20.0
    assert read_recipe(path).keys() == {"target", "batch_size", "keep", "min_sqnr"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("colour = 3", "recipe key colour"),
        ('samples = "many"', "recipe key samples"),
        ('activations = "sometimes"', "recipe key activations"),
        ("samples = ", "cannot read the recipe"),
        ('keep = "f.0"', r'a list of strings is wanted(.|\n)*write keep = \["f\.0"\]'),
        ("bits = [1]", "recipe key bits.0: a list of strings is wanted"),
        ("min-sqnr = 1\nmin_sqnr = 2", "min-sqnr and min_sqnr, which is one option"),
        ('data = "x.npz"', "recipe key data(.|\\n)*--data on the command line"),
        ('output = "q.onnx"', "recipe key output(.|\\n)*-o on the command line"),
    ],
)
def test_recipe_refused(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=what) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


def test_a_recipe_error_lists_the_keys_only_where_they_help(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('samples = "many"')
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert "mixed_cost" not in str(caught.value)
    path.write_text("colour = 3")
    with pytest.raises(RecipeError, match="mixed_cost"):
        read_recipe(path)


def test_recipe_value_out_of_range_is_a_recipe_error(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("samples = 0")
    with pytest.raises(RecipeError, match="--samples 0"):
        read_recipe(path)


def test_a_recipe_may_call_engines_as_the_command_line_does(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('engine = ["ort"]\n')
    assert make_options(recipe).engines == ("ort",)
    recipe.write_text('engine = ["ort"]\nengines = ["openvino"]\n')
    with pytest.raises(RecipeError, match="which is one option"):
        make_options(recipe)


def test_recipe_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe(tmp_path / "none.toml")


def test_every_option_can_stand_in_a_recipe(tmp_path: Path) -> None:
    lines = []
    for field in dataclasses.fields(Options):
        value = "w4" if field.name == "precision" else field.default  # what `block_size` needs
        if value is None:
            value = {
                "min_sqnr": 1.0,
                "max_drop": 1.0,
                "min_speedup": 1.0,
                "block_size": 32,
                "tune": 300,
                "static_norm": 0.98,
                "activation_scales": "",
            }.get(field.name, "a:b")
        shown = list(value) if isinstance(value, tuple) else value
        lines.append(
            f"{field.name} = {str(shown).lower() if isinstance(shown, bool) else repr(shown)}"
        )
    path = tmp_path / "all.toml"
    path.write_text("\n".join(lines))
    assert read_recipe(path).keys() == {field.name for field in dataclasses.fields(Options)}


def test_policy_names_the_reason_to_keep() -> None:
    policy = Policy(
        precision=Precision(weight=8, activation=8),
        keep=("/head/*", "a[0]"),
        float_nodes={"/head/b": "by hand"},
    )
    assert policy.reason_to_keep("/head/b") == "by hand"
    assert policy.reason_to_keep("/head/c") == "user: --keep /head/*"
    assert policy.reason_to_keep("a[0]") == "user: --keep a[0]"  # a name is no pattern first
    assert policy.reason_to_keep("/Head/c") is None


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 0),
        ({"round": "unit"}, 0),
        ({"round": "adaround"}, TUNE_STEPS),
        ({"round": "adaround", "tune": 0}, 0),
        ({"round": "adaround", "tune": 7}, 7),
        ({"tune": 7}, 7),
    ],
)
def test_tuning_comes_with_what_learns(options: dict[str, Any], steps: int) -> None:
    assert Options(**options).tune_steps == steps


def test_a_value_that_no_run_can_meet_is_looked_for_in_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("samples = 0\n")
    with pytest.raises(RecipeError, match="--samples 0 is not positive") as caught:
        make_options(path)
    assert str(path) in str(caught.value)
