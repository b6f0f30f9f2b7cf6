"""What a step on a CPU computes beside its linear layers, each as one pass over memory (compiled by Numba).

torch has these only as a dozen small operations a layer, each of which reads and writes everything once more. Here
each token is computed by itself, in fp32, by the same instructions wherever it stands: what comes out for it depends
on no other row of the step, to the last bit.

Arrays hold fp32, or bf16 as its bits in uint16, since NumPy has no bf16: `bits` and `tensor` go from torch to NumPy and
back without a copy. Knows nothing of models: `tasks.jobs.network` calls these in order.

All of it is one file because Numba keeps what it compiled until the kernel's own file changes, and does not see others.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import float32, int32, njit
from numba.core import cgutils
from numba.extending import intrinsic
from numba.types import none
from torch import Tensor

ABREAST = 64  # elements that are compared at once
BLOCK = 512  # logits that are summed up on their own
PAGE = 64  # tokens whose keys and values lie together
CHUNK = 16  # rows of a page that are computed while a few lines of another are fetched
DTYPES = {torch.float32, torch.bfloat16}
WORD, INDEX, BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
FETCH = ir.FunctionType(ir.VoidType(), [BYTES, WORD, WORD, WORD])
LINE = 64  # bytes of a cache line

# Sums may be split among the lanes of a vector register; infinities and NaN keep their meaning.
OPTIONS = {
    "nogil": True,
    "cache": True,
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
}
inlined = njit(inline="always", **{**OPTIONS, "cache": False})  # into kernels, which are kept with it


class Places(NamedTuple):
    """Where the tokens of a step keep their keys and values in a layer."""

    keys: np.ndarray  # (pages, kv heads, size, PAGE)
    values: np.ndarray  # (pages, kv heads, PAGE, size)
    pages: np.ndarray  # (tokens, most pages of a row), those of each token's row
    positions: np.ndarray  # (tokens), of each token in its row


def bits(x: Tensor) -> np.ndarray:
    """A tensor's memory as NumPy sees it: fp32, or bf16 as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def tensor(x: np.ndarray) -> Tensor:
    """The reverse of `bits`."""
    made = torch.from_numpy(x)
    return made.view(torch.bfloat16) if made.dtype == torch.uint16 else made


@intrinsic
def _wide(context: Any, x: Any) -> Any:
    """An element, fp32 or the bits of a bf16, as fp32: a bf16 is the upper half of an fp32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x == float32:
            return args[0]
        lower = builder.zext(args[0], WORD)
        return builder.bitcast(builder.shl(lower, WORD(16)), ir.FloatType())

    return float32(x), code


@intrinsic
def _narrow(context: Any, x: Any, like: Any) -> Any:
    """An fp32 number as an element of the array `like`; as bf16 rounded to the nearest, ties to even."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if like.dtype == float32:
            return args[0]
        word = builder.bitcast(args[0], WORD)
        odd = builder.and_(builder.lshr(word, WORD(16)), WORD(1))
        rounded = builder.add(word, builder.add(odd, WORD(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, WORD(16)), ir.IntType(16))

    return like.dtype(float32, like), code


@intrinsic
def _power_of_two(context: Any, n: Any) -> Any:
    """2 to a whole number from -126 to 127, which becomes the exponent of an fp32."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(args[0], WORD(127)), WORD(23)), ir.FloatType())

    return float32(int32), code


def _as_indices(builder: Any, numbers: Any) -> list[Any]:
    """Whole numbers of any width as those that count places in memory."""
    return [builder.sext(x, INDEX) if x.type.width < INDEX.width else x for x in numbers]


@intrinsic
def _fetch(context: Any, pages: Any, page: Any, head: Any, offset: Any) -> Any:
    """Have the cache line come that is `offset` bytes into one head of a page, without waiting for it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, array.strides, 4)
        page, head, offset = _as_indices(builder, args[1:])
        at = builder.add(builder.mul(page, strides[0]), builder.add(builder.mul(head, strides[1]), offset))
        place = builder.gep(builder.bitcast(array.data, BYTES), [at])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [BYTES], FETCH)
        builder.call(fetch, [place, WORD(0), WORD(2), WORD(1)])  # to read, into the second cache, data
        return context.get_dummy_value()

    return none(pages, page, head, offset), code


