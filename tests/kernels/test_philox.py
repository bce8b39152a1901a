"""Philox4x32-10 against the known answers that its authors publish with Random123 (kat_vectors)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayproj.kernels import philox

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
@pytest.mark.parametrize("generate", [philox.philox4x32, philox._rounds])
def test_known_answers(counter, key, expected, generate) -> None:  # type: ignore[no-untyped-def]
    words = generate(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("shape", [(0, 3), (5, 1), (3, 4, 7), (1025,)])
def test_the_host_and_vmap_draw_what_torch_does(shape: tuple[int, ...]) -> None:
    words = torch.randint(0, 2**32, (4, *shape))
    words[1] = words[1][..., :1]
    spread = words[2, ..., :1].expand(shape)  # as rows are spread over the blocks of their draws
    counter = (words[0], words[1], spread, words[3].transpose(0, -1).contiguous().transpose(0, -1))
    expected = philox._rounds(counter, (7, 2**32 - 1))
    found = philox.philox4x32(counter, (7, 2**32 - 1))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if shape[0]:
        batched = torch.func.vmap(lambda *c: philox.philox4x32(c, (7, 2**32 - 1)))(*counter)
        assert all(torch.equal(a, b) for a, b in zip(batched, expected, strict=True))


def test_extreme_words_stay_finite() -> None:
    edge = torch.tensor([0, 1, 0xFFFFFFFF])
    assert torch.isfinite(torch.stack(philox.normals_from_bits(edge, edge))).all()
    assert philox.uniform_from_bits(edge).max() < 1


def test_a_flat_vector_is_the_same_in_any_pieces() -> None:
    """Element i is the (i mod 4)-th normal of the counter (i div 4, step, attempt), also past 2^34 elements."""
    words, start = (11, 22, 33, 44), 2**34 - 6
    whole = philox.flat_normal(words, 5, 6, range(start, start + 50), "cpu")
    parts = [philox.flat_normal(words, 5, 6, range(start + i, start + i + 7), "cpu") for i in range(0, 49, 7)]
    assert torch.equal(torch.cat(parts), whole[:49])
    for i in (0, 5, 6, 7, 49):
        block = (start + i) // 4
        counter = tuple(torch.tensor([c]) for c in (block & philox.MASK, 5, 6 ^ 33, (block >> 32) ^ 44))
        assert whole[i] == philox.normal(counter, (11, 22))[0, (start + i) % 4]  # type: ignore[arg-type]


def on_the_interpreter() -> None:
    """Compare the Triton kernel with the reference; runs where TRITON_INTERPRET=1 was set before Triton was imported."""
    from rayproj.kernels import philox_triton

    generator = torch.Generator().manual_seed(0)
    for start, size, noisy in ((0, 5000, 5000), (3, 1027, 900), (2**34 - 6, 2000, 2000), (2**35 + 1, 2, 2), (8, 9, 0)):
        words = tuple(torch.randint(2**32, (4,), generator=generator).tolist())
        total = torch.randn(size, generator=generator)
        for step, attempt in ((0, 0), (2**32 - 1, 7)):
            found = philox_triton.add_noise(total, words, step, attempt, start, noisy, 2.5, 9.0)
            noise = philox.flat_normal(words, step, attempt, range(start, start + size), "cpu")  # type: ignore[arg-type]
            noise[noisy:] = 0
            assert ((found - (total + 2.5 * noise) / 9).abs() <= 1e-6).all(), (start, size, noisy, step)


def test_the_triton_kernel_adds_the_same_noise() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", "from tests.kernels import test_philox; test_philox.on_the_interpreter()"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        check=True,
        timeout=120,
    )


@pytest.mark.parametrize("capability", [80, 90])
def test_the_triton_kernel_compiles_for_gpus(capability: int) -> None:
    """To machine code, which needs no GPU: what the interpreter allows is not all that the compiler does."""
    triton = pytest.importorskip("triton")
    from rayproj.kernels.philox_triton import _add_noise
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"total": "*fp32", "out": "*fp32", "std": "fp32", "normaliser": "fp32", "BLOCKS": "constexpr"}
    signature = {name: types.get(name, "i64") for name in _add_noise.arg_names}
    position = (_add_noise.arg_names.index("BLOCKS"),)
    source = ASTSource(fn=_add_noise, signature=signature, constexprs={position: 256})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
