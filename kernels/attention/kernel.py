"""Softmax attention in one pass over the keys; wide heads are taken in chunks of channels (see README)."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    """Load a block, with zeros outside the mask; with EVEN every block is full and no mask is used."""
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def attention(
    q,
    k,
    v,
    out,
    tokens,
    scale,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS_LAST: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute `out = softmax(scale q k^T) v`. Grid: (blocks of queries, heads, WIDTH / VALUES).

    A head is [WIDTH, tokens] with `TOKENS_LAST`, otherwise [tokens, WIDTH]. With `PACKED`, q, k and v are one
    tensor [heads, 3, ...], which is passed three times. A program computes `VALUES` channels of `BLOCK_M`
    rows of the output. `EVEN` says that the blocks divide `tokens`.
    """
    if EVEN:
        tokens = tokens // 16 * 16  # tells the compiler that rows are aligned
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(2) * VALUES
    size = tokens * WIDTH
    by_token = 1 if TOKENS_LAST else WIDTH
    by_channel = tokens if TOKENS_LAST else 1
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n, c = tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    stride = 3 * size if PACKED else size
    q += head * stride
    k += head * stride
    v += head * stride + part * by_channel
    if PACKED:
        k += size
        v += 2 * size
    row_at = m * by_token + c[None, :] * by_channel
    key_at = n[None, :] * by_token + c[:, None] * by_channel
    value_at = n[:, None] * by_token + c[None, :] * by_channel

    queries, sums = (), ()
    for i in tl.static_range(WIDTH // CHUNK):
        queries = queries + (_load(q + i * CHUNK * by_channel + row_at, m < tokens, EVEN),)  # noqa: RUF005
    for _ in tl.static_range(VALUES // CHUNK):
        sums = sums + (tl.zeros([BLOCK_M, CHUNK], tl.float32),)  # noqa: RUF005
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    log2_scale = scale * _LOG2_E
    for start in range(0, tokens, BLOCK_N):
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.static_range(WIDTH // CHUNK):
            block = k + (start * by_token + i * CHUNK * by_channel)
            keys = _load(block + key_at, (start + n < tokens)[None, :], EVEN)
            scores = tl.dot(queries[i], keys, scores, input_precision="tf32x3")
        if not EVEN:
            scores = tl.where((start + n < tokens)[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * log2_scale)
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(scores * log2_scale - new_largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = new_largest
        weights = weights.to(v.dtype.element_ty)
        new_sums = ()
        for i in tl.static_range(VALUES // CHUNK):
            block = v + (start * by_token + i * CHUNK * by_channel)
            values = _load(block + value_at, (start + n < tokens)[:, None], EVEN)
            grown = tl.dot(weights, values, sums[i] * shrink[:, None], input_precision="tf32x3")
            new_sums = new_sums + (grown,)  # noqa: RUF005
        sums = new_sums

    out += head * size + part * by_channel
    for i in tl.static_range(VALUES // CHUNK):
        result = (sums[i] / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + i * CHUNK * by_channel + row_at, result, mask=m < tokens)