def _adder(queries: int, columns: int) -> Any:
    """A product of matrices for `queries` of its rows and `columns` of its columns, added to what is there.

    sums[j + q, s + a + c] += factors[j + q, f + r] x rows[r, a + c] for r of [first, end), one after the other; all fp32,
    one row after the other in memory. The sums stay in registers meanwhile, and what is read of a row serves all
    queries: what Numba makes of the same loops takes three times as long.
    """
    vector = ir.VectorType(ir.FloatType(), columns)  # in as many registers as it takes
    nothing, lane_0 = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(WORD, columns), [0] * columns)

    @intrinsic
    def add(
        context: Any, factors: Any, j: Any, f: Any, rows: Any, first: Any, end: Any, a: Any, sums: Any, s: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            factors, rows, sums = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 3, 7))
            j, f, first, end, a, s = _as_indices(builder, [args[i] for i in (1, 2, 4, 5, 6, 8)])

            def place(of: Any, row: Any, column: Any) -> Any:
                width = builder.extract_value(of.shape, 1)
                return builder.gep(of.data, [builder.add(builder.mul(row, width), column)])

            own = [builder.add(j, INDEX(q)) for q in range(queries)]
            places = [builder.bitcast(place(sums, q, builder.add(s, a)), vector.as_pointer()) for q in own]
            kept = [cgutils.alloca_once_value(builder, builder.load(at, align=4)) for at in places]
            with cgutils.for_range_slice(builder, first, end, INDEX(1), INDEX) as (r, _):
                row = builder.load(builder.bitcast(place(rows, r, a), vector.as_pointer()), align=4)
                for q, sum_ in zip(own, kept):
                    factor = builder.load(place(factors, q, builder.add(f, r)))
                    factor = builder.shuffle_vector(builder.insert_element(nothing, factor, WORD(0)), nothing, lane_0)
                    product = builder.fmul(factor, row, flags=["contract"])
                    builder.store(builder.fadd(builder.load(sum_), product, flags=["contract"]), sum_)
            for at, sum_ in zip(places, kept):
                builder.store(builder.load(sum_), at, align=4)
            return context.get_dummy_value()

        return none(factors, j, f, rows, first, end, a, sums, s), code

    return add


WIDE, NARROW = 64, 8  # columns of a product that are computed together
_add_wide_to_two, _add_wide_to_one, _add_narrow_to_one = _adder(2, WIDE), _adder(1, WIDE), _adder(1, NARROW)


def can_attend(dtype: torch.dtype, size: int) -> bool:
    """Whether `attend` knows heads of this size and type."""
    return dtype in DTYPES and size % NARROW == 0


@inlined
def _empty(rows: int, columns: int, dtype: Any) -> np.ndarray:
    """Memory that begins with a cache line: a product whose factor does not takes twice as long."""
    some = np.empty(rows * columns + LINE, dtype)
    begin = -some.ctypes.data % LINE // some.itemsize
    return some[begin : begin + rows * columns].reshape(rows, columns)


@inlined
def _exp(x: float) -> float:
    """e to the x for x of at most 88, to 2e-7 of its value: 2^n by the exponent's bits, the rest by a polynomial."""
    y = max(x, float32(-87.0)) * float32(1.44269504)
    n = np.floor(y + float32(0.5))
    f = (y - n) * float32(0.69314718)
    p = float32(1 / 720) * f + float32(1 / 120)
    p = p * f + float32(1 / 24)
    p = p * f + float32(1 / 6)
    p = p * f + float32(0.5)
    p = p * f + float32(1)
    p = p * f + float32(1)
    return p * _power_of_two(int32(n))


