"""``make compile-gpu`` and the CUDA part of ``setup.py``, as far as they can be tried without a GPU: what is compiled
for what, what turns the check red, and that it says so."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "csrc/cuda"))
import compile as gpu  # noqa: E402

SPILLED = """\
ptxas info    : Compiling entry function '_ZN6nnfast4cuda12adamw_kernelENS0_5AdamWE' for 'sm_80'
ptxas info    : Function properties for _ZN6nnfast4cuda12adamw_kernelENS0_5AdamWE
    56 bytes stack frame, 124 bytes spill stores, 332 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 56 bytes cumulative stack size, 72 bytes smem, 504 bytes cmem[0]
ptxas info    : Function properties for __internal_accurate_pow
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
CLEAN = SPILLED.replace(
    "56 bytes stack frame, 124 bytes spill stores, 332", "0 bytes stack frame, 0 bytes spill stores, 0"
)


def test_what_is_compiled_for_what():
    names = {path.name: archs for path, archs in gpu.sources(gpu.ARCHS).items()}
    assert names == {
        "adamw.cu": gpu.ARCHS,
        "clip_grad.cu": gpu.ARCHS,
        "layer_norm.cu": gpu.ARCHS,
        "linear_gelu.cu": gpu.ARCHS,
        "linear_gelu_backward_sm90a.cu": ("90a",),
        "linear_gelu_sm90a.cu": ("90a",),
        "rmsprop.cu": gpu.ARCHS,
        "sgd.cu": gpu.ARCHS,
    }
    assert "linear_gelu_sm90a.cu" not in {path.name for path in gpu.sources(["80"])}


def test_arch_list(monkeypatch):
    for value, archs in (("90a", ("90a",)), ("80;90a", ("80", "90a")), ("80, 100", ("80", "100")), ("", gpu.ARCHS)):
        monkeypatch.setenv("NNFAST_CUDA_ARCH", value)
        assert gpu.archs() == archs


def test_ptx_is_for_later_gpus():
    """PTX of an architecture with a letter runs on that one alone, so a build for 80 and 90a keeps 80's."""
    for wanted, kept in ((("80", "90a"), ["80"]), (gpu.ARCHS, ["100"]), (("90a",), [])):
        command = gpu.command(Path("cuda"), Path("x.cu"), wanted, Path("x.o"), ptx=True)
        assert re.findall(r"code=compute_(\w+)", " ".join(command)) == kept


def test_compiler_report():
    kernels, warnings = gpu.compiler_report(SPILLED)
    (name,) = (name for name in kernels if "adamw" in name)
    assert kernels[name] == {"registers": 64, "shared": 72, "spilled": 124 + 332, "stack": 56}
    assert gpu.kernel_name(name) == "adamw_kernel"
    assert gpu.kernel_name("_ZN46_GLOBAL__N__06f9443321layer_norm_bwd_kernelI6__halfEEvb") == "layer_norm_bwd_kernel"
    (problem,) = gpu.problems(kernels, warnings)
    assert "adamw_kernel" in problem and "456 bytes spilled" in problem
    assert gpu.problems(*gpu.compiler_report(CLEAN)) == []
    serialised = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert gpu.problems(*gpu.compiler_report(CLEAN + serialised)) == [serialised]
    called = CLEAN.replace("0 bytes stack frame", "8 bytes stack frame")
    assert len(gpu.problems(*gpu.compiler_report(called))) == 2


def test_instruction_counts():
    sass = """
        Function : _ZN1a8x_kernelE
        /*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/ LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/ LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        Function : _ZN1a8y_kernelE
        /*0000*/ @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0010*/ F2F.BF16.F32 R4, R5 ;
        /*0020*/ NOP ;
        /*0030*/ @P0 BRA 0x0010 ;
        /*0040*/ @!P1 BRA.U 0x0000 ;
        /*0050*/ BRA 0x0060 ;
        /*0060*/ BRA 0x0060 ;
    """
    none = {**dict.fromkeys(gpu.INSTRUCTIONS, 0), "longest loop": 0}
    assert gpu.instruction_counts(sass) == {
        "_ZN1a8x_kernelE": {**none, "HGMMA": 1, "16-byte loads": 2, "instructions": 4},
        "_ZN1a8y_kernelE": {**none, "16-byte stores": 1, "F2F": 1, "instructions": 6, "longest loop": 4},
    }


