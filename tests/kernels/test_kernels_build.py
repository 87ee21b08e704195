"""Kernels are compiled ahead of time without a GPU: resources, spills, and the contents of kernels.json."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moesr.kernels import build
from moesr.kernels.assembly import TENSOR_CORE, Resources, disassemble, from_log, loops, with_instructions
from moesr.kernels.plan import ARCHITECTURES, SHARED_BYTES
from moesr.kernels.registry import DECODER, IMAGES, LOOP, OPS
from moesr.kernels.report import write_report
from moesr.runtime.devices import compiled_kernels, kernel_search
from moesr.runtime.devices.grid_expressions import evaluate

REPO = Path(build.__file__).parents[1]
SAMPLE = (86, 90)  # the second architecture has asynchronous matrix products
ON_TENSOR_CORES = {"rows", "columns", "columns_cached", "rows_inverse", "inverted_residual", "attention"}

COMPILED = DECODER + LOOP
"""The operators that the default tests compile; those of images are examined as they are shipped."""


def first_case(op):
    return dataclasses.replace(op, deployed=op.deployed[:1])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The first deployed case of every operator, for two architectures: (directory, its index)."""
    directory = tmp_path_factory.mktemp("kernels") / "built"
    ops = [first_case(op) for op in COMPILED]
    built = build.build(directory, SAMPLE, ops, cache=tmp_path_factory.mktemp("cache"))
    read = compiled_kernels.read(directory)
    assert read == built, "kernels.json differs from the returned index"
    assert read.toolkit, "the version of the assembler is missing"
    return directory, read


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kernels") / "built"
    return build.build(directory, cache=tmp_path_factory.mktemp("cache"))


def check_resources(content, op):
    """Check shared memory, spills and tensor cores of an operator's kernels; return their targets."""
    kernels = {name: k for name, k in content.kernels.items() if k.op == op.name}
    for name, kernel in kernels.items():
        for target, compiled in kernel.targets.items():
            where = f"{name} on {target}"
            assert not any(compiled.hidden.values()), f"{where}: a hidden argument would need memory"
            if target == "ptx":
                continue
            assert compiled.spill_bytes <= op.max_spill_bytes, where
            assert compiled.shared_bytes <= SHARED_BYTES[int(target[3:])], where
            assert compiled.local_in_loops == 0 or compiled.spill_bytes > 0, where
            if kernel.function in ON_TENSOR_CORES:
                assert compiled.tensor_core > 0, where
    return {target for kernel in kernels.values() for target in kernel.targets}


@pytest.mark.parametrize("op", COMPILED, ids=lambda op: op.name)
def test_kernels_keep_to_the_limits_of_resources(sample, op):
    assert check_resources(sample[1], op) == {"sm_86", "sm_90", "ptx"}


@pytest.mark.parametrize("op", IMAGES, ids=lambda op: op.name)
def test_shipped_kernels_of_images_keep_to_the_limits(op):
    shipped = compiled_kernels.read(kernel_search.SHIPPED)
    assert check_resources(shipped, op) == {*(f"sm_{arch}" for arch in ARCHITECTURES), "ptx"}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_kernels_keep_to_the_limits_on_every_architecture(everything, op):
    assert check_resources(everything, op) == {*(f"sm_{a}" for a in ARCHITECTURES), "ptx"}


def test_files_match_kernels_json(sample):
    directory, content = sample
    for kernel in content.kernels.values():
        for target in kernel.targets.values():
            data = (directory / target.file).read_bytes()
            assert hashlib.sha256(data).hexdigest() == target.sha256
            assert target.entry.encode() in data
            assert list(target.hidden) == ["global_scratch", "profile_scratch"]
            assert target.threads % 32 == 0
    assert {f.relative_to(directory).parts[0] for f in directory.rglob("*") if f.is_file()} == {
        "kernels.json", "ptx", "sm_86", "sm_90", "tables"
    }  # fmt: skip


