"""Graphs may refer only to files that the manifest lists: others could be exchanged under a valid signature."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from ditc.runtime.bundle.integrity import check_bundle, file_ref
from ditc.runtime.bundle.manifest import load_manifest, save_manifest
from ditc.runtime.bundle.onnx_references import onnx_references
from ditc.runtime.cli import USAGE, main
from ditc.runtime.errors import BundleError
from ditc.runtime.spec import DENOISER

MUTATIONS = 500


def external(location: str, offset: int = 0, length: int = 4) -> TensorProto:
    """A tensor of one float whose value is in another file."""
    tensor = TensorProto(
        name=f"in {location}", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def everywhere() -> onnx.ModelProto:
    """A model with an external tensor in every place that onnx.proto has for tensors."""

    def sparse(name: str) -> onnx.SparseTensorProto:
        return onnx.SparseTensorProto(values=external(f"{name} values"), indices=external(f"{name} indices"))

    def graph(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        found = helper.make_graph(list(nodes), name, [], [], [external(f"{name} initializer")])
        found.sparse_initializer.append(sparse(f"{name} sparse initializer"))
        return found

    def node(name: str) -> onnx.NodeProto:
        made = helper.make_node("Anything", [], ["out"])
        made.attribute.add(name="t", type="TENSOR").t.CopyFrom(external(f"{name} t"))
        made.attribute.add(name="tensors", type="TENSORS").tensors.append(external(f"{name} tensors"))
        made.attribute.add(name="s", type="SPARSE_TENSOR").sparse_tensor.CopyFrom(sparse(f"{name} s"))
        made.attribute.add(name="l", type="SPARSE_TENSORS").sparse_tensors.append(sparse(f"{name} l"))
        return made

    control = helper.make_node("If", ["c"], ["out"], then_branch=graph("branch", node("branch node")))
    control.attribute.add(name="graphs", type="GRAPHS").graphs.append(graph("one of several"))
    model = helper.make_model(graph("main", node("node"), control))
    function = model.functions.add(name="F", domain="ours")
    function.node.append(node("function node"))
    function.attribute_proto.add(name="t", type="TENSOR").t.CopyFrom(external("function default"))
    training = model.training_info.add()
    training.initialization.CopyFrom(graph("initialization"))
    training.algorithm.CopyFrom(graph("algorithm"))
    return model


def tensors(message: object) -> Iterator[TensorProto]:
    """Every tensor in a protobuf message, found through the library's own description of its fields."""
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                if isinstance(inner, TensorProto):
                    yield inner
                yield from tensors(inner)


def test_an_external_tensor_is_found_wherever_a_graph_can_hold_one(tmp_path: Path) -> None:
    model = everywhere()
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    known = sorted(
        entry.value for t in tensors(model) for entry in t.external_data if entry.key == "location"
    )
    assert len(known) == len(set(known)) > 30
    assert sorted(reference.location for reference in onnx_references(tmp_path / "model.onnx")) == known


def test_tensors_that_hide_their_entries_count(tmp_path: Path) -> None:
    """Protobuf merges the parts of a field that is written twice, so no single part may be left out."""
    hidden = external("hidden.bin")
    hidden.data_location = TensorProto.DEFAULT
    parts = [TensorProto(data_location=TensorProto.EXTERNAL), hidden]
    model = helper.make_model(helper.make_graph([helper.make_node("Constant", [], ["out"])], "g", [], []))
    attribute = model.graph.node[0].attribute.add(name="value", type="TENSOR")
    content = attribute.SerializeToString()
    for part in parts:
        content += b"\x2a" + bytes([part.ByteSize()]) + part.SerializeToString()
    attribute.ParseFromString(content)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert [r.location for r in onnx_references(tmp_path / "model.onnx")] == ["hidden.bin"]


def test_damaged_graphs_are_refused_or_read_and_nothing_else_happens(tmp_path: Path) -> None:
    content, rng = everywhere().SerializeToString(), random.Random(0)
    path = tmp_path / "model.onnx"
    refused = 0
    for _ in range(MUTATIONS):
        changed = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
        for _ in range(rng.randrange(4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            onnx_references(path)
        except BundleError:
            refused += 1
    assert refused > MUTATIONS // 4


@pytest.fixture
def with_graph(tiny_bundle: Path, tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    """Change the denoiser's graph in a copy of the tiny bundle and seal the manifest, as a hostile author can."""

    def change(edit: Callable[[onnx.ModelProto], None]) -> Path:
        bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
        manifest = load_manifest(bundle)
        (artifact,) = manifest.stages[DENOISER].artifacts
        path = bundle / artifact.file.path
        shutil.copyfile(bundle / artifact.data[0].path, path.with_name("unlisted.bin"))
        model = onnx.load(path, load_external_data=False)
        edit(model)
        path.write_bytes(model.SerializeToString())
        stage = replace(
            manifest.stages[DENOISER], artifacts=(replace(artifact, file=file_ref(path, bundle)),)
        )
        save_manifest(replace(manifest, stages={**manifest.stages, DENOISER: stage}), bundle)
        return bundle

    return change


def set_entry(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "unlisted.bin", "'unlisted.bin', which the manifest does not list"),
        ("location", "/etc/hostname", "'/etc/hostname', which the manifest does not list"),
        ("location", "../manifest.json", "'../manifest.json', which the manifest does not list"),
        ("location", "*/_ORT_MEM_ADDR_/*", "which the manifest does not list"),  # an address, in ONNX Runtime
        ("length", "99999999999", "but the file has"),
        ("offset", "-4096", "offset '-4096' is not a number of bytes"),
    ],
)
def test_a_sealed_bundle_whose_graph_refers_to_other_bytes_is_refused_by_every_verb(
    with_graph: Callable[[Callable[[onnx.ModelProto], None]], Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    key: str,
    value: str,
    message: str,
) -> None:
    bundle = with_graph(lambda model: set_entry(model, key, value))
    for verb in (["verify", str(bundle)], ["run", str(bundle), "cat", "-o", str(tmp_path / "x.png")]):
        assert main(verb) == USAGE
        error = capsys.readouterr().err
        assert message in error and "denoiser-fp32" in error and "hint: do not use this bundle" in error
    with pytest.raises(BundleError):  # what signing, pushing and pulling check
        check_bundle(bundle, load_manifest(bundle))


def test_a_graph_that_another_program_compiled_is_refused(
    with_graph: Callable[[Callable[[onnx.ModelProto], None]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Execution providers open the file that such a node names."""
    bundle = with_graph(
        lambda m: m.graph.node.append(helper.make_node("EPContext", [], ["e"], "e", None, "com.microsoft"))
    )
    assert main(["verify", str(bundle)]) == USAGE
    assert "EPContext" in capsys.readouterr().err