@njit(**OPTIONS)
def add_norm(stream: np.ndarray, change: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Add `change` to `stream` (both: tokens, size) in place; the sum over its root mean square, times the weight."""
    tokens, size = stream.shape
    normed = _empty(tokens, size, weight.dtype)
    for i in range(tokens):
        squares = float32(0)
        for a in range(size):
            x = stream[i, a] + _wide(change[i, a])
            stream[i, a] = x
            squares += x * x
        scale = float32(1) / np.sqrt(squares / float32(size) + float32(epsilon))
        for a in range(size):
            normed[i, a] = _narrow(stream[i, a] * scale * _wide(weight[a]), normed)
    return normed


@njit(**OPTIONS)
def gate(both: np.ndarray) -> np.ndarray:
    """silu(left) x right of the two halves of (tokens, 2 x size)."""
    tokens, size = both.shape[0], both.shape[1] // 2
    gated = _empty(tokens, size, both.dtype)
    for i in range(tokens):
        for a in range(size):
            x = _wide(both[i, a])
            y = x / (float32(1) + _exp(min(-x, float32(87)))) * _wide(both[i, size + a])
            gated[i, a] = _narrow(y, gated)
    return gated


@njit(**OPTIONS)
def rotate(
    qkv: np.ndarray,
    heads: int,
    size: int,
    positions: np.ndarray,
    cosines: np.ndarray,
    sines: np.ndarray,
    turned: np.ndarray,
) -> None:
    """Turn the first `heads` heads of each token by its position (RoPE).

    qkv, and `turned`, where it goes with the other heads as they are: (tokens, heads x size ...);
    cosines, sines: (positions, size / 2), fp32.
    """
    half = size // 2
    for i in range(len(qkv)):
        cos, sin = cosines[positions[i]], sines[positions[i]]
        for h in range(0, heads * size, size):
            x, y = qkv[i, h : h + half], qkv[i, h + half : h + size]
            u, v = turned[i, h : h + half], turned[i, h + half : h + size]
            for a in range(half):
                left, right = _wide(x[a]), _wide(y[a])
                u[a] = _narrow(left * cos[a] - right * sin[a], turned)
                v[a] = _narrow(right * cos[a] + left * sin[a], turned)
        for a in range(heads * size, qkv.shape[1]):
            turned[i, a] = qkv[i, a]


@inlined
def _store(qkv: np.ndarray, i: int, heads: int, h: int, places: Places) -> None:
    """Put one head of a token's key and value into its row's page."""
    keys, values, pages, positions = places
    kv_heads, size = keys.shape[1], keys.shape[2]
    page, place = pages[i, positions[i] // PAGE], positions[i] % PAGE
    for a in range(size):
        keys[page, h, a, place] = qkv[i, (heads + h) * size + a]
        values[page, h, place, a] = qkv[i, (heads + kv_heads + h) * size + a]


@njit(**OPTIONS)
def store(qkv: np.ndarray, chosen: np.ndarray, places: Places) -> None:
    """Put the keys and values of chosen tokens into their rows' pages; arguments as for `attend`."""
    kv_heads, size = places.keys.shape[1], places.keys.shape[2]
    heads = qkv.shape[1] // size - 2 * kv_heads
    for i in chosen:
        for h in range(kv_heads):
            _store(qkv, i, heads, h, places)


@njit(**OPTIONS)
def gather(keys: np.ndarray, values: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values, both (kv heads, tokens, size), that lie in the pages of a row."""
    kv_heads, size = keys.shape[1], keys.shape[2]
    row_keys = np.empty((kv_heads, len(table) * PAGE, size), keys.dtype)
    row_values = np.empty((kv_heads, len(table) * PAGE, size), values.dtype)
    for h in range(kv_heads):
        for p in range(len(table)):
            for t in range(PAGE):
                for a in range(size):
                    row_keys[h, p * PAGE + t, a] = keys[table[p], h, a, t]
                    row_values[h, p * PAGE + t, a] = values[table[p], h, t, a]
    return row_keys, row_values


@njit(**OPTIONS)
def attend(qkv: np.ndarray, chosen: np.ndarray, places: Places, scaling: float, window: int) -> np.ndarray:
    """Put the keys and values of chosen tokens into their rows' pages; what their queries find there, up to themselves.

    To store a key touches a cache line for each of its elements: here they are at hand, as they are read next.

    Args:
        qkv: (tokens, (heads + 2 x kv heads) x size): queries, keys, values.
        chosen: which tokens.
        window: how many of the last keys a query sees; 0 is all.

    Returns:
        (tokens, heads x size), of which only the chosen are filled in.
    """
    keys, values, pages, positions = places
    tokens, kv_heads, size = len(qkv), keys.shape[1], keys.shape[2]
    heads = qkv.shape[1] // size - 2 * kv_heads
    group = heads // kv_heads
    output = _empty(tokens, heads * size, qkv.dtype)
    query = _empty(group, size, np.float32)
    weights = _empty(group, pages.shape[1] * PAGE, np.float32)
    partial = np.empty(ABREAST, np.float32)
    totals, sums = np.empty(group, np.float32), _empty(group, size, np.float32)
    key_block, value_block = _empty(size, PAGE, np.float32), _empty(PAGE, size, np.float32)
    for c in range(len(chosen)):
        i = chosen[c]
        seen = positions[i] + 1
        first = max(seen - window, 0) if window > 0 else 0
        first_page, end_page = first // PAGE, (seen + PAGE - 1) // PAGE
        for h in range(kv_heads):
            _store(qkv, i, heads, h, places)
            then, next_head = (i, h + 1) if h + 1 < kv_heads else (chosen[min(c + 1, len(chosen) - 1)], 0)
            for g in range(group):
                for a in range(size):
                    query[g, a] = _wide(qkv[i, (h * group + g) * size + a]) * float32(scaling)
            for g in range(group):
                for t in range(first_page * PAGE, end_page * PAGE):
                    weights[g, t] = float32(0)
            # While one page is computed the one that follows is on its way: values after keys, then the next keys.
            for p in range(first_page, end_page):
                _widen(keys, pages[i, p], h, key_block)
                _add_products(query, 0, key_block, weights, p * PAGE, values, pages[i, p], h)
            for g in range(group):
                w = weights[g, first_page * PAGE : end_page * PAGE]
                totals[g] = _exponentials(w, first - first_page * PAGE, seen - first_page * PAGE, partial)
            sums[:] = float32(0)
            for p in range(first_page, end_page):
                _widen(values, pages[i, p], h, value_block)
                _add_products(weights, p * PAGE, value_block, sums, 0, keys, pages[then, p], next_head)
            for g in range(group):
                for a in range(size):
                    output[i, (h * group + g) * size + a] = _narrow(sums[g, a] / totals[g], output)
    return output


@inlined
def _widen(pages: np.ndarray, page: int, head: int, block: np.ndarray) -> None:
    """One head of a page as fp32."""
    for a in range(block.shape[0]):
        for b in range(block.shape[1]):
            block[a, b] = _wide(pages[page, head, a, b])


@inlined
def _exponentials(scores: np.ndarray, begin: int, end: int, partial: np.ndarray) -> float:
    """e to the scores of [begin, end), less the highest of them, in place, and their sum; 0 for the others."""
    behind = scores[end:]
    for t in range(begin):
        scores[t] = float32(-np.inf)
    for t in range(len(behind)):
        behind[t] = float32(-np.inf)
    highest, total = _highest(scores, partial), float32(0)
    for t in range(len(scores)):  # all of them, whole vectors: e to -87 adds nothing
        scores[t] = _exp(scores[t] - highest)
        total += scores[t]
    for t in range(begin):
        scores[t] = float32(0)
    for t in range(len(behind)):
        behind[t] = float32(0)
    return total


@inlined
def _highest(x: np.ndarray, partial: np.ndarray) -> float:
    """The highest element. Of every 64th one first, as one after the other would wait for each other."""
    for a in range(ABREAST):
        partial[a] = float32(-np.inf)
    whole = len(x) // ABREAST * ABREAST
    for t in range(0, whole, ABREAST):
        for a in range(ABREAST):
            partial[a] = max(partial[a], _wide(x[t + a]))
    half = ABREAST // 2
    while half:
        for a in range(half):
            partial[a] = max(partial[a], partial[half + a])
        half //= 2
    highest = partial[0]
    for t in range(whole, len(x)):
        highest = max(highest, _wide(x[t]))
    return highest


@inlined
def _add_products(
    factors: np.ndarray,
    f: int,
    rows: np.ndarray,
    sums: np.ndarray,
    s: int,
    pages: np.ndarray,
    page: int,
    head: int,
) -> None:
    """sums[:, s:] += factors[:, f:] x rows, a product of matrices.

    Meanwhile one head of another page is fetched, a few lines at a time, as a core waits for a dozen of them at most.
    """
    queries, height, width = len(factors), rows.shape[0], rows.shape[1]
    steps = (queries + 1) // 2 * (-(-height // CHUNK))
    lines, offset = -(-height * width * pages.itemsize // (steps * LINE)), 0
    wide = width // WIDE * WIDE
    for j in range(0, queries, 2):
        for r in range(0, height, CHUNK):
            for _ in range(lines):
                _fetch(pages, page, head, offset)
                offset += LINE
            end = min(r + CHUNK, height)
            for a in range(0, wide, WIDE):
                if j + 1 < queries:
                    _add_wide_to_two(factors, j, f, rows, r, end, a, sums, s)
                else:
                    _add_wide_to_one(factors, j, f, rows, r, end, a, sums, s)
            for a in range(wide, width, NARROW):
                for k in range(j, min(j + 2, queries)):
                    _add_narrow_to_one(factors, k, f, rows, r, end, a, sums, s)


@njit(**OPTIONS)
def likeliest(logits: np.ndarray) -> np.ndarray:
    """The first of the highest logits (tokens, vocabulary) of each token."""
    found, partial = np.empty(len(logits), np.int64), np.empty(ABREAST, np.float32)
    for i in range(len(logits)):
        most, best = float32(-np.inf), 0
        for begin in range(0, logits.shape[1], BLOCK):
            block = logits[i, begin : begin + BLOCK]
            highest = _highest(block, partial)
            if highest > most:
                most, best = highest, begin
        block = logits[i, best : best + BLOCK]
        found[i] = best
        for a in range(len(block)):
            if _wide(block[a]) == most:
                found[i] += a
                break
    return found


@njit(**OPTIONS)
def draw(logits: np.ndarray, chances: np.ndarray, temperature: float) -> np.ndarray:
    """For each token a next one: where its chance, from 0 to 1, falls in the summed softmax of logits / temperature."""
    found, partial = np.empty(len(logits), np.int64), np.empty(ABREAST, np.float32)
    vocabulary, sharpness = logits.shape[1], float32(1 / temperature)
    sums = np.empty(-(-vocabulary // BLOCK), np.float64)
    for i in range(len(logits)):
        most = _highest(logits[i], partial)
        for b in range(len(sums)):
            block = logits[i, b * BLOCK : (b + 1) * BLOCK]
            total = float32(0)
            for a in range(len(block)):
                total += _exp((_wide(block[a]) - most) * sharpness)
            sums[b] = total
        left, b = chances[i] * sums.sum(), 0
        while b < len(sums) - 1 and left >= sums[b]:
            left -= sums[b]
            b += 1
        block = logits[i, b * BLOCK : (b + 1) * BLOCK]
        found[i] = b * BLOCK  # a token even where no logit is a number
        for a in range(len(block)):
            share = _exp((_wide(block[a]) - most) * sharpness)
            if share > float32(1e-30):  # what rounding leaves at the end goes to the last that has a share
                found[i] = b * BLOCK + a
                left -= share
                if left < 0:
                    break
    return found


@njit(**OPTIONS)
def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The cross entropy, in nats, of one target for each row of logits (tokens, vocabulary), in fp32."""
    found, partial = np.empty(len(logits), np.float32), np.empty(ABREAST, np.float32)
    for i in range(len(logits)):
        most, total = _highest(logits[i], partial), 0.0
        for begin in range(0, logits.shape[1], BLOCK):
            block, part = logits[i, begin : begin + BLOCK], float32(0)
            for a in range(len(block)):
                part += _exp(_wide(block[a]) - most)
            total += part
        found[i] = np.log(total) + most - _wide(logits[i, targets[i]])
    return found