def test_kernels_json_holds_all_that_a_launch_needs(sample):
    """Argument types, grids and buffer sizes follow from kernels.json and equal the registry's."""
    directory, content = sample
    assert {t for p in content.plans for t in p.targets} == {"sm_86", "sm_90", "ptx"}
    for entry in content.plans:
        arch = int(entry.targets[0].removeprefix("sm_")) if entry.targets[0] != "ptx" else 89
        plan = OPS[entry.op].plan(entry.shape, entry.dtype, arch)
        types = {n: "i32" if isinstance(v, int) else "fp32" for n, v in entry.scalars.items()}
        types |= {b.name: f"*{b.dtype}" for b in entry.buffers}
        for launch, mine in zip(entry.launches, plan.launches, strict=True):
            kernel = content.kernels[launch.kernel]
            assert tuple(types[a] for a in launch.arguments) == kernel.arguments
            assert set(entry.targets) <= set(kernel.targets)
            assert tuple(evaluate(g, entry.scalars) for g in launch.grid) == plan.grid(mine)
        for buffer, mine in zip(entry.buffers, plan.buffers, strict=True):
            dims = buffer.dims(entry.scalars)
            assert dims == mine.dims(plan.scalars)
            if buffer.role == "table":
                assert (directory / buffer.file).stat().st_size == buffer.nbytes(entry.scalars)


def test_ptx_names_a_portable_architecture(sample):
    directory, _ = sample
    texts = [f.read_text() for f in (directory / "ptx").iterdir()]
    assert texts
    assert all(".target sm_89\n" in t for t in texts), "PTX for sm_90a would not load on other architectures"


def assembly(sample, function: str, target: str) -> list[str]:
    """Return the SASS of all kernels of one function for an architecture."""
    directory, content = sample
    kernels = [k.targets for k in content.kernels.values() if k.function == function]
    return [disassemble(directory / targets[target].file) for targets in kernels if target in targets]


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
@pytest.mark.parametrize("function", ["rows", "rows_inverse"])
def test_filter_reads_and_writes_sixteen_bytes_at_once(sample, function, target):
    """The compiler sees that offsets are multiples of the height, so it needs no two-byte accesses."""
    (sass,) = assembly(sample, function, target)
    assert "LDG.E.U16" not in sass and "STG.E.U16" not in sass
    assert re.search(r"\bSTG\.E\.128\b", sass)


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
def test_inner_loop_of_the_inverted_residual_has_few_barriers(sample, target):
    """The loop needs two barriers for its scratch memory and some for operands, but none per filter tap."""
    (sass,) = assembly(sample, "inverted_residual", target)
    inner = min((loop for loop in loops(sass) if TENSOR_CORE.search("\n".join(loop))), key=len)
    assert sum("BAR.SYNC" in text for text in inner) <= 8
    assert not any("LDG.E.U16" in text for text in inner), "the loop reads x again for every chunk"


