"""`z <- c_z z + c_history history + c_out sums + c_noise noise` and `sums <- 0`; the noise is generated here.

Compiled without fused multiply-add (`fp_fusion=False`), every operation below is correctly rounded by
IEEE 754, so the interpreter, any GPU and NumPy agree to the last bit. The README explains the maths.
"""

import triton
import triton.language as tl

JOB_COLUMNS = tl.constexpr(7)
"""Columns of the int64 table [jobs, 7]: addresses of z, of the sums and of the coefficients, number of
elements (0: an empty job), seed, step + 1, and the address of the history (0: none)."""

_MULTIPLIER_0 = tl.constexpr(0xD2E7470EE14C6C93)  # Philox-4x64 (Salmon et al., SC 2011, Table 2)
_MULTIPLIER_1 = tl.constexpr(0xCA5A826395121157)
_WEYL_0 = tl.constexpr(0x9E3779B97F4A7C15)
_WEYL_1 = tl.constexpr(0xBB67AE8584CAA73B)

_HALF_ROOT_BITS = tl.constexpr(0x3FE6A09E667F3BCD)  # sqrt(1/2) as float64
_LN_2 = tl.constexpr(0.6931471805599453)
_TURN = tl.constexpr(1.4629180792671596e-09)  # 2 pi / 2**32 as float64
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
_HALF_PI_HIGH = tl.constexpr(1.5707963267341256)  # 33 bits of pi / 2: up to 4 times it is exact
_HALF_PI_LOW = tl.constexpr(6.077100506506192e-11)  # the rest


@triton.jit
def philox(counter, key_0, key_1):
    """Return the four words of each Philox block.

    `counter` uint64 [N] is the lowest word of the block's counter; its other words are 0.
    """
    c0, c1 = counter, counter * 0
    c2, c3 = c1, c1
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(c0, c0 * 0 + _MULTIPLIER_0), c0 * _MULTIPLIER_0
        high_1, low_1 = tl.umulhi(c2, c2 * 0 + _MULTIPLIER_1), c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0 += _WEYL_0
        key_1 += _WEYL_1
    return c0, c1, c2, c3


@triton.jit
def log(u):
    """Return the natural logarithm of positive normal float64, within 2 units in the last place."""
    bits = u.to(tl.int64, bitcast=True)
    exponent = (bits - _HALF_ROOT_BITS) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)  # in [sqrt(1/2), sqrt(2))
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    tail = s2 * (1 / 21)  # log(m) = 2 atanh(s): up to s^21
    for i in tl.static_range(9):
        tail = s2 * (tail + 1 / (19 - 2 * i))
    return exponent.to(tl.float64) * _LN_2 + 2.0 * (s + s * tail)


@triton.jit
def cos_sin(angle):
    """Return cosine and sine of float64 angles in [0, 2 pi], within 2 units in the last place."""
    quadrant = (angle * _TWO_OVER_PI + 0.5).to(tl.int32)
    q = quadrant.to(tl.float64)
    r = (angle - q * _HALF_PI_HIGH) - q * _HALF_PI_LOW  # in [-pi/4, pi/4]
    r2 = r * r
    cosine = 1.0 - r2 * (1 / 240)  # Taylor up to r^16, factor by factor
    sine = 1.0 - r2 * (1 / 272)  # and up to r^17
    for i in tl.static_range(7):
        cosine = 1.0 - r2 * (1 / ((13 - 2 * i) * (14 - 2 * i))) * cosine
        sine = 1.0 - r2 * (1 / ((14 - 2 * i) * (15 - 2 * i))) * sine
    sine *= r
    swapped = (quadrant & 1) == 1
    c, s = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    return tl.where(((quadrant + 1) & 2) == 2, -c, c), tl.where((quadrant & 2) == 2, -s, s)


@triton.jit
def normals(word):
    """Return two normals per word by Box-Muller: radius from its high half, angle from its low half."""
    u = ((word >> 32).to(tl.float64) + 0.5) * (1 / (1 << 32))
    radius = tl.sqrt(log(u) * -2.0)
    cosine, sine = cos_sin((word & 0xFFFFFFFF).to(tl.float64) * _TURN)
    return (radius * cosine).to(tl.float32), (radius * sine).to(tl.float32)


@triton.jit
def noise(block, seed, step_key, BLOCK: tl.constexpr):
    """Return elements `block * 8 BLOCK` to `(block + 1) * 8 BLOCK` of a step's noise, float32 [8 BLOCK]."""
    counter = (block * BLOCK + tl.arange(0, BLOCK) + 1).to(tl.uint64)  # NumPy's Philox counts from 1
    w0, w1, w2, w3 = philox(counter, seed, step_key)
    c0, s0 = normals(w0)
    c1, s1 = normals(w1)
    c2, s2 = normals(w2)
    c3, s3 = normals(w3)
    cosines = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [BLOCK, word // 2, word % 2]
    sines = tl.join(tl.join(s0, s2), tl.join(s1, s3))
    return tl.reshape(tl.join(cosines, sines), [8 * BLOCK])


@triton.jit
def sampler_step(jobs, BLOCK: tl.constexpr):
    """Grid: (any number of programs, jobs). The programs of a job share its blocks of `8 BLOCK` elements."""
    job = jobs + tl.program_id(1) * JOB_COLUMNS
    z = tl.load(job).to(tl.pointer_type(tl.float32))
    sums = tl.load(job + 1).to(tl.pointer_type(tl.float32))
    coefficients = tl.load(job + 2).to(tl.pointer_type(tl.float32))
    size = tl.load(job + 3)
    seed = tl.load(job + 4).to(tl.uint64, bitcast=True)
    step_key = tl.load(job + 5).to(tl.uint64, bitcast=True)
    kept = tl.load(job + 6)
    history = kept.to(tl.pointer_type(tl.float32))
    filled, remembers = size > 0, kept != 0
    c_z = tl.load(coefficients, mask=filled, other=0.0)
    c_out = tl.load(coefficients + 1, mask=filled, other=0.0)
    c_noise = tl.load(coefficients + 2, mask=filled, other=0.0)
    c_history = tl.load(coefficients + 3, mask=remembers, other=0.0)
    x_z = tl.load(coefficients + 4, mask=remembers, other=0.0)
    x_out = tl.load(coefficients + 5, mask=remembers, other=0.0)
    block = tl.program_id(0).to(tl.int64)
    while block * 8 * BLOCK < size:
        offset = block * 8 * BLOCK + tl.arange(0, 8 * BLOCK)
        inside = offset < size
        before, out = tl.load(z + offset, mask=inside), tl.load(sums + offset, mask=inside)
        moved = before * c_z
        if remembers:
            moved += tl.load(history + offset, mask=inside) * c_history
            tl.store(history + offset, before * x_z + out * x_out, mask=inside)
        moved += out * c_out
        if c_noise != 0.0:
            moved += noise(block, seed, step_key, BLOCK) * c_noise
        tl.store(z + offset, moved, mask=inside)
        tl.store(sums + offset, tl.zeros_like(moved), mask=inside)
        block += tl.num_programs(0)
