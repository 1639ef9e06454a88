"""The OpenAPI document says what the server does: refused fields, and the bodies of errors."""

from __future__ import annotations

from typing import Any

import pytest

from ditc.runtime.serving.http.app import create_app
from ditc.runtime.serving.models import Models
from ditc.runtime.serving.scheduling.admission import Admission, Bounds

BODIES = ("GenerationBody", "JobBody", "HuggingFaceBody", "HuggingFaceParameters")


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Models({}, admission=Admission(Bounds()))).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path}", operation)
        for path, methods in document["paths"].items()
        if path.startswith(("/v1/", "/hf/"))
        for method, operation in methods.items()
    ]


def test_every_error_has_the_body_of_openai(document: dict[str, Any]) -> None:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
    assert len(operations(document)) == 15
    for name, operation in operations(document):
        answers = {status: answer.get("content") for status, answer in operation["responses"].items()}
        assert {"200", "400", "401", "404", "413", "422", "429", "500", "503", "504"} <= set(answers), name
        for status, content in answers.items():
            assert content == error or status == "200", (name, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize("name", BODIES)
def test_bodies_take_no_other_fields(document: dict[str, Any], name: str) -> None:
    assert document["components"]["schemas"][name]["additionalProperties"] is False


def test_every_operation_and_field_is_described(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert operation["description"], name
    for name in BODIES:
        for field, schema in document["components"]["schemas"][name]["properties"].items():
            assert schema.get("description") or "$ref" in str(schema), (name, field)


def test_every_path_that_draws_takes_an_idempotency_key(document: dict[str, Any]) -> None:
    drawing = [one for name, one in operations(document) if name.startswith("post ")]
    assert len(drawing) == 5
    for operation in drawing:
        names = [parameter["name"] for parameter in operation["parameters"]]
        assert {"idempotency-key", "x-request-timeout"} <= set(names), operation["operationId"]


def test_a_stream_and_pictures_are_declared_beside_json(document: dict[str, Any]) -> None:
    paths = document["paths"]
    generated = paths["/v1/images/generations"]["post"]["responses"]["200"]["content"]
    assert set(generated) == {"application/json", "text/event-stream"}
    film = paths["/v1/videos/{id}/content"]["get"]["responses"]["200"]["content"]
    assert set(film) == {"video/mp4", "image/webp"}
    for path, method in (("/v1/images/jobs/{id}/content", "get"), ("/hf/models/{name}", "post")):
        assert set(paths[path][method]["responses"]["200"]["content"]) == {
            "image/png",
            "image/jpeg",
            "image/webp",
        }


def test_the_body_for_a_video_is_json_or_a_form_and_takes_no_other_fields(document: dict[str, Any]) -> None:
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]
    assert body["required"] and set(body["content"]) == {"application/json", "multipart/form-data"}
    plain, form = (body["content"][kind]["schema"] for kind in ("application/json", "multipart/form-data"))
    for schema in (plain, form):
        assert schema["additionalProperties"] is False and schema["required"] == ["prompt"]
        assert all(field.get("description") for field in schema["properties"].values())
    assert {"seconds", "frames", "fps", "motion_score", "output_format", "size"} <= set(form["properties"])
    assert "sigmas" in plain["properties"] and "sigmas" not in form["properties"]
    # The picture is an object in JSON and a file of a form, which may hold the object's parts as texts.
    picture, nothing = plain["properties"]["input_reference"]["anyOf"]
    assert set(picture["properties"]) == {"image_url", "file_id"} and nothing == {"type": "null"}
    assert form["properties"]["input_reference"]["format"] == "binary"
    assert "input_reference[image_url]" in form["properties"]
    assert "$ref" not in str(body)  # which would be sought at the top of the document
