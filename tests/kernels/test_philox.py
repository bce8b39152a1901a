"""Philox4x32-10 against the known answers that its authors publish with Random123 (kat_vectors); noise with AdamW against
torch's optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rayproj.kernels import philox
from tests.support import interpreter

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


SHARDS = ((0, 5000, 5000), (3, 1027, 900), (2**34 - 6, 2000, 2000), (2**35 + 1, 2, 2), (8, 9, 0))  # start, size, noisy


def is_noise_and_then_adamw(update: Callable[..., None], add_noise: Callable[..., Tensor]) -> int:
    """Over several updates; and padding, which has no noise, gets nothing but the weight decay. Returns how many were
    compared."""
    generator, words, scales = torch.Generator().manual_seed(0), (1, 2**32 - 1, 3, 2**31), (2.5, 9.0)
    lr, betas, eps, decay = 0.01, (0.9, 0.99), 1e-8, 0.1
    for start, size, noisy in SHARDS:
        expected = torch.randn(size, generator=generator).requires_grad_()
        weights, first, second = expected.detach().clone(), torch.zeros(size), torch.zeros(size)
        padding = weights[noisy:].clone()
        optimizer = torch.optim.AdamW([expected], lr=lr, betas=betas, eps=eps, weight_decay=decay)
        for step in range(4):
            total = torch.randn(size, generator=generator)
            total[noisy:] = 0
            release = words, step, 7, start, noisy, *scales
            expected.grad = add_noise(total, *release)
            optimizer.step()
            update(total, weights, first, second, *release, step + 1, lr, betas, eps, decay)
        close = {"rtol": 2e-6, "atol": 1e-7}
        torch.testing.assert_close(weights, expected.detach(), **close)
        torch.testing.assert_close(first, optimizer.state[expected]["exp_avg"], **close)
        torch.testing.assert_close(second, optimizer.state[expected]["exp_avg_sq"], **close)
        torch.testing.assert_close(weights[noisy:], padding * (1 - lr * decay) ** 4, **close)
        assert not first[noisy:].any() and not second[noisy:].any()
    return len(SHARDS)


def test_noise_with_adamw_is_noise_and_then_torchs_adamw() -> None:
    def add_noise(
        total: Tensor, words: Any, step: int, attempt: int, start: int, noisy: int, std: float, normaliser: float
    ) -> Tensor:
        noise = philox.flat_normal(words, step, attempt, range(start, start + len(total)), "cpu")
        noise[noisy:] = 0
        return (total + std * noise) / normaliser

    assert is_noise_and_then_adamw(philox.noisy_adamw, add_noise) == len(SHARDS)


def on_the_interpreter() -> None:
    """Compare the Triton kernels with the references; runs where TRITON_INTERPRET=1 was set before Triton was imported."""
    from rayproj.kernels import philox_triton

    is_noise_and_then_adamw(philox_triton.noisy_adamw, philox_triton.add_noise)
    generator = torch.Generator().manual_seed(0)
    for start, size, noisy in SHARDS:
        words = tuple(torch.randint(2**32, (4,), generator=generator).tolist())
        total = torch.randn(size, generator=generator)
        for step, attempt in ((0, 0), (2**32 - 1, 7)):
            found = philox_triton.add_noise(total, words, step, attempt, start, noisy, 2.5, 9.0)
            noise = philox.flat_normal(words, step, attempt, range(start, start + size), "cpu")  # type: ignore[arg-type]
            noise[noisy:] = 0
            assert ((found - (total + 2.5 * noise) / 9).abs() <= 1e-6).all(), (start, size, noisy, step)


def test_the_triton_kernels_give_the_same() -> None:
    pytest.importorskip("triton")
    done = interpreter.run("-c", "from tests.kernels import test_philox; test_philox.on_the_interpreter()")
    assert done.returncode == 0, done.stderr


FLOATS = {"total", "out", "master", "exp_avg", "exp_avg_sq"}
SCALES = {"std", "normaliser", "step_size", "root", "eps", "decay", "new_first", "old_second", "new_second"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_add_noise", "_noisy_adamw"])
def test_the_triton_kernels_compile_for_gpus(name: str, capability: int) -> None:
    """To machine code, which needs no GPU: what the interpreter allows is not all that the compiler does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rayproj.kernels import philox_triton

    kernel = getattr(philox_triton, name)
    signature = {a: "*fp32" if a in FLOATS else "fp32" if a in SCALES else "i64" for a in kernel.arg_names}
    signature["BLOCKS"] = "constexpr"
    source = ASTSource(fn=kernel, signature=signature, constexprs={(kernel.arg_names.index("BLOCKS"),): 256})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
