"""Which compiled form of a stage serves which shapes, with strings in place of compiled models."""

from __future__ import annotations

import pytest

from ditc.runtime.sessions.compiled_shapes import (
    MOST_BYTES,
    MOST_FORMS,
    PAYS_AFTER_RUNS,
    CompiledShapes,
    Shapes,
    most_forms,
)

A, B, C = ((1, 4),), ((2, 4),), ((3, 4),)


@pytest.fixture
def compiled() -> list[Shapes | None]:
    return []


@pytest.fixture
def forms(compiled: list[Shapes | None]) -> CompiledShapes[Shapes | str]:
    def compile_it(shapes: Shapes | None) -> Shapes | str:
        compiled.append(shapes)
        return shapes or "dynamic"

    return CompiledShapes(compile_it, most=2)


def test_each_shape_is_compiled_once_and_further_shapes_share_one_dynamic_form(
    forms: CompiledShapes[Shapes | str], compiled: list[Shapes | None]
) -> None:
    found = [forms.find(shapes) for shapes in (A, B, A, B, C, C, A)]
    assert found == [A, B, A, B, "dynamic", "dynamic", A]
    assert compiled == [A, B, None]


def test_a_form_that_ran_only_once_gives_way_and_two_shapes_do_not_take_turns_for_ever(
    compiled: list[Shapes | None],
) -> None:
    forms = CompiledShapes(lambda shapes: compiled.append(shapes) or shapes or "dynamic", most=1)
    found = [forms.find(shapes) for shapes in (A, B, A, B, A, B)]
    assert found == [A, B, A, "dynamic", A, "dynamic"]
    assert compiled == [A, B, A, None]


def test_a_shape_that_keeps_coming_takes_the_place_of_the_one_unused_for_longest(
    forms: CompiledShapes[Shapes | str],
) -> None:
    for shapes in (A, A, B, B, A):
        forms.find(shapes)
    found = [forms.find(C) for _ in range(PAYS_AFTER_RUNS + 1)]
    assert set(found[:-1]) == {"dynamic"} and found[-1] == C
    assert forms.find(A) == A and forms.find(B) == "dynamic"


def test_large_stages_have_few_forms_and_small_ones_a_bounded_number() -> None:
    assert [most_forms(size) for size in (0, 10**6, MOST_BYTES // 3, MOST_BYTES, 10 * MOST_BYTES)] == [
        MOST_FORMS,
        MOST_FORMS,
        3,
        1,
        1,
    ]


def test_what_is_compiled_ahead_is_found_and_takes_nobodys_place(
    forms: CompiledShapes[Shapes | str], compiled: list[Shapes | None]
) -> None:
    assert forms.lacks(A)
    forms.prepare(A)
    assert not forms.lacks(A)
    assert [forms.find(A), forms.find(B)] == [A, B]
    assert not forms.lacks(C)  # there is no room for a third one
    forms.prepare(C)
    assert compiled == [A, B]


def test_what_is_compiled_ahead_for_nothing_gives_way(forms: CompiledShapes[Shapes | str]) -> None:
    forms.prepare(A)
    assert [forms.find(shapes) for shapes in (B, B, C, B)] == [B, B, C, B]
