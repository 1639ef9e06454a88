"""Which weights a key means is found among the names of the network, and what is not clear is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ditc.runtime.errors import UsageError
from ditc.runtime.lora.lora import LoraLayer
from ditc.runtime.lora.lora_file import LoraFile
from ditc.runtime.lora.names import KnownWeights, resolved
from ditc.runtime.weight_map import NativeName


def file_of(*keys: str, rows: int = 4) -> LoraFile:
    down, up = np.ones((1, 2), np.float32), np.arange(rows, dtype=np.float32)[:, None]
    layers = {key: LoraLayer(key=key, down=down, up=up, scaling=1.0) for key in keys}
    return LoraFile(name="style.safetensors", sha256="0" * 64, layers=layers)


def shapes(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (4, 2) for name in names}


@pytest.mark.parametrize(
    ("known", "key", "words"),
    [
        (
            KnownWeights({"transformer": shapes("a.b_c", "a_b.c")}, {}),
            "lora_unet_a_b_c",
            "can mean a.b_c of the transformer, a_b.c of the transformer",
        ),
        (
            KnownWeights({"text_encoder": shapes("q"), "text_encoder_2": shapes("q")}, {}),
            "base_model.model.q",
            "can mean q of the text_encoder, q of the text_encoder_2",
        ),
        (
            KnownWeights(
                {"transformer": shapes("mlp.0", "other")}, {"other.weight": NativeName(name="mlp.0.weight")}
            ),
            "mlp.0",
            "can mean mlp.0 of the transformer, other of the transformer",
        ),
    ],
    ids=["kohya", "two text encoders", "one name in both networks"],
)
def test_a_key_that_can_mean_two_weights_is_refused(known, key, words) -> None:
    with pytest.raises(UsageError) as refused:
        resolved(file_of(key), known)
    assert key in str(refused.value) and words in str(refused.value)


def test_a_part_that_the_maps_do_not_hold_is_missed() -> None:
    native = {f"{n}.weight": NativeName(name="qkv.weight", part=i, parts=3) for i, n in enumerate("qk")}
    known = KnownWeights({"transformer": shapes("q", "k")}, native)
    with pytest.raises(
        UsageError, match=r"changes qkv, and the network has only the parts \[0, 1\]"
    ) as refused:
        resolved(file_of("qkv", rows=12), known)
    assert refused.value.hint == "build the bundle again"


def test_parts_and_halves_are_taken_from_b() -> None:
    native = {f"{n}.weight": NativeName(name="qkv.weight", part=i, parts=3) for i, n in enumerate("qkv")}
    native["norm.weight"] = NativeName(name="mod.weight", swapped=True)
    known = KnownWeights({"transformer": shapes("q", "k", "v", "norm")}, native)
    parts = resolved(file_of("qkv", rows=12), known).components["transformer"]
    assert [parts[f"{n}.weight"].up[0, 0] for n in "qkv"] == [0, 4, 8]
    (norm,) = resolved(file_of("mod"), known).components["transformer"].values()
    assert norm.up[:, 0].tolist() == [2, 3, 0, 1]


def test_a_bundle_of_an_earlier_version_knows_no_native_names() -> None:
    with pytest.raises(UsageError, match="no network has a module of this name") as refused:
        resolved(file_of("blocks.0.attn.qkv"), KnownWeights({"transformer": shapes("q")}, {}))
    assert "has to be built again" in str(refused.value.hint)
