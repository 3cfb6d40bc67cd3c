"""The byte products of processors that this one need not be become the instructions they are meant to be."""

from types import SimpleNamespace

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from refllm.kernels.packed import dots, simd
from refllm.kernels.packed.simd import Ints

ARM, X86, MAC = "aarch64-linux-gnu", "x86_64-linux-gnu", "arm64-apple-macosx"
KINDS = (Ints.llvm, dots.BYTES, dots.BYTES)


def assembly(triple, form, features, cpu=None):
    """void f(int32 total[16], uint8 codes[64], int8 x[64])."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM writes no code for {triple}")
    module = ir.Module(form)
    module.triple = triple
    byte = ir.IntType(8).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte] * 3), "f")
    b = ir.IRBuilder(function.append_basic_block())
    operands = [simd.load(b, p, kind) for p, kind in zip(function.args, KINDS, strict=True)]
    b.store(dots.emit_dot(b, form, *operands), b.bitcast(function.args[0], Ints.llvm.as_pointer()), align=1)
    b.ret_void()
    cpu = cpu or ("generic" if triple == ARM else "x86-64")
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
    return machine.emit_assembly(llvm.parse_assembly(str(module)))


def test_arm_products_are_instructions():
    lines = {
        form: assembly(ARM, form, features).split()
        for form, features in (
            ("sdot", "+dotprod"), (dots.ARM_WIDE_DOT, "+dotprod"), ("usdot", "+i8mm"), (dots.PORTABLE, "+neon"),
        )
    }  # fmt: skip
    assert lines["sdot"].count("sdot") == 4 and lines["usdot"].count("usdot") == 4  # a quarter of the vector each
    assert lines[dots.ARM_WIDE_DOT].count("sdot") == 12
    assert not {"sdot", "usdot"} & set(lines[dots.PORTABLE])


@pytest.mark.parametrize(("name", "form"), [("m1", "sdot"), ("m2", "usdot"), ("m4", "usdot"), ("a18", "usdot")])
def test_macs_have_what_their_name_says(monkeypatch, name, form):
    """LLVM finds no features there, but writes these instructions for such a processor."""
    monkeypatch.setattr(simd, "get_host_cpu_features", lambda: "")
    monkeypatch.setattr(simd, "config", SimpleNamespace(CPU_NAME=f"apple-{name}", CPU_FEATURES=None))
    monkeypatch.setattr(dots, "target_features", simd.target_features.__wrapped__)
    assert dots.dot_form(4) == form and dots.dot_form(8) == (form if form == "usdot" else dots.ARM_WIDE_DOT)
    assert assembly(MAC, form, "", f"apple-{name}").count(f"\t{form}") == 4


def test_avx_vnni_has_the_product_in_half_a_vector():
    """With the old encoding: a processor that has no AVX-512 runs no other."""
    lines = assembly(X86, dots.X86_HALF_DOT, "+avx2,+avxvnni").splitlines()
    found = [line.split() for line in lines if "vpdpbusd" in line]
    assert len(found) == 2 and all(line[0] == "{vex}" and "%ymm" in line[-1] for line in found)


@pytest.mark.parametrize(
    ("features", "bits", "form"),
    [
        ({"+neon", "+dotprod"}, 4, "sdot"),
        ({"+neon", "+dotprod"}, 8, dots.ARM_WIDE_DOT),
        ({"+neon", "+dotprod", "+i8mm"}, 8, "usdot"),
        ({"+neon"}, 4, dots.PORTABLE),
        ({"+avx2", "+avxvnni"}, 8, dots.X86_HALF_DOT),
        ({"+avx2", "+avxvnni", "+avx512bw", "+avx512vnni"}, 8, dots.X86_BYTE_DOT),
        ({"+avx2"}, 4, dots.X86_BYTE_PAIRS),
    ],
)
def test_the_form_follows_the_features(monkeypatch, features, bits, form):
    monkeypatch.setattr(dots, "target_features", lambda: frozenset(features))
    assert dots.dot_form(bits) == form
