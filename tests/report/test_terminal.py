"""The terminal summary at 80 columns, as a build log sees it."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from qpass.report.model import FloatOp, Report
from qpass.report.terminal import MAX_LEFTOVERS, print_summary, print_table

WIDTH = 80
MARKUP = "block[red]/conv[/red]"


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=WIDTH, force_terminal=terminal, _environ={})


def text_of(made: Console) -> str:
    assert isinstance(made.file, io.StringIO)
    return made.file.getvalue()


def summary(report: Report) -> str:
    made = console()
    print_summary(report, made)
    return text_of(made)


def squeezed(text: str) -> str:
    """Undo the folding of lines."""
    return re.sub(r"\s+", " ", text)


def with_float_ops(report: Report, ops: tuple[FloatOp, ...]) -> Report:
    return replace(report, engines=(replace(report.engines[0], float_ops=ops),))


def test_the_verdict_comes_first(report: Report) -> None:
    assert summary(report).startswith("REJECTED models/small.int8.rejected.onnx\n")
    passed = replace(report, gates=(), output="out.onnx")
    assert summary(passed).startswith("OK out.onnx\n")


def test_nothing_is_wider_than_the_terminal(report: Report) -> None:
    lines = summary(report).splitlines()
    assert len(lines) > 40
    assert max(map(len, lines)) <= WIDTH


def test_numbers_have_units(report: Report) -> None:
    text = squeezed(summary(report))
    for part in (
        "3.8 MiB -> 1015.6 KiB (0.26x)",
        "7 of 8",
        "12.34 -> 4.56 ms",
        "2.71x",
        "31.2 dB",
        "0.999612",
        "44.5 dB",
        "12.50 s (load 0.50 s, calibrate 4.00 s, quantize 2.00 s, verify 6.00 s)",
        "float forward 1.75 s",
        "peak memory 512.0 MiB",
        "128 samples",
        "accuracy: 0.981 -> 0.978 (drop 0.003)",
    ):
        assert part in text, part


def test_float_leftovers_are_grouped_and_named_with_their_reason(report: Report) -> None:
    text = squeezed(summary(report))
    assert "ort: 6 Softmax (ort-x86 has no integer kernel): Softmax stays in float" in text
    assert "/encoder/layers.2/attn/Softmax and 3 more" in text
    assert "layers.3/attn/Softmax" not in text


def test_engines_that_agree_share_a_row(report: Report) -> None:
    ops = report.engines[0].float_ops
    both = replace(
        report, engines=(report.engines[0], replace(report.engines[1], float_ops=ops[:4]))
    )
    text = squeezed(summary(both))
    assert "ort, openvino: 4 Softmax" in text
    assert "ort: 2 Softmax" in text


def test_reasons_that_differ_in_a_name_or_number_share_a_row(report: Report) -> None:
    ops = tuple(
        FloatOp(node=node, op="Add", rule="r", reason=reason)
        for node, reason in (
            ("a", "input 0 (x_1) is float"),
            ("b", "input 1 (x_2) is float"),
            ("c", "input 0 (x_1) is not float"),
        )
    )
    text = squeezed(summary(with_float_ops(report, ops)))
    assert "ort: 2 Add (r): input 0 (x_1) is float; and the like a, b" in text
    assert "ort: 1 Add (r): input 0 (x_1) is not float c" in text


def test_long_paths_are_not_wrapped(report: Report) -> None:
    path = "a folder with a long name/" * 6 + "model.onnx"
    lines = summary(replace(report, model=path, output=path)).splitlines()
    assert lines[:2] == [f"REJECTED {path}", f"from {path}"]


def test_what_was_planned_in_integers_comes_first(report: Report) -> None:
    text = summary(report)
    assert text.index("PLANNED IN INTEGERS") < text.index("6 Softmax")


def test_many_reasons_are_capped_and_point_to_the_json(report: Report) -> None:
    ops = tuple(
        FloatOp(node=f"node_{index}", op="Gelu", rule=f"rule {index:02}", reason="no kernel")
        for index in range(MAX_LEFTOVERS + 5)
    )
    text = summary(with_float_ops(report, ops))
    assert text.count("no kernel") == MAX_LEFTOVERS
    assert "and 5 more reasons: see report.json" in text


def test_without_leftovers_there_is_no_such_heading(report: Report) -> None:
    assert "Left in float" in summary(report)
    assert "Left in float" not in summary(with_float_ops(report, ()))


def test_names_are_not_markup(report: Report) -> None:
    """Coloured or not, `[red]` is part of a name."""
    made = console(terminal=True)
    print_summary(report, made)
    assert MARKUP in re.sub(r"\x1b\[[\d;]*m", "", text_of(made))
    assert MARKUP in summary(report)


def test_escape_sequences_in_names_do_not_reach_the_terminal(report: Report) -> None:
    op = FloatOp(node="a\x1b[2Jb", op="Conv", rule="r", reason="why")
    text = summary(with_float_ops(report, (op,)))
    assert "\x1b" not in text
    assert "a\\x1b[2Jb" in text


def test_the_worst_layers_are_listed_with_unknown_and_equal_ones_told_apart(
    report: Report,
) -> None:
    text = summary(report)
    shown = text[text.index("Worst layers") : text.index("Rounds of repair")]
    assert MARKUP in shown
    assert "layers.5" in shown
    assert "layers.0" not in shown  # 36 dB is among the best
    layer = replace(report.layers[6], sqnr_db_before=float("-inf"))
    unknown = replace(report.layers[6], sqnr_db_after=float("nan"))
    many = summary(replace(report, layers=(*report.layers, unknown)))
    assert many.index(unknown.name) < many.index("layers.5/")
    alone = squeezed(summary(replace(report, layers=(layer,))))
    assert "broken exact" in alone


def test_notes_in_capitals_are_shouted(report: Report) -> None:
    text = summary(report)
    assert "  ! RANDOM DATA: accuracy means nothing\n" in text
    assert "  the mse ranges won the trial\n" in text


def test_gates_rounds_and_refusals_are_told(report: Report) -> None:
    text = squeezed(summary(report))
    assert "min-sqnr 30.00 31.25 passed" in text
    assert "min-speedup 2.00 - FAILED" in text
    assert "ort: planned ops in integers all 1 in float FAILED" in text
    assert "round 1: 1 node goes to float" in text
    assert "compensate 7 1 1.50 s" in text


def test_the_weakest_of_several_outputs_is_named(report: Report) -> None:
    assert "ort: logits 31.2 dB" in summary(report)


def test_an_output_of_unknown_sqnr_is_the_weakest_wherever_it_stands(report: Report) -> None:
    outputs = (("boxes", 35.0), ("scores", float("nan")))
    for order in (outputs, outputs[::-1]):
        engine = replace(report.engines[0], outputs=order)
        assert "ort: scores -\n" in summary(replace(report, engines=(engine,)))


def test_a_bare_report_prints(report: Report) -> None:
    bare = replace(
        report, engines=(), layers=(), gates=(), passes=(), notes=(), rounds=(), metric=None
    )
    text = summary(bare)
    assert "Engines" not in text
    assert "Cost: 12.50 s" in text


def test_table_folds_long_cells_and_cuts_nothing() -> None:
    made = console()
    name = "x" * 200
    print_table(made, "Things [b]", ("name", "count"), [(name, "3"), ("[i]y[/i]", "12")])
    text = text_of(made)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("x") == 200
    assert "Things [b]" in text
    assert "[i]y[/i]" in text


def test_table_puts_quantities_on_the_right() -> None:
    made = console()
    print_table(made, "", ("thing", "time"), [("short", "3.00 s"), ("long", "12.00 s")])
    ends = {line.rstrip() for line in text_of(made).splitlines()}
    assert {"short   3.00 s", "long   12.00 s"} <= ends


def test_table_without_rows_shows_its_columns() -> None:
    made = console()
    print_table(made, "Nothing", ("name", "why"), [])
    assert "name" in text_of(made)
