"""Bundles whose files were damaged by somebody who also made all hashes fit, as every author of a bundle can."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutate
from fuzz.child import WrongResult
from records import parity_record, self_test_record
from safetensors.numpy import load_file

from ditc.runtime.bundle.certificate import CERTIFICATE, Certificate, save_certificate
from ditc.runtime.bundle.manifest import MANIFEST, load_manifest
from ditc.runtime.cli import FAILED, USAGE, main
from ditc.runtime.loader import choose
from ditc.runtime.metrics import psnr, relative_l2
from ditc.runtime.pipeline import Pipeline
from ditc.runtime.session import Array

PROMPT, SEED = "a red cat", 3
SAME_DB = 60.0
# Without these, a picture must be that of the undamaged bundle.
WHAT_TO_DRAW = {"defaults", "text", "guidance", "latents"}


class Bundles:
    """Undamaged bundles, and what they draw."""

    def __init__(self, subjects: dict[str, Path], folder: Path) -> None:
        self.bundles = subjects
        self.folder = folder
        self._pictures: dict[tuple[str, int], Array] = {}
        for name in subjects:
            self.pictures(name, 1)  # also imports what drawing needs, before memory is limited

    def pictures(self, name: str, count: int) -> Array:
        """The pictures of an undamaged bundle."""
        if (name, count) not in self._pictures:
            self._pictures[name, count] = draw(self.bundles[name], count)
        return self._pictures[name, count]

    def take(self, chooser: random.Random, work: Path) -> tuple[str, Path]:
        """A copy of one of the bundles."""
        name = chooser.choice(list(self.bundles))
        skip = shutil.ignore_patterns(".build")
        return name, Path(shutil.copytree(self.bundles[name], work / "bundle", ignore=skip))


def draw(bundle: Path, count: int) -> Array:
    """Pictures (N,H,W,3) of a bundle."""
    with Pipeline.load(bundle, threads=1, self_test=False) as pipeline:
        images = pipeline(
            PROMPT, seed=SEED, num_images_per_prompt=count, output_type="np", allow_uniform=True, strict=True
        ).images
    return np.stack(images)


def read(bundle: Path) -> Any:
    """The manifest as plain JSON."""
    return json.loads((bundle / MANIFEST).read_text())


def seal(bundle: Path, manifest: Any) -> None:
    """Write a manifest with the digest that fits."""
    if isinstance(manifest, dict):
        text = json.dumps({**manifest, "digest": ""}, sort_keys=True, ensure_ascii=False)
        manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (bundle / MANIFEST).write_bytes((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def fit(manifest: Any, bundle: Path, path: str) -> None:
    """Set hash and size of a file wherever the manifest names it."""
    data = (bundle / path).read_bytes()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("path") == path:
                node["sha256"], node["size_bytes"] = hashlib.sha256(data).hexdigest(), len(data)
            for item in node.values():
                visit(item)
        elif isinstance(node, list):
            for item in node:
                visit(item)

    visit(manifest)


def look_at(bundle: str) -> None:
    """Inspect and verify must say something or refuse in words."""
    for verb in (["inspect", bundle], ["verify", bundle]):
        code = main(verb)
        if code not in (0, USAGE):
            raise WrongResult(f"{verb} ended with {code}")


class Manifests(Bundles):
    """A sealed manifest draws what it declares, or is refused."""

    def attempt(self, chooser: random.Random, work: Path) -> str:
        name, bundle = self.take(chooser, work)
        before = read(bundle)
        damaged, places = mutate.damage(before, chooser)
        seal(bundle, damaged)
        count = chooser.choice([1, 1, 2, 5])
        look_at("bundle")
        pictures = draw(bundle, count)
        defaults = load_manifest(bundle).defaults
        wanted = (count, defaults.height, defaults.width, 3)
        if pictures.shape != wanted or not np.isfinite(pictures).all():
            raise WrongResult(f"{places}: drew {pictures.shape}, not {wanted}, or not finite")
        tops = {place[0] for place in places}
        if tops & WHAT_TO_DRAW or {"scheduler", "golden_table"} <= tops:
            return "drawn"
        check_same(pictures, self.pictures(name, count), f"{places}")
        return "drawn as before"


def check_same(pictures: Array, wanted: Array, what: str) -> None:
    """Raise WrongResult unless the pictures are the wanted ones."""
    if pictures.shape != wanted.shape or psnr(pictures, wanted) < SAME_DB:
        raise WrongResult(f"{what}: another picture was drawn without a word")


def damage_json_or_bytes(data: bytes, chooser: random.Random) -> bytes:
    """Damage what a JSON file says, or its bytes."""
    if chooser.random() < 0.25:
        return mutate.damage_bytes(data, chooser)
    return json.dumps(mutate.damage(json.loads(data), chooser)[0]).encode()


class Tokenizers(Bundles):
    """A damaged tokenizer gives the ids that the library gives, or is refused."""

    def attempt(self, chooser: random.Random, work: Path) -> str:
        import tokenizers

        name, bundle = self.take(chooser, work)
        manifest = read(bundle)
        path = chooser.choice(manifest["text"])["tokenizer"]
        before = (bundle / path).read_bytes()
        (bundle / path).write_bytes(damage_json_or_bytes(before, chooser))
        fit(manifest, bundle, path)
        seal(bundle, manifest)
        look_at("bundle")
        pictures = draw(bundle, 1)
        texts = [PROMPT, ""]
        old, new = (
            tokenizers.Tokenizer.from_str(data.decode()) for data in (before, (bundle / path).read_bytes())
        )
        if all(old.encode(text).ids == new.encode(text).ids for text in texts):
            check_same(pictures, self.pictures(name, 1), path)
            return "drawn as before"
        if pictures.shape != self.pictures(name, 1).shape or not np.isfinite(pictures).all():
            raise WrongResult(f"{path}: {pictures.shape}")
        return "drawn"


def damage_safetensors(data: bytes, chooser: random.Random) -> bytes:
    """Damage the header, what its metadata says, the values, or any bytes."""
    kind = chooser.randrange(4)
    if kind == 0:
        return mutate.damage_bytes(data, chooser)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if kind == 1:
        header, _ = mutate.damage(header, chooser)
    elif kind == 2:
        metadata = header["__metadata__"]
        key = chooser.choice(list(metadata))
        metadata[key] = json.dumps(mutate.damage(json.loads(metadata[key]), chooser)[0])
    else:
        body = mutate.damage_bytes(body, chooser)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


class GoldenFiles(Bundles):
    """A self-test passes only if the golden file still holds, nearly, what the stage computes."""

    def __init__(self, subjects: dict[str, Path], folder: Path) -> None:
        super().__init__(subjects, folder)
        main(
            [
                "verify",
                str(shutil.copytree(next(iter(subjects.values())), folder / "home" / "bundle")),
                "--run",
            ]
        )
        shutil.rmtree(folder / "home" / "bundle")

    def attempt(self, chooser: random.Random, work: Path) -> str:
        _, bundle = self.take(chooser, work)
        manifest = read(bundle)
        stage = chooser.choice(list(choose(load_manifest(bundle))[0]))  # those that are run
        path = manifest["stages"][stage]["golden"]["path"]
        before = load_file(bundle / path)
        data = (bundle / path).read_bytes()
        (bundle / path).write_bytes(damage_safetensors(data, chooser))
        fit(manifest, bundle, path)
        seal(bundle, manifest)
        code = main(["verify", "bundle", "--run"])
        if code not in (0, FAILED, USAGE):
            raise WrongResult(f"verify --run ended with {code}")
        if code:
            return "failed" if code == FAILED else "refused"
        try:
            after = load_file(bundle / path)
        except Exception as error:
            raise WrongResult(f"{path} passed, but safetensors says {error}") from error
        for name, wanted in before.items():
            given = after.get(name)
            if given is None:
                raise WrongResult(f"{path} passed without {name}")
            if (
                name.startswith("out.")
                and given.size == wanted.size
                and relative_l2(given.ravel(), wanted.ravel()) > 0.01
            ):
                raise WrongResult(f"{path} passed with another {name}")
        return "passed"


class Certificates(Bundles):
    """A damaged certificate proves nothing that it did not prove before."""

    def __init__(self, subjects: dict[str, Path], folder: Path) -> None:
        super().__init__(subjects, folder)
        self.certified: dict[str, bytes] = {}
        for name, source in subjects.items():
            bundle = Path(
                shutil.copytree(source, folder / "home" / "bundle", ignore=shutil.ignore_patterns(".build"))
            )
            manifest = load_manifest(bundle)
            artifacts, _ = choose(manifest)
            certificate = Certificate(manifest=manifest.digest).with_record(
                artifacts, parity=parity_record(manifest), self_test=self_test_record(artifacts)
            )
            save_certificate(bundle, certificate)
            Pipeline.load(bundle, threads=1, require_certificate=True).close()
            self.certified[name] = (bundle / CERTIFICATE).read_bytes()
            shutil.rmtree(bundle)

    def attempt(self, chooser: random.Random, work: Path) -> str:
        name, bundle = self.take(chooser, work)
        before = json.loads(self.certified[name])
        sealed = chooser.random() < 0.5
        if sealed:
            damaged = mutate.damage(before, chooser)[0]
            if isinstance(damaged, dict):
                damaged["digest"] = hashlib.sha256(
                    json.dumps({**damaged, "digest": ""}, sort_keys=True, ensure_ascii=False).encode()
                ).hexdigest()
            (bundle / CERTIFICATE).write_bytes(
                (json.dumps(damaged, indent=1, ensure_ascii=False) + "\n").encode()
            )
        else:
            (bundle / CERTIFICATE).write_bytes(damage_json_or_bytes(self.certified[name], chooser))
        look_at("bundle")
        Pipeline.load(bundle, threads=1, require_certificate=True).close()
        after = json.loads((bundle / CERTIFICATE).read_bytes())
        if not sealed and after != before:
            raise WrongResult("a changed certificate still certifies")
        if not any(is_evidence(entry["parity"]) for entry in after["entries"]):
            raise WrongResult("a certificate certifies without evidence")
        return "certified"


def is_evidence(parity: Any) -> bool:
    """Whether a result of parity has lines, and each of them keeps its bound."""
    lines = parity["lines"] if parity else []
    passed = [line for line in lines if line["passed"]]
    kept = all(
        line["value"] is not None and (line["value"] >= line["bound"] or line["value"] <= line["bound"])
        for line in passed
    )
    return bool(passed) and kept and not any(line["passed"] is False for line in lines)