def test_a_slip_is_found():
    wide = {**dict.fromkeys(gpu.INSTRUCTIONS, 0), "16-byte loads": 2, "16-byte stores": 1}
    name = "_ZN1a20gelu_bwd_bias_kernelE"
    assert gpu.slipped(name, wide) == []
    assert gpu.slipped(name, {**wide, "16-byte stores": 0}) == ["gelu_bwd_bias_kernel: no 16-byte stores"]
    assert "3 F2F" in gpu.slipped("_ZN1a21layer_norm_bwd_kernelE", {**wide, "F2F": 3})[0]
    assert gpu.slipped("_ZN1a12adamw_kernelE", {**wide, "F2F": 3}) == []
    assert gpu.slipped("_ZN1a28layer_norm_bwd_affine_kernelE", {**wide, "16-byte stores": 0}) == []
    assert gpu.slipped("_ZN1a16sum_parts_kernelE", dict.fromkeys(gpu.INSTRUCTIONS, 0)) == []
    rows = "_ZN1a21layer_norm_fwd_kernelI13__nv_bfloat16S3_NS1_4HeldILi32ELi8EEELb1ELb1EEEvNS0_16LayerNormForwardEf"
    assert gpu.row_clocks(rows, {"instructions": 240}) == (60, 1024 / gpu.BYTES_A_CLOCK)
    assert gpu.slipped(rows, {**wide, "instructions": 240}) == []
    assert "63 clocks to issue a row, 62 for its bytes" in gpu.slipped(rows, {**wide, "instructions": 252})[0]
    backward = rows.replace("fwd", "bwd").replace("Lb1ELb1", "Lb1ELb0")
    assert gpu.row_clocks(backward, {"longest loop": 240}) == (60, 1536 / gpu.BYTES_A_CLOCK)
    for elements in (rows.replace("Lb1ELb1", "Lb0ELb0"), backward.replace("Lb1ELb0", "Lb0ELb1")):
        assert gpu.slipped(elements, dict.fromkeys(gpu.INSTRUCTIONS, 0)) == []


@pytest.mark.skipif(gpu.toolkit() is None, reason="no CUDA toolkit here; make compile-gpu brings one")
def test_a_spill_is_found(tmp_path):
    """The AdamW kernel as it is, and with more of its blocks on a multiprocessor than there are registers for."""
    for layer in ("cuda", "math"):
        shutil.copytree(ROOT / "csrc" / layer, tmp_path / "csrc" / layer)
    source = tmp_path / "csrc/cuda/adamw.cu"
    for resident, fails in ((3, False), (8, True)):
        text, replaced = re.subn(r"kResident = \d+;", f"kResident = {resident};", source.read_text())
        assert replaced == 1
        source.write_text(text)
        (done,) = [
            d for _, d, _ in gpu.run_all({0: gpu.command(gpu.toolkit(), source, ["90a"], tmp_path / "out.o")}, 1)
        ]
        assert done.returncode == 0, done.stderr
        kernels, warnings = gpu.compiler_report(done.stdout + done.stderr)
        assert any("adamw_kernel" in name for name in kernels)
        assert any("spilled" in p for p in gpu.problems(kernels, warnings)) == fails


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is one for CUDA")
def test_architectures_for_a_torch_without_cuda(tmp_path):
    """Asked for in vain: one line that says so, and nothing built."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-temp", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NNFAST_CUDA_ARCH": "90a"}, capture_output=True, text=True
    )
    assert done.returncode != 0 and "without CUDA" in done.stderr.strip().splitlines()[-1]