@pytest.mark.parametrize("op", OPS)
def test_kernels_import_only_triton(op):
    tree = ast.parse((REPO / "kernels" / op / "kernel.py").read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules <= {"triton", "triton.language", "__future__"}, (
        "the hash of the source would not cover an imported module"
    )


def test_report_lists_resources_per_architecture(sample, tmp_path):
    write_report(sample[1], tmp_path / "kernels.md")
    text = (tmp_path / "kernels.md").read_text()
    for op in COMPILED:
        assert f"## {op.name}\n\nA test holds spills to {op.max_spill_bytes} bytes." in text
    row = next(line for line in text.splitlines() if line.startswith("| rows |"))
    assert "full512 fp16" in row
    assert row.count(" / ") == 4, "expected registers, shared memory and spills for each of two architectures"
    barriers, instructions = (int(cell) for cell in row.split(" | ")[-3:-1])
    assert 0 < barriers < instructions


def test_new_report_keeps_the_handwritten_part(sample, tmp_path):
    page = tmp_path / "kernels.md"
    page.write_text("# Old\n\n## Changes\n\nBefore and after.\n")
    write_report(sample[1], page)
    assert (
        page.read_text().endswith("\n## Changes\n\nBefore and after.\n") and "# Old" not in page.read_text()
    )


def test_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="not empty"):
        build.main(["--arch", "sm_90", "-o", str(tmp_path)])


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({"MOESR_CACHE": "{0}/own", "XDG_CACHE_HOME": "{0}/xdg"}, "own/kernels"),
        ({"XDG_CACHE_HOME": "{0}/xdg"}, "xdg/moesr/kernels"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/moesr/kernels"),
        ({"MOESR_CACHE": "", "XDG_CACHE_HOME": "relative"}, "home/.cache/moesr/kernels"),
    ],
)
def test_compiled_kernels_are_cached_for_the_user(tmp_path, monkeypatch, variables, want):
    for name in ("MOESR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    with build.cache_folder(None) as folder:
        assert folder == tmp_path / want
    with build.cache_folder(tmp_path / "chosen") as folder:
        assert folder == tmp_path / "chosen"


def test_user_without_a_home_gets_a_temporary_cache(monkeypatch):
    monkeypatch.setattr("moesr.runtime.system.user_cache.directory", lambda: None)
    with build.cache_folder(None) as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_import_needs_no_home():
    """`Path.home()` raises RuntimeError for a user without a home directory."""
    code = (
        "import pathlib\n"
        "def fail(): raise RuntimeError('no home')\n"
        "pathlib.Path.home = fail\n"
        "import moesr.kernels.build"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_message_names_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*given, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(build, "build", refuse)
    with pytest.raises(SystemExit, match="cannot write the kernels"):
        build.main(["--arch", "sm_90", "-o", str(tmp_path / "new")])


def test_unknown_architecture_is_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        build.main(["--arch", "sm_75", "-o", str(tmp_path / "new")])
    assert error.value.code == 2
    assert "sm_75" in capsys.readouterr().err


def test_resources_are_read_from_the_assemblers_log():
    log = "Function properties for f\n 8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    assert from_log(log + "ptxas info : Used 40 registers, 400 bytes cmem[0]", 1024) == Resources(
        40, 1024, 12
    )
    with pytest.raises(ValueError, match="neither registers nor spills"):
        from_log("", 0)


def test_local_memory_is_counted_inside_loops_only():
    sass = """
        /*0000*/  LDL R1, [R2] ;
.L_x_0:
        /*0010*/  HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/  STL [R2], R4 ;
        /*0030*/  @P0 BRA `(.L_x_0) ;
        /*0040*/  LDL R1, [R2] ;
.L_x_1:
        /*0050*/  BRA `(.L_x_1);
    """
    counted = with_instructions(Resources(1, 0, 0), sass)
    assert (counted.tensor_core, counted.local_in_loops) == (1, 1)
    (loop,) = loops(sass)
    assert [text.split()[0] for text in loop] == ["HMMA.16816.F32", "STL", "@P0"]


@pytest.mark.parametrize(
    ("expression", "names", "want"),
    [("cdiv(H, 32) * batch", {"H": 33, "batch": 3}, 6), ("max(a - 5, 0) // 2 + min(a, 3)", {"a": 4}, 3)],
)
def test_grid_expressions_are_evaluated(expression, names, want):
    assert evaluate(expression, names) == want


@pytest.mark.parametrize("expression", ["__import__('os')", "a.b", "a / 2", "missing + 1", "1.5"])
def test_other_expressions_are_refused(expression):
    with pytest.raises(ValueError, match="cannot evaluate"):
        evaluate(expression, {"a": 4})


def test_constants_are_substituted_in_grid_expressions():
    assert build.substitute("cdiv(H, BLOCK) * batch", {"H": 100, "BLOCK": 32}) == "cdiv(100, 32) * batch"
    assert build.substitute("cdiv(H, BLOCK)", {"H": 100, "BLOCK": 32}) == "4"
