"""The adaptive frequency filter in three launches: row transform, columns with the mask, inverse row
transform.

Between the launches the half spectrum is stored as [B, U, C, 2 (part), H] with U = W/2 + 1, so that a column
of a block of channels is contiguous. A row of W real numbers has W/2 even and W/2 odd coefficients that are
not zero by symmetry. In each of these two classes, coefficients r < COSINES are the real parts of frequencies
2 r (odd class: 2 r + 1), and the rest are imaginary parts.
"""

import triton
import triton.language as tl

SLOPE = tl.constexpr(0.1)
SHRINK = tl.constexpr(0.01)


@triton.jit
def _place(r, ODD: tl.constexpr, COSINES: tl.constexpr, CHANNELS: tl.constexpr, H: tl.constexpr):
    """Return the offset of coefficient r of a class in the spectrum, relative to [b, 0, c, 0, 0]."""
    frequency = tl.where(r < COSINES, 2 * r + ODD, 2 * (r - COSINES) + 2 - ODD)  # DC has no imaginary part
    return (frequency * (CHANNELS * 2) + tl.where(r < COSINES, 0, 1)) * H  # the compiler sees a multiple of H


@triton.jit
def rows(
    x, scale, shift, even, odd, spectrum, CHANNELS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    EVEN_COSINES: tl.constexpr, ODD_COSINES: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Transform rows. Grid (cdiv(W/2, BLOCK_R), cdiv(H, BLOCK_H), B * C); tables [W/2 (n), W/2 (r)]."""
    HALF: tl.constexpr = W // 2
    plane = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = x + plane.to(tl.int64) * (H * W) + row[:, None] * W
    if NORM:
        gain, offset = tl.load(scale + plane), tl.load(shift + plane)
    sums = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    differences = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for k in range(0, HALF, BLOCK_K):
        n = k + tl.arange(0, BLOCK_K)
        inside = (row < H)[:, None] & (n < HALF)[None, :]
        low = tl.load(source + n[None, :], mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + HALF + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            low = tl.where(inside, low * gain + offset, 0.0)
            high = tl.where(inside, high * gain + offset, 0.0)
        place = n[:, None] * HALF + r[None, :]
        known = (n < HALF)[:, None] & (r < HALF)[None, :]
        matrix = tl.load(even + place, mask=known, other=0.0)
        sums = tl.dot((low + high).to(matrix.dtype), matrix, sums, input_precision=PRECISION)
        matrix = tl.load(odd + place, mask=known, other=0.0)
        differences = tl.dot((low - high).to(matrix.dtype), matrix, differences, input_precision=PRECISION)
    batch, channel = plane // CHANNELS, plane % CHANNELS
    target = spectrum + (batch.to(tl.int64) * (HALF + 1) * CHANNELS + channel) * (2 * H) + row[:, None]
    inside = (row < H)[:, None] & (r < HALF)[None, :]
    kind: tl.constexpr = spectrum.dtype.element_ty
    tl.store(target + _place(r, 0, EVEN_COSINES, CHANNELS, H)[None, :], sums.to(kind), mask=inside)
    tl.store(target + _place(r, 1, ODD_COSINES, CHANNELS, H)[None, :], differences.to(kind), mask=inside)


@triton.jit
def rows_inverse(
    spectrum, even, odd, x, scale, shift, y, CHANNELS: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    EVEN_COSINES: tl.constexpr, ODD_COSINES: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Transform rows back and add x (with NORM: the normalised x, and x itself as the block's residual).

    Grid (cdiv(W/2, BLOCK_N), cdiv(H, BLOCK_H), B * C); tables [W/2 (r), W/2 (n)].
    """
    HALF: tl.constexpr = W // 2
    plane = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, channel = plane // CHANNELS, plane % CHANNELS
    source = spectrum + (batch.to(tl.int64) * (HALF + 1) * CHANNELS + channel) * (2 * H) + row[None, :]
    sums = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    differences = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    for k in range(0, HALF, BLOCK_K):
        r = k + tl.arange(0, BLOCK_K)
        inside = (r < HALF)[:, None] & (row < H)[None, :]
        place = r[:, None] * HALF + n[None, :]
        known = (r < HALF)[:, None] & (n < HALF)[None, :]
        part = tl.load(source + _place(r, 0, EVEN_COSINES, CHANNELS, H)[:, None], mask=inside, other=0.0)
        matrix = tl.load(even + place, mask=known, other=0.0)
        sums = tl.dot(tl.trans(part), matrix, sums, input_precision=PRECISION)
        part = tl.load(source + _place(r, 1, ODD_COSINES, CHANNELS, H)[:, None], mask=inside, other=0.0)
        matrix = tl.load(odd + place, mask=known, other=0.0)
        differences = tl.dot(tl.trans(part), matrix, differences, input_precision=PRECISION)
    at = plane.to(tl.int64) * (H * W) + row[:, None] * W + n[None, :]
    inside = (row < H)[:, None] & (n < HALF)[None, :]
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:  # x itself, which the AFF block adds, beside the normalised x, which the filter adds
        gain, offset = tl.load(scale + plane) + 1.0, tl.load(shift + plane)
        low, high = low * gain + offset, high * gain + offset
    kind: tl.constexpr = y.dtype.element_ty
    tl.store(y + at, (sums + differences + low).to(kind), mask=inside)
    tl.store(y + at + HALF, (sums - differences + high).to(kind), mask=inside)


@triton.jit
def _negative(x):
    return (-x.to(tl.float32)).to(x.dtype)


@triton.jit
def _product(ar, ai, br, bi, PRECISION: tl.constexpr):
    """Return the complex matrix product of (ar, ai) and (br, bi) in float32."""
    real = tl.dot(ar, br, input_precision=PRECISION)
    imag = tl.dot(ar, bi, input_precision=PRECISION)
    return (
        tl.dot(ai, _negative(bi), real, input_precision=PRECISION),
        tl.dot(ai, br, imag, input_precision=PRECISION),
    )


@triton.jit
def _complex_table(table, SIZE: tl.constexpr):
    """Load the real and the imaginary part of a [2, SIZE, SIZE] table."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(table + at), tl.load(table + SIZE * SIZE + at)


@triton.jit
def _twiddle(twiddle, P1: tl.constexpr, P2: tl.constexpr):
    """Load the real and the imaginary part of the twiddle factors [2, P2, P1], each as [1, P2, P1]."""
    at = twiddle + tl.arange(0, P2)[None, :, None] * P1 + tl.arange(0, P1)[None, None, :]
    return tl.load(at), tl.load(at + P1 * P2)


@triton.jit
def _layer(pr, pi, weight, bias, group, GROUPS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Apply a complex linear layer over the last axis of [frequencies, C]."""
    matrix = weight + group * (C * C)
    at = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    wr, wi = tl.load(matrix + at), tl.load(matrix + GROUPS * C * C + at)
    real, imag = _product(pr, pi, wr, wi, PRECISION)
    shift = bias + group * C + tl.arange(0, C)
    return real + tl.load(shift)[None, :], imag + tl.load(shift + GROUPS * C)[None, :]


@triton.jit
def _leaky(x):
    return tl.where(x > 0, x, x * SLOPE)


@triton.jit
def _shrink(x):
    return tl.where(x > SHRINK, x - SHRINK, tl.where(x < -SHRINK, x + SHRINK, 0.0))


@triton.jit
def _forward(
    zr, zi, dft_1, dft_2, twiddle, C: tl.constexpr, N1: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform columns [C, P2 (n2), P1 (n1)] to float32 frequencies [C * P1 (k1), P2 (k2)]."""
    kind: tl.constexpr = zr.dtype
    if N1 > 1:
        f1r, f1i = _complex_table(dft_1, P1)
        tr, ti = _twiddle(twiddle, P1, P2)
        zr, zi = tl.reshape(zr, [C * P2, P1]), tl.reshape(zi, [C * P2, P1])
        ar, ai = _product(zr, zi, f1r, f1i, PRECISION)  # [(c, n2), k1]
        ar, ai = tl.reshape(ar, [C, P2, P1]), tl.reshape(ai, [C, P2, P1])
        zr, zi = (ar * tr - ai * ti).to(kind), (ar * ti + ai * tr).to(kind)
    br = tl.reshape(tl.permute(zr, (0, 2, 1)), [C * P1, P2])
    bi = tl.reshape(tl.permute(zi, (0, 2, 1)), [C * P1, P2])
    f2r, f2i = _complex_table(dft_2, P2)
    return _product(br, bi, f2r, f2i, PRECISION)


@triton.jit
def _backward(
    qr, qi, dft_1, dft_2, twiddle, C: tl.constexpr, N1: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Invert `_forward` with the same matrices, conjugated and in reverse order."""
    kind: tl.constexpr = qr.dtype
    f2r, f2i = _complex_table(dft_2, P2)
    ar, ai = _product(qr, qi, f2r, _negative(f2i), PRECISION)  # [(c, k1), n2]
    ar = tl.permute(tl.reshape(ar, [C, P1, P2]), (0, 2, 1))
    ai = tl.permute(tl.reshape(ai, [C, P1, P2]), (0, 2, 1))
    if N1 > 1:
        f1r, f1i = _complex_table(dft_1, P1)
        tr, ti = _twiddle(twiddle, P1, P2)
        br, bi = (ar * tr + ai * ti).to(kind), (ai * tr - ar * ti).to(kind)
        br, bi = tl.reshape(br, [C * P2, P1]), tl.reshape(bi, [C * P2, P1])
        ar, ai = _product(br, bi, f1r, _negative(f1i), PRECISION)  # [(c, n2), n1]
        ar, ai = tl.reshape(ar, [C, P2, P1]), tl.reshape(ai, [C, P2, P1])
    return ar, ai


@triton.jit
def _filter(pr, pi, w1, b1, w2, b2, group, GROUPS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply the spectrum [frequencies, C] by the mask computed from it. Padding stays 0."""
    hr, hi = _layer(pr, pi, w1, b1, group, GROUPS, C, PRECISION)
    hr, hi = _leaky(hr).to(pr.dtype), _leaky(hi).to(pr.dtype)
    mr, mi = _layer(hr, hi, w2, b2, group, GROUPS, C, PRECISION)
    mr, mi = _shrink(mr), _shrink(mi)
    return (pr * mr - pi * mi).to(pr.dtype), (pr * mi + pi * mr).to(pr.dtype)


@triton.jit
def columns(
    spectrum, w1, b1, w2, b2, dft_1, dft_2, twiddle, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    C: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Transform, filter and transform back one column of SPAN channels in place. Grid (U, GROUPS, B).

    Row n is N2 n1 + n2 and frequency k is k1 + N1 k2. C, P1 and P2 are SPAN, N1 and N2, padded for the tensor
    cores; with N1 = 1 the transform is one dense product and P1 is 1. Weights are [2, GROUPS, C, C], biases
    [2, GROUPS, C], `dft_*` [2, P, P] (symmetric) and `twiddle` [2, P2 (n2), P1 (k1)].
    """
    frequency, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = spectrum.dtype.element_ty
    c, n2, n1 = (
        tl.arange(0, C)[:, None, None],
        tl.arange(0, P2)[None, :, None],
        tl.arange(0, P1)[None, None, :],
    )
    first = (batch.to(tl.int64) * (HALF + 1) + frequency) * CHANNELS + group * SPAN
    at = spectrum + first * (2 * H) + c * (2 * H) + N2 * n1 + n2  # [C, P2, P1]
    inside = (c < SPAN) & (n2 < N2) & (n1 < N1)
    both = inside & (
        n1 < N1 * tl.minimum(frequency * (HALF - frequency), 1)
    )  # DC and Nyquist of a row are real
    zr, zi = tl.load(at, mask=inside, other=0.0), tl.load(at + H, mask=both, other=0.0)
    ar, ai = _forward(zr, zi, dft_1, dft_2, twiddle, C, N1, P1, P2, PRECISION)
    pr = tl.permute(tl.reshape(ar.to(kind), [C, P1, P2]), (1, 2, 0))
    pi = tl.permute(tl.reshape(ai.to(kind), [C, P1, P2]), (1, 2, 0))
    pr, pi = tl.reshape(pr, [P1 * P2, C]), tl.reshape(pi, [P1 * P2, C])
    qr, qi = _filter(pr, pi, w1, b1, w2, b2, group, GROUPS, C, PRECISION)
    qr = tl.reshape(tl.permute(tl.reshape(qr, [P1, P2, C]), (2, 0, 1)), [C * P1, P2])
    qi = tl.reshape(tl.permute(tl.reshape(qi, [P1, P2, C]), (2, 0, 1)), [C * P1, P2])
    ar, ai = _backward(qr, qi, dft_1, dft_2, twiddle, C, N1, P1, P2, PRECISION)
    tl.store(at, ar.to(kind), mask=inside)
    tl.store(at + H, ai.to(kind), mask=both)


@triton.jit
def columns_cached(
    spectrum, w1, b1, w2, b2, dft_1, dft_2, twiddle, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    C: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    FREQUENCIES: tl.constexpr,
):  # fmt: skip
    """Do the same as `columns` for columns that exceed the registers: CHUNK channels or FREQUENCIES at a
    time.

    Between the three loops the column is stored in its own place in the spectrum, as
    [SPAN, 2, N1 (k1), N2 (k2)]. No other program touches it, so it stays in the cache.
    """
    frequency, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = spectrum.dtype.element_ty
    base = spectrum + ((batch.to(tl.int64) * (HALF + 1) + frequency) * CHANNELS + group * SPAN) * (2 * H)
    c, n2, n1 = (
        tl.arange(0, CHUNK)[:, None, None],
        tl.arange(0, P2)[None, :, None],
        tl.arange(0, P1)[None, None, :],
    )
    k1, k2 = tl.arange(0, CHUNK * P1)[:, None], tl.arange(0, P2)[None, :]
    natural, turned = c * (2 * H) + N2 * n1 + n2, k1 // P1 * (2 * H) + k1 % P1 * N2 + k2
    for start in range(0, SPAN, CHUNK):
        at = base + start * (2 * H)
        inside = (start + c < SPAN) & (n2 < N2) & (n1 < N1)
        both = inside & (n1 < N1 * tl.minimum(frequency * (HALF - frequency), 1))
        zr = tl.load(at + natural, mask=inside, other=0.0)
        zi = tl.load(at + H + natural, mask=both, other=0.0)
        ar, ai = _forward(zr, zi, dft_1, dft_2, twiddle, CHUNK, N1, P1, P2, PRECISION)
        known = (start + k1 // P1 < SPAN) & (k1 % P1 < N1) & (k2 < N2)
        tl.debug_barrier()
        tl.store(at + turned, ar.to(kind), mask=known)
        tl.store(at + H + turned, ai.to(kind), mask=known)
    tl.debug_barrier()
    f, channel = tl.arange(0, FREQUENCIES)[:, None], tl.arange(0, C)[None, :]
    for start in range(0, H, FREQUENCIES):
        at = base + channel * (2 * H) + start + f
        known = (start + f < H) & (channel < SPAN)
        pr, pi = tl.load(at, mask=known, other=0.0), tl.load(at + H, mask=known, other=0.0)
        qr, qi = _filter(pr, pi, w1, b1, w2, b2, group, GROUPS, C, PRECISION)
        tl.debug_barrier()
        tl.store(at, qr, mask=known)
        tl.store(at + H, qi, mask=known)
    tl.debug_barrier()
    for start in range(0, SPAN, CHUNK):
        at = base + start * (2 * H)
        known = (start + k1 // P1 < SPAN) & (k1 % P1 < N1) & (k2 < N2)
        qr = tl.load(at + turned, mask=known, other=0.0)
        qi = tl.load(at + H + turned, mask=known, other=0.0)
        ar, ai = _backward(qr, qi, dft_1, dft_2, twiddle, CHUNK, N1, P1, P2, PRECISION)
        inside = (start + c < SPAN) & (n2 < N2) & (n1 < N1)
        tl.debug_barrier()
        tl.store(at + natural, ar.to(kind), mask=inside)
        tl.store(at + H + natural, ai.to(kind), mask=inside)
