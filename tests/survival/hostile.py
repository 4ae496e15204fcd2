"""Hostile runs, specs and data: refused in words, or harmless; nothing runs, and memory stays small."""

import contextlib
import json
import os
import random
import resource
import shutil
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from cases import (
    JUNK,
    PROGRAM,
    SPEC,
    World,
    command,
    damages,
    hostile_states,
    mutated,
    own_program,
    stop_after,
    told,
    weights,
)

from ppl_vae import load_run, load_spec
from ppl_vae.data import load
from ppl_vae.runs import storage, trained


def flips_and_cuts(world: World, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Damage a byte of a file, or cut it: readers refuse the run, or answer as before."""
    for folder in (world.whole, world.part):
        twin = world.fresh("twin")
        shutil.copytree(folder, twin)

        def read() -> Any:
            if (twin / storage.STATE).exists():  # noqa: B023
                storage.check_folder(twin, finished=False)  # noqa: B023
                trained.read_spec(twin, False, lambda message: None)  # noqa: B023
                state = storage.read_state(twin / storage.STATE)  # noqa: B023
                return repr(state), repr(sorted(weights(twin).items()))  # noqa: B023
            found = load_run(twin)  # noqa: B023
            history = storage.read_metrics(twin, found.report["train"]["epochs"])  # noqa: B023
            table = storage.read_tensors(twin / "evidence.safetensors")  # noqa: B023
            spec = found.spec.to_dict()
            spec["data"].pop("name")
            return spec, found.report, repr(sorted(weights(twin).items())), history, repr(sorted(table.items()))  # noqa: B023

        truth = read()
        for file, whole, damaged in damages(twin, count // 2, seed):
            file.write_bytes(damaged)
            case = f"{file.relative_to(twin)}, {len(whole)} to {len(damaged)} bytes"
            try:
                lost = "" if read() == truth else "another content was accepted"
            except ValueError:
                lost = ""
            except Exception as error:
                lost = f"{type(error).__name__}: {error}"
            file.write_bytes(whole)
            yield case, lost
        yield "and whole again", "" if read() == truth else "the run does not read"


def hostile_runs(world: World) -> Iterator[tuple[str, str]]:
    """Interrupted runs with states that do not fit, sealed as if they were whole: refused, and nothing crashes."""
    for case, state in hostile_states(world.part):
        twin = world.fresh("twin")
        shutil.copytree(world.part, twin)
        storage.write_state(state, twin / storage.STATE)
        (twin / storage.MANIFEST).unlink()
        storage.seal(twin, {})
        status, said = command(["fit", twin], world.log)
        good = status == 2 and "Traceback" not in said
        yield case, "" if good else told(status, said)
    for case, text in {
        "deep metadata": "[" * 100_000,
        "no JSON": "{",
        "a list": "[]",
        "no keys": "{}",
        "numbers for words": '{"digest": 1, "format": 2, "files": 3}',
    }.items():
        for name in (storage.MANIFEST, "report.json"):
            twin = world.fresh("twin")
            shutil.copytree(world.whole, twin)
            (twin / name).write_text(text)
            if name != storage.MANIFEST:
                (twin / storage.MANIFEST).unlink()
                storage.seal(twin, {})
            for verb in (["evaluate", twin], ["compare", twin, world.whole], ["check", twin]):
                status, said = command(verb, world.log)
                good = status == (0 if verb[0] == "check" and name == "report.json" else 2) and "Traceback" not in said
                yield f"{name}: {case}, {verb[0]}", "" if good else told(status, said)
    yield from _strange_entries(world)


def sealed(twin: Path) -> None:
    """Write the manifest anew, as if what was done to the run had always been there."""
    (twin / storage.MANIFEST).unlink(missing_ok=True)
    storage.seal(twin, {})


def bounded() -> None:
    """Allow a process 2 GiB more than it has, so that what takes memory without bound is seen."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 2**18
    size = pages * os.sysconf("SC_PAGE_SIZE") + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def harmless(world: World, arguments: list[Any], *statuses: int) -> str:
    """Run a command, which must end with one of some statuses, without a traceback and in bounded memory."""
    status, said = command(arguments, world.log, bounded)
    return "" if status in (statuses or (0, 2)) and "Traceback" not in said else told(status, said)


def hostile_reports(world: World, count: int = 70, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Reports in which a key is gone or of another kind, in sealed runs: refused, or answered."""
    draw, whole = random.Random(seed), json.loads((world.whole / "report.json").read_text())
    paths = [(key,) for key in whole]
    paths += [(key, inner) for key, table in whole.items() if isinstance(table, dict) for inner in table]
    paths += [("data", "protocol", key) for key in whole["data"]["protocol"]]
    for number, path in enumerate(draw.sample(paths, min(count, len(paths)))):
        twin, report = world.fresh("twin"), json.loads(json.dumps(whole))
        shutil.copytree(world.whole, twin)
        place: Any = report
        for key in path[:-1]:
            place = place[key]
        junk = draw.choice([*JUNK, "gone", "gone", "gone"])
        if junk == "gone":
            del place[path[-1]]
        else:
            place[path[-1]] = junk
        (twin / "report.json").write_text(json.dumps(report))
        sealed(twin)
        verb = ["evaluate", twin] if number % 2 else ["compare", twin, world.whole]
        yield f"report.{'.'.join(path)} = {junk!r:.20}, {verb[0]}", harmless(world, verb)


def hostile_files(world: World) -> Iterator[tuple[str, str]]:
    """Files of a sealed run that announce what they do not hold, or lead elsewhere."""
    weights_file = (world.whole / "model.safetensors").read_bytes()
    size = int.from_bytes(weights_file[:8], "little")
    head, body = json.loads(weights_file[8 : 8 + size]), weights_file[8 + size :]
    first = next(key for key in head if key != "__metadata__")

    def tensors(changed: Any) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + body

    def one(**more: Any) -> bytes:
        return tensors({**head, first: {**head[first], **more}})

    damaged: dict[str, bytes] = {
        "a header of 2**63 bytes": b"\xff" * 7 + b"\x7f" + weights_file[8:],
        "a header of 100 MB": (10**8).to_bytes(8, "little") + weights_file[8:],
        "an empty file": b"",
        "eight bytes": bytes(8),
        "no JSON": tensors(b"{"),
        "a deep header": tensors(b"[" * 100_000),
        "a list": tensors([]),
        "no tensors": tensors({}),
        "a shape of 2**62": one(shape=[2**62]),
        "a negative shape": one(shape=[-1]),
        "a shape of words": one(shape=["a"]),
        "another dtype": one(dtype="F64"),
        "a dtype that is none": one(dtype="X9"),
        "offsets beyond the end": one(data_offsets=[0, 2**40]),
        "offsets that overlap": one(data_offsets=[0, len(body)]),
        "offsets the wrong way": one(data_offsets=[8, 0]),
        "a tensor that is gone": tensors({key: value for key, value in head.items() if key != first}),
        "metadata of numbers": tensors({**head, "__metadata__": {"a": 1}}),
        "bytes beyond the end": weights_file + b"x" * 100,
        "NaN": weights_file[: 8 + size] + b"\xff" * len(body),
        "a pickle": b"cos\nsystem\n(S'touch pwned'\ntR.",
        "a zip": b"PK\x03\x04" + bytes(100),
    }
    lines = (world.whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    metrics = {
        "no lines": "",
        "half a line": lines[0][:20],
        "a list": "[1]\n",
        "a deep line": "[" * 100_000 + "\n",
        "a line too many": "".join([*lines, lines[-1]]),
        "a line too few": "".join(lines[:-1]),
        "lines in another order": "".join(reversed(lines)),
        "words": "".join(lines).replace(":", ': "a", "b":', 1),
        "infinities": "".join(lines).replace("0.", "Infinity, 0.", 1),
        "NUL": "\0" * 100,
        "a number of 5,000 digits": '{"epoch": ' + "9" * 5000 + "}\n",
    }
    cases: list[tuple[str, str, bytes]] = [("model.safetensors", name, content) for name, content in damaged.items()]
    cases += [("evidence.safetensors", name, content) for name, content in damaged.items()]
    cases += [("metrics.jsonl", name, text.encode()) for name, text in metrics.items()]
    draw, good = random.Random(3), tomllib.loads((world.whole / "spec.toml").read_text())
    for number in range(30):
        changed = mutated(good, draw)
        with contextlib.suppress(Exception):  # what TOML cannot say
            cases.append(("spec.toml", f"mutant {number}", tomli_w.dumps(changed).encode()))
    for number, (name, case, content) in enumerate(cases):
        twin = world.fresh("twin")
        shutil.copytree(world.whole, twin)
        (twin / name).write_bytes(content)
        sealed(twin)
        source = world.folder / "rows.npy"
        np.save(source, np.ones((3, 3)))
        verbs = (
            ["evaluate", twin],
            ["apply", twin, "score", source, "--out", world.folder / "scores.csv"],
            ["check", twin],
        )
        verb = verbs[number % 3]
        marked = world.folder / "pwned"
        yield f"{name}: {case}, {verb[0]}", harmless(world, verb) or ("code ran" if marked.exists() else "")
    manifest = json.loads((world.whole / storage.MANIFEST).read_text())
    secret = world.folder / "private"
    secret.write_text("private")
    for case, changed in {
        "a path upwards": {"files": {**manifest["files"], "../private": "0" * 64}},
        "an absolute path": {"files": {**manifest["files"], str(secret): "0" * 64}},
        "a file that is not there": {"files": {**manifest["files"], "figures/none.png": "0" * 64}},
        "no files": {"files": {}},
        "another format": {"format": 10**6},
        "a format of words": {"format": "two"},
        "a digest of words": {"files": dict.fromkeys(manifest["files"], "a")},
        "files in a list": {"files": list(manifest["files"])},
        "machines of numbers": {"trained": 3, "evaluated": [1]},
        "a name with NUL": {"files": {**manifest["files"], "a\0b": "0" * 64}},
        "a name of 5,000 letters": {"files": {**manifest["files"], "a" * 5000: "0" * 64}},
        "a device": {"files": {**manifest["files"], "/dev/zero": "0" * 64}},
    }.items():
        for verb in ("evaluate", "check"):
            twin = world.fresh("twin")
            shutil.copytree(world.whole, twin)
            (twin / storage.MANIFEST).write_text(json.dumps({**manifest, **changed}))
            lost = harmless(world, [verb, twin])
            yield f"manifest: {case}, {verb}", lost or ("" if secret.read_text() == "private" else "it was written to")


def _strange_entries(world: World) -> Iterator[tuple[str, str]]:
    """Links, pipes and a person's files in a run: neither read nor copied nor lost."""
    secret = world.folder / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "key").write_text("private")
    for name, make in {
        "a link to a folder": lambda run: (run / "figures2").symlink_to(secret),
        "a link to .": lambda run: (run / "loop").symlink_to("."),
        "figures as a link": lambda run: (shutil.rmtree(run / "figures"), (run / "figures").symlink_to(secret)),
        "report as a link": lambda run: ((run / "report.md").unlink(), (run / "report.md").symlink_to(secret / "key")),
        "weights as a link": lambda run: (
            (run / "model.safetensors").rename(world.folder / "w"),
            (run / "model.safetensors").symlink_to(world.folder / "w"),
        ),
        "a pipe": lambda run: ((run / "metrics.jsonl").unlink(), os.mkfifo(run / "metrics.jsonl")),
        "an edited report": lambda run: (run / "report.md").open("a").write("my note"),
        "a folder of notes": lambda run: (run / "notes").mkdir(),
    }.items():
        twin = world.fresh("twin")
        shutil.copytree(world.whole, twin)
        make(twin)
        before = {path: path.lstat().st_mtime_ns for path in [*twin.rglob("*"), *secret.rglob("*")]}
        status, said = command(["evaluate", twin], world.log)
        same_as_before = before == {path: path.lstat().st_mtime_ns for path in [*twin.rglob("*"), *secret.rglob("*")]}
        good = status == 2 and "Traceback" not in said and same_as_before
        yield name, "" if good else f"status {status}, as before: {same_as_before}: {said[-300:]}"


def programs(world: World) -> Iterator[tuple[str, str]]:
    """A stranger's run with a program: nothing runs without leave, and with leave it is told before it runs."""
    mark = world.folder / "mark"
    spec = own_program(world, PROGRAM.replace("MARK", repr(str(mark))), "theirs")
    for verb, hook in (("evaluate", None), ("fit", stop_after(2))):
        place = world.fresh("run")
        status, said = command(["fit", spec, "--out", place], world.log, hook or (lambda: None))
        assert status == (130 if hook else 0), said
        mark.unlink()
        for more, wanted in (([], 2), (["--trust-code"], 0)):
            for arguments in ([verb, place], ["check", place / "spec.toml"]):
                twin = place if arguments[0] == verb else place / "spec.toml"
                status, said = command([arguments[0], twin, *more], world.log)
                ran = mark.exists()
                mark.unlink(missing_ok=True)
                told = "runs the code of" in said or "without --trust-code" in said
                good = status == wanted and ran == (wanted == 0) and told
                yield (
                    f"{' '.join(map(str, arguments[:1]))} {more}",
                    "" if good else f"{status}, ran: {ran}: {said[-300:]}",
                )


def mutated_specs(world: World, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Specs with random mistakes: refused in words, or good to build."""
    draw, path = random.Random(seed), world.folder / "mutant.toml"
    good = tomllib.loads(SPEC)
    for number in range(count):
        tables = mutated(good, draw)
        try:
            spec = load_spec(world.spec, {})
            spec = type(spec).from_dict(tables, path, trust_code=False)
            spec.check(spec.load_data())
            yield f"spec {number}", ""
        except (ValueError, MemoryError, OverflowError, OSError):
            yield f"spec {number}", ""
        except RuntimeError as error:
            yield f"spec {number}", "" if "memory" in str(error) else f"{error}: {json.dumps(tables)[:400]}"
        except Exception as error:
            yield f"spec {number}", f"{type(error).__name__}: {error}: {json.dumps(tables)[:400]}"


def mutated_data(world: World, count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Data files with flipped and cut bytes: refused in words, or read."""
    folder, draw = world.folder / "data", random.Random(seed)
    folder.mkdir(exist_ok=True)
    x = np.random.default_rng(1).integers(0, 9, (12, 3))
    np.save(folder / "a.npy", x)
    np.savez_compressed(folder / "a.npz", x=x, y=np.arange(12) % 2)
    for suffix, mark in ((".csv", ","), (".tsv", "\t"), (".txt", " ")):
        (folder / f"a{suffix}").write_text(f"a{mark}b{mark}c\n" + "".join(mark.join(map(str, r)) + "\n" for r in x))
    import pandas

    pandas.DataFrame(x.astype(float), columns=list("abc")).to_parquet(folder / "a.parquet")
    originals = [path for path in sorted(folder.iterdir()) if path.stem == "a"]
    for number in range(count):
        original = originals[number % len(originals)]
        whole = bytearray(original.read_bytes())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(whole))
            if draw.random() < 0.2 and len(whole) > 9:
                del whole[at:]
                break
            whole[at] = draw.randrange(256)
        file = folder / f"b{original.suffix}"
        file.write_bytes(whole)
        try:
            load(file)
            lost = ""
        except (ValueError, MemoryError):
            lost = ""
        except Exception as error:
            lost = f"{type(error).__name__}: {error}"
        yield f"{original.suffix} {number}", lost


def hostile_data(world: World) -> Iterator[tuple[str, str]]:
    """Files that announce more than they hold, never end, or hold no numbers: refused, and memory stays small."""
    folder = world.folder / "hostile"
    folder.mkdir(exist_ok=True)
    np.save(folder / "good.npy", np.ones((9, 3)))
    good = (folder / "good.npy").read_bytes()
    (folder / "huge.npy").write_bytes(good.replace(b"(9, 3)", b"(9999999999, 200)"))
    np.savez(folder / "words.npz", x=np.array([["a", "b"]] * 9))
    np.savez(folder / "objects.npz", x=np.array([[1, None]] * 9, dtype=object))
    np.savez_compressed(folder / "bomb.npz", x=np.zeros((3000, 1000)))
    os.mkfifo(folder / "pipe.csv")
    os.mkfifo(folder / "pipe.npy")
    (folder / "zero.npy").symlink_to("/dev/zero")
    (folder / "memory.csv").symlink_to("/proc/self/mem")
    (folder / "nul.csv").write_bytes(b"1,2\0\n3,4\n")
    (folder / "bytes.csv").write_bytes(b"\xff\xfe\n1,2\n")
    (folder / "field.csv").write_text("a,b\n" + '"' + "1" * 200_000 + '",2\n')
    for name in ("deep", "dotted"):
        text = "a=" + "[" * 100_000 if name == "deep" else "[" + ".".join("a" * 5_000) + "]"
        (folder / f"{name}.toml").write_text(text)
    os.mkfifo(folder / "pipe.toml")
    (folder / "binary.toml").write_bytes(bytes(range(256)))
    (folder / "digits.toml").write_text("a = " + "9" * 10_000)

    def small() -> None:
        os.environ["PPL_VAE_LARGEST"] = "1e7"
        bounded()

    _more_files(folder)
    for file in sorted(folder.iterdir()):
        if file.stem == "good":
            continue
        given = [file] if file.suffix == ".toml" else [world.spec, "--set", f"data.name={file}"]
        status, said = command(["check", *given], world.log, small)
        yield file.name, "" if status == 2 and "Traceback" not in said else told(status, said)


def _more_files(folder: Path) -> None:
    """Files that are no data, in each format that is read."""
    numbers, plain = np.arange(27.0).reshape(9, 3), np.ones((9, 3))
    for name, values in {
        "objects.npy": np.array([[1, None]] * 9, dtype=object),
        "words.npy": np.array([["a", "b"]] * 9),
        "complex.npy": plain * 1j,
        "dates.npy": np.array([["2020-01-01"] * 2] * 9, dtype="datetime64[D]"),
        "fields.npy": np.zeros(9, dtype=[("a", "f8"), ("b", "f8")]),
        "scalar.npy": np.array(3.0),
        "five_axes.npy": np.ones((2, 2, 2, 2, 2)),
        "no_rows.npy": np.ones((0, 3)),
        "no_columns.npy": np.ones((3, 0)),
        "infinite.npy": np.where(numbers == 5, np.inf, numbers),
    }.items():
        np.save(folder / name, values, allow_pickle=True)
    header = (folder / "good.npy").read_bytes()
    for name, content in {
        "version.npy": header.replace(b"NUMPY\x01", b"NUMPY\x09"),
        "code.npy": header.replace(b"'descr': '<f8'", b"'descr': exit()"),
        "negative.npy": header.replace(b"(9, 3)", b"(-9,-3)"),
        "cut.npy": header[:60],
        "longer_header.npy": header[:8] + b"\xff\xff" + header[10:],
        "none.npy": b"",
        "text.npy": b"1,2\n3,4\n",
        "cut.npz": b"PK\x03\x04" + bytes(50),
        "text.npz": b"hello",
        "none.npz": b"",
        "cut.parquet": b"PAR1" + bytes(40),
        "text.parquet": b"a,b\n1,2\n",
        "none.parquet": b"",
        "huge_footer.parquet": b"PAR1" + bytes(40) + b"\xff\xff\xff\x7fPAR1",
        "text.feather": b"a,b\n1,2\n",
        "none.feather": b"",
        "cut.feather": b"ARROW1\0\0" + b"\xff" * 40,
        "text.h5ad": b"a,b\n1,2\n",
        "none.h5ad": b"",
        "cut.h5ad": b"\x89HDF\r\n\x1a\n" + bytes(80),
        "none.csv": b"",
        "header.csv": b"a,b\n",
        "uneven.csv": b"a,b\n1,2\n3\n",
        "twice.csv": b"a,a\n1,2\n3,4\n",
        "infinite.csv": b"a,b\n1,2\n3,-inf\n",
        "latin.csv": "a,b\n1,2\n3,\xe9\n".encode("latin-1"),
        "utf16.csv": "a,b\n1,2\n3,4\n".encode("utf-16"),
        "mixed.csv": b"a,b\n1,2\n3,x\n",
        "quotes.csv": b'a,b\n"1,2\n3,4\n',
        "commas.csv": b"a;b\n1,5;2\n2,5;3\n3,5;4\n",
        "strange.xyz": b"1,2\n3,4\n",
    }.items():
        (folder / name).write_bytes(content)
    np.savez(folder / "good.npz", x=plain)
    with zipfile.ZipFile(folder / "names.npz", "w") as archive:
        archive.writestr("../../x.npy", header)
        archive.writestr("../../y.npy", header)
    with zipfile.ZipFile(folder / "no_array.npz", "w") as archive:
        archive.writestr("x.npy", b"hello")
    whole = (folder / "good.npz").read_bytes()
    (folder / "encrypted.npz").write_bytes(whole.replace(b"PK\x01\x02\x14\x03", b"PK\x01\x02\x14\x03", 1)[:-4])
    (folder / "loop.csv").symlink_to("loop.csv")
    (folder / "folder.csv").mkdir()
    (folder / "broken.parquet").symlink_to("nowhere")


def hostile_settings(world: World) -> Iterator[tuple[str, str]]:
    """Settings that are none: refused in words."""
    for setting in (
        *("prior.family=['Normal']", "prior=[1]", "model.latent=1000000000", "model.latent=10000000000000000000"),
        *("svi=3", "data.name=['a']", "likelihood.network=['x']", "likelihood.network.family=['MLP']"),
        *(
            "svi.seed=1e400",
            "data.seed=-1",
            f"data.name={'x' * 5000}.csv",
            "evaluation.samples=0",
            "svi.checkpoint=often",
        ),
        *("data.root='\\u0000'", "data.name='\\u0000.csv'", f"x={'[' * 5000}", "a.b.c=1"),
        *("model.program='\\u0000.py'", "posterior.encoding={a=1}", "svi.learning_rate=nan", "likelihood.scale=[]"),
        *("svi.epochs=0", "svi.epochs=-3", "svi.epochs=1.5", "svi.epochs=true", "svi.epochs=[]", "svi.batch_size=0"),
        *("svi.batch_size=-1", "svi.batch_size=x", "svi.learning_rate=-1", "svi.learning_rate=inf", "svi.seed=-1"),
        *("svi.elbo=Elbo", "svi.elbo=['Trace_ELBO']", "svi.particles=0", "svi.particles={}", "svi.gradient=stl"),
        *("svi.capture=true", "svi.keep=worst", "svi.keep=best", "svi.checkpoint='-1 s'", "svi.checkpoint=0"),
        *("model.latent=0", "model.latent=-1", "model.latent=1.5", "model.latent=[2]", "model.latent=x", "model={}x"),
        *("data.test_fraction=1", "data.test_fraction=nan", "data.test_fraction=-0.5", "data.validation_fraction=2"),
        *(
            "data.scaling=log",
            "data.scaling=['unit']",
            "data.binarization=dynamic2",
            "data.label=y",
            "data.columns=['a']",
        ),
        *("data.name=''", "data.name=nowhere.npy", "data.name=/proc/self/mem", "data.name=/dev/zero", "data.name=.."),
        *("data.name='http://example.org/x.npy'", "data.missing=ignore", "data.seed=1.5", "data.array=x"),
        *(
            "prior.family=Normall",
            "prior.family=3",
            "prior.shape=[1]",
            "likelihood.family=",
            "likelihood.family=os.system",
        ),
        *("posterior.network={family='MLP',hidden=[-1]}", "posterior.network={family='MLP',hidden=[1000000000]}"),
        *(
            "posterior.network={family='__import__'}",
            "likelihood.network={file='none.py'}",
            "posterior.family={a={b={}}}",
        ),
        *("evaluation.samples=-1", "evaluation.samples=1e99", "evaluation.precision=float8", "evaluation.nothing=1"),
        *(
            "svi.freeze=taken",
            "svi.start=nowhere",
            "svi.clip=-1",
            "__class__=1",
            "svi.__init__=1",
            "=",
            "a",
            "a=",
            ".=1",
        ),
    ):
        status, said = command(["check", world.spec, "--set", setting], world.log, bounded)
        good = status == 2 and "Traceback" not in said
        yield setting[:40], "" if good else told(status, said)
